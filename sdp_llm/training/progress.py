"""What a person watches: lines, and on a terminal a bar below them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tqdm import tqdm

HEADER_EVERY = 20


@dataclass(frozen=True)
class LogLine:
    """One line of the log.

    ``phase`` counts from 1. ``loss`` is the mean training loss of all workers since the last line,
    ``lowest_loss`` and ``highest_loss`` those of the workers ``lowest_rank`` and ``highest_rank``,
    ``loss_std`` the standard deviation over the workers; ``validation`` the whole model's loss
    where it was measured since then; all in nats per token. ``memory_now`` and ``memory_peak``
    (bytes) are the least and the most of all ranks. ``eta`` is in seconds, to the end;
    ``to_validation`` to the next one, None where there is none.
    """

    step: int
    total_steps: int
    phase: int
    loss: float
    lowest_loss: float
    lowest_rank: int
    highest_loss: float
    highest_rank: int
    loss_std: float
    validation: float | None
    lr: float
    grad_norm: float
    skipped: int
    tokens_per_second: float
    memory_now: tuple[int, int]
    memory_peak: tuple[int, int]
    to_validation: float | None
    eta: float

    def monitored(self) -> dict[str, float]:
        """What monitors get, by name; memory in bytes."""
        names = ("loss", "lowest_loss", "highest_loss", "lr", "grad_norm", "tokens_per_second")
        values = {f"train/{name}": float(getattr(self, name)) for name in names}
        return values | {"train/memory_peak": float(self.memory_peak[1])}


_COLUMNS = (
    ("step", 15),
    ("loss", 8),
    ("spread", 9),
    ("val loss", 8),
    ("lr", 8),
    ("grad norm", 9),
    ("tokens/s", 9),
    ("GiB peak", 8),
    ("to val", 8),
    ("left", 9),
)
_SPREAD_WIDTH = dict(_COLUMNS)["spread"]


def header() -> str:
    """The names of the columns.

    The spread is from the lowest to the highest mean loss of the ranks, of which it names the one
    with the highest; the peak is that of the rank that needs most.
    """
    return " ".join(name.rjust(width) for name, width in _COLUMNS)


def format_line(line: LogLine) -> str:
    """One line under :func:`header`."""
    cells = (
        f"{line.step}/{line.total_steps}",
        f"{line.loss:.4f}",
        _spread(line),
        "" if line.validation is None else f"{line.validation:.4f}",
        f"{line.lr:.2e}",
        f"{line.grad_norm:.3f}",
        f"{line.tokens_per_second:,.0f}",
        _gib(line.memory_peak[1]),
        "" if line.to_validation is None else duration(line.to_validation),
        duration(line.eta),
    )
    text = " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return text + (f"  skipped {line.skipped}" if line.skipped else "")


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    if sys.stdout.isatty():
        tqdm.write(text, file=sys.stdout)
    else:
        print(text, flush=True)


class ProgressBar:
    """A bar under the lines, with the steps, the last loss and what comes when.

    Only where standard output is a terminal and on the rank that speaks: a file gets no control
    characters.
    """

    def __init__(self, total_steps: int, step: int, *, is_speaking: bool) -> None:
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            file=sys.stdout,
            # None: unless it is a terminal.
            disable=None if is_speaking else True,
            dynamic_ncols=True,
            leave=False,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}%{postfix}",
        )

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def show(self, line: LogLine) -> None:
        """Put the last line's numbers beside the bar."""
        parts = [f"loss {line.loss:.4f}", f"{duration(line.eta)} left"]
        if line.to_validation is not None:
            parts.append(f"validation in {duration(line.to_validation)}")
        self._bar.set_postfix_str(", ".join(parts))

    def close(self) -> None:
        """Remove it from the terminal."""
        self._bar.close()


def _spread(line: LogLine) -> str:
    """The difference and the rank in as many digits as the column holds."""
    if line.lowest_rank == line.highest_rank:
        return ""  # one rank, or all equal
    texts = [f"{line.highest_loss - line.lowest_loss:.{d}f} r{line.highest_rank}" for d in range(4)]
    return next((text for text in reversed(texts) if len(text) <= _SPREAD_WIDTH), texts[0])


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:.{1 if gib >= 99.995 else 2}f}"
