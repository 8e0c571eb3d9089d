"""Axes and how numbers are written."""

from __future__ import annotations

import math

import pytest

from sdp_llm.report.scale import (
    Scale,
    limits,
    linear_ticks,
    log_ticks,
    prefix_for,
    si_text,
    tick_text,
    value_text,
)


def test_a_scale_maps_its_ends() -> None:
    scale = Scale(2.0, 4.0, 100.0, 0.0)
    assert (scale(2.0), scale(3.0), scale(4.0)) == (100.0, 50.0, 0.0)
    scale = Scale(1.0, 100.0, 0.0, 10.0, is_log=True)
    assert scale(10.0) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 200.0, ["0", "50", "100", "150", "200"]),
        (4.4, 8.2, ["5", "6", "7", "8"]),
        (0.0, 0.0021, ["0", "0.0005", "0.0010", "0.0015", "0.0020"]),
        (0.0, 2.2e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (0.0, 45_000.0, ["0", "10,000", "20,000", "30,000", "40,000"]),
        (-0.02, 0.02, ["-0.02", "-0.01", "0", "0.01", "0.02"]),
        (4.801, 4.803, ["4.8010", "4.8015", "4.8020", "4.8025", "4.8030"]),
    ],
)
def test_ticks_are_round(low: float, high: float, texts: list[str]) -> None:
    ticks = linear_ticks(low, high, 5)
    assert [tick_text(tick, ticks) for tick in ticks] == texts


@pytest.mark.parametrize("most", range(5, 12))
@pytest.mark.parametrize("high", [0.37, 1.0, 7.3, 99.0, 1234.5])
def test_ticks_are_inside_and_not_too_many(most: int, high: float) -> None:
    ticks = linear_ticks(0.1 * high, high, most)
    assert 2 <= len(ticks) <= most
    assert all(0.1 * high - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_logarithmic_ticks() -> None:
    assert log_ticks(0.1, 1000.0, 6) == pytest.approx([0.1, 1, 10, 100, 1000])
    ticks = log_ticks(0.3, 6.0, 6)
    assert ticks == pytest.approx([0.5, 1, 2, 5])
    assert [tick_text(tick, ticks) for tick in ticks] == ["0.5", "1.0", "2.0", "5.0"]
    assert len(log_ticks(1e-12, 1e12, 6)) <= 6
    assert log_ticks(4.1, 4.9, 6) == [4.1, 4.9]


def test_limits_leave_room_and_keep_zero() -> None:
    assert limits([1.0, 3.0]) == (pytest.approx(0.9), pytest.approx(3.1))
    assert limits([1.0, 3.0], from_zero=True)[0] == 0.0
    assert limits([math.nan, 2.0, math.inf]) == (pytest.approx(1.9), pytest.approx(2.1))
    assert limits([]) == (0.0, 1.0)
    low, high = limits([0.0, 1.0, 100.0], is_log=True)
    assert 0 < low < 1 < 100 < high


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.05574, "5.056"),
        (0.0, "0"),
        (0.093, "0.09300"),
        (12345.6, "12,346"),
        (2e-4, "2.000e-04"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_values(value: float, text: str) -> None:
    assert value_text(value) == text


def test_prefixes() -> None:
    assert [si_text(v) for v in (999, 1_638_400, 2.62e13)] == ["999", "1.64 M", "26.2 T"]
    assert prefix_for(1e30) == ("Y", 1e24)
