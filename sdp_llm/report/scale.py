"""Axes: where a value stands, which values get a tick, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_PREFIXES = {0: "", 3: "K", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z", 24: "Y"}


@dataclass(frozen=True)
class Scale:
    """Maps ``low`` to ``start`` and ``high`` to ``stop`` (pixels), by logarithms if ``is_log``."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """About ``most`` round values inside."""
        if self.is_log:
            return log_ticks(self.low, self.high, most)
        return linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    power = 10.0 ** (math.floor(math.log10((high - low) / most)) - 1)
    ticks: list[float] = []
    for factor in (1, 2, 5, 10, 20, 50, 100, 200):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = [k * step for k in range(first, last + 1)]
        if len(ticks) <= most:
            break
    return ticks


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, with 2 and 5 times these where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil((len(decades) - 1) / (most - 1)))
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**d for d in decades[::every] for f in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else [low, high]


def limits(
    values: Iterable[float], *, from_zero: bool = False, is_log: bool = False
) -> tuple[float, float]:
    """The range of an axis: that of the values and a little more."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    if not found:
        return (1.0, 10.0) if is_log else (0.0, 1.0)
    low, high = min(found), max(found)
    if is_log:
        room = (high / low) ** 0.05 if high > low else 2.0
        return low / room, high * room
    if from_zero:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0.0 else low - room), high + room


def prefix_for(largest: float) -> tuple[str, float]:
    """The SI prefix under which ``largest`` is between 1 and 1000, and its factor."""
    if not math.isfinite(largest) or largest < 1000:
        return "", 1.0
    power = min(3 * int(math.log10(largest) // 3), max(_PREFIXES))
    return _PREFIXES[power], 10.0**power


def tick_text(value: float, ticks: list[float]) -> str:
    """A tick's value with as many decimals as tell it from its neighbours."""
    if value == 0:
        return "0"
    gaps = [b - a for a, b in pairwise(ticks)]
    smallest = min(gaps, default=abs(value))
    if max(abs(tick) for tick in ticks) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(smallest) + 1e-9))
    if abs(value) < smallest:  # on a logarithmic axis
        decimals = max(decimals, -math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:,.{decimals}f}"


def value_text(value: float) -> str:
    """A value with four digits."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 - math.floor(math.log10(abs(value)))}f}" if value else "0"


def si_text(value: float) -> str:
    """A count with three digits and a prefix, such as 1.64 M."""
    prefix, factor = prefix_for(value)
    return f"{value / factor:.3g} {prefix}".rstrip() if factor > 1 else f"{value:,.0f}"
