"""The lines that a person watches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from sdp_llm.training.progress import LogLine, duration, format_line, header

GIB = 2**30
LINE = LogLine(
    step=5,
    total_steps=1000,
    phase=1,
    loss=10.12345,
    validation=None,
    lr=3e-4,
    grad_norm=1.23456,
    skipped=0,
    tokens_per_second=12345.6,
    memory_now=(GIB, 2 * GIB),
    memory_peak=(3 * GIB // 2, 10 * GIB),
    eta=3725.4,
)
NAMES = ["step", "loss", "val loss", "lr", "grad norm", "tokens/s", "GiB now", "GiB peak", "left"]


def ends() -> list[int]:
    """Where each column ends."""
    text, found, start = header(), [], 0
    for name in NAMES:
        start = text.index(name, start) + len(name)
        found.append(start)
    return found


def cells(text: str) -> list[str]:
    bounds = [0, *ends()]
    return [text[a:b].strip() for a, b in pairwise(bounds)]


def test_the_values_stand_under_their_names() -> None:
    expected = ["5/1000", "10.1235", "", "3.000e-04", "1.235", "12,346"]
    expected += ["1.00–2.00", "1.50–10.00", "1:02:05"]  # noqa: RUF001
    assert cells(format_line(LINE)) == expected
    assert cells(format_line(replace(LINE, validation=9.87654)))[2] == "9.8765"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1, "total_steps": 8, "loss": 0.0, "eta": 0.0},
        {"step": 1_000_000, "total_steps": 1_000_000, "validation": 12.5, "lr": 0.0},
        {"grad_norm": 12345.6, "tokens_per_second": 9_999_999.0, "loss": 123.4},
        {"memory_now": (79 * GIB, 80 * GIB), "memory_peak": (0, 100), "eta": 3600.0 * 999},
        {"memory_now": (99 * GIB, 100 * GIB - 1), "memory_peak": (100 * GIB, 999 * GIB)},
        {"loss": float("nan"), "grad_norm": float("inf")},
    ],
)
def test_every_line_is_as_wide_as_the_header(changes: dict[str, object]) -> None:
    text = format_line(replace(LINE, **changes))  # type: ignore[arg-type]
    assert len(text) == len(header())
    for end in ends():
        assert text[end - 1] != " " or cells(text)[ends().index(end)] == ""
        assert text[end : end + 1] in ("", " ")
    assert len(header()) <= 100


def test_skipped_steps_are_named_where_there_are_some() -> None:
    assert format_line(replace(LINE, skipped=2)) == format_line(LINE) + "  skipped 2"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (360_000, "100:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
