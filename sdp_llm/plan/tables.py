"""Tables of numbers for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

LABEL_WIDTH = 31  # characters
MIB, GIB = 2**20, 2**30


def table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """A title with column names, a rule, and a row for each label."""
    left = max(LABEL_WIDTH, len(title))
    width = max(10, *(len(text) for text in [*names, *(c for _, cells in rows for c in cells)]))
    lines = [f"{title:<{left}}" + "".join(f"  {name:>{width}}" for name in names)]
    lines.append("-" * len(lines[0]))
    for label, cells in rows:
        lines.append(f"{label:<{left}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def unit_for(largest: float) -> tuple[str, int]:
    """The unit in which bytes up to ``largest`` are shown, and how many bytes it is."""
    return ("GiB", GIB) if largest >= 10 * GIB else ("MiB", MIB)


def number(value: float) -> str:
    """Three digits, or all of the integer part."""
    decimals = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}" if value == 0 or value >= 0.01 else f"{value:.1e}"
