"""The lines that a person watches."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from sdp_llm.training.progress import LogLine, ProgressBar, duration, format_line, header, say

GIB = 2**30
LINE = LogLine(
    step=5,
    total_steps=1000,
    phase=1,
    loss=10.12345,
    lowest_loss=10.1,
    lowest_rank=2,
    highest_loss=10.16,
    highest_rank=1,
    loss_std=0.02,
    validation=None,
    lr=3e-4,
    grad_norm=1.23456,
    skipped=0,
    tokens_per_second=12345.6,
    memory_now=(GIB, 2 * GIB),
    memory_peak=(3 * GIB // 2, 10 * GIB),
    to_validation=62.0,
    eta=3725.4,
)
NAMES = ["step", "loss", "spread", "val loss", "lr", "grad norm", "tokens/s", "GiB peak"]
NAMES += ["to val", "left"]


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
    expected = ["5/1000", "10.1235", "0.060 r1", "", "3.00e-04", "1.235", "12,346", "10.00"]
    assert cells(format_line(LINE)) == [*expected, "0:01:02", "1:02:05"]
    assert cells(format_line(replace(LINE, validation=9.87654)))[3] == "9.8765"
    assert cells(format_line(replace(LINE, to_validation=None)))[8] == ""


@pytest.mark.parametrize(
    ("gap", "rank", "text"),
    [
        (0.0123, 3, "0.012 r3"),
        (0.0123, 31, "0.012 r31"),
        (0.0123, 127, "0.01 r127"),
        (12.345, 1023, "12 r1023"),
        (float("nan"), 5, "nan r5"),
    ],
)
def test_the_spread_names_the_highest_rank_in_as_many_digits_as_fit(
    gap: float, rank: int, text: str
) -> None:
    line = replace(LINE, lowest_loss=1.0, highest_loss=1.0 + gap, highest_rank=rank)
    assert cells(format_line(line))[2] == text


def test_one_rank_has_no_spread() -> None:
    line = replace(LINE, lowest_rank=0, highest_rank=0)
    assert cells(format_line(line))[2] == ""


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


class Terminal(io.StringIO):
    """Standard output that says it is a terminal, or a file."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def watched(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, is_speaking: bool = True) -> str:
    """What a run of two steps prints."""
    output = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stdout", output)
    bar = ProgressBar(4, 2, is_speaking=is_speaking)
    for _ in range(2):
        bar.advance()
        say("a line")
        bar.show(LINE)
    bar.close()
    return output.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = watched(monkeypatch, is_terminal=True)
    assert "step 4/4 |" in text
    assert "100%, loss 10.1235, 1:02:05 left, validation in 0:01:02" in text
    assert text.count("a line\n") == 2


def test_a_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, is_terminal=False) == "a line\n" * 2


def test_other_ranks_show_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "step" not in watched(monkeypatch, is_terminal=True, is_speaking=False)
