"""The lines that a person watches."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_EVERY = 20


@dataclass(frozen=True)
class LogLine:
    """One line of the log.

    ``phase`` counts from 1. ``loss`` is the mean training loss of all ranks since the last line,
    ``validation`` the whole model's loss where it was measured since then; both in nats per token.
    ``memory_now`` and ``memory_peak`` (bytes) are the least and the most of all ranks. ``eta`` is
    in seconds.
    """

    step: int
    total_steps: int
    phase: int
    loss: float
    validation: float | None
    lr: float
    grad_norm: float
    skipped: int
    tokens_per_second: float
    memory_now: tuple[int, int]
    memory_peak: tuple[int, int]
    eta: float


_COLUMNS = (
    ("step", 15),
    ("loss", 8),
    ("val loss", 8),
    ("lr", 9),
    ("grad norm", 9),
    ("tokens/s", 9),
    ("GiB now", 11),
    ("GiB peak", 11),
    ("left", 9),
)


def header() -> str:
    """The names of the columns; memory is least to most of all ranks."""
    return " ".join(name.rjust(width) for name, width in _COLUMNS)


def format_line(line: LogLine) -> str:
    """One line under :func:`header`."""
    cells = (
        f"{line.step}/{line.total_steps}",
        f"{line.loss:.4f}",
        "" if line.validation is None else f"{line.validation:.4f}",
        f"{line.lr:.3e}",
        f"{line.grad_norm:.3f}",
        f"{line.tokens_per_second:,.0f}",
        _range(line.memory_now),
        _range(line.memory_peak),
        duration(line.eta),
    )
    text = " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return text + (f"  skipped {line.skipped}" if line.skipped else "")


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _range(sizes: tuple[int, int]) -> str:
    # Four digits each, so that the column holds what large machines have.
    low, high = (f"{gib:.{1 if gib >= 99.995 else 2}f}" for gib in (s / 2**30 for s in sizes))
    return f"{low}–{high}"  # noqa: RUF001 - an en dash between the ends of a range
