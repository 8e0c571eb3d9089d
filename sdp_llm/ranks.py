"""How messages and cards name ranks."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8  # ranges in a message


def ranges(ranks: Sequence[int]) -> list[str]:
    """Ascending ranks as text, three or more in a row shortened: ["0-3", "8", "9"]."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return [
        text
        for run in runs
        for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))
    ]


def say_ranks(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 1, 2``, ``ranks 0-7, 9``; of many ranges the first ones."""
    found = ranges(ranks)
    more = f" and {len(found) - _SHOWN} more" if found[_SHOWN:] else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(found[:_SHOWN])}{more}"
