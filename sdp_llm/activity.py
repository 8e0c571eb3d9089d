"""What this rank is doing, noted where it happens, for a watchdog that looks from its own thread.

A process is one rank and has one training loop, so there is one record, ``ACTIVITY``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

START, DATA, COMPUTE, REDUCE, OPTIMIZER = "start", "data", "forward/backward", "reduce", "optimizer"
LOG, VALIDATE, SAVE, LOAD, EXPORT, END = "log", "validate", "save", "load", "export", "end"


@dataclass(frozen=True)
class Wait:
    """Waiting for other ranks: for ``what``, from ``owners`` (None: from all ranks)."""

    what: str
    owners: tuple[int, ...] | None = None


class Activity:
    """Phase, step, what is waited for, and a count of beats: signs that the run advances.

    A beat is the end of a step; in a validation a forward pass, in a save, load or export a tensor.
    """

    def __init__(self) -> None:
        self.phase = START
        self.step = 0
        self.steps_ended = 0
        self.beats = 0
        self.wait: Wait | None = None

    def enter(self, phase: str) -> None:
        """Note what begins; ``phase`` is one of this module's."""
        self.phase = phase
        self.wait = None

    def end_step(self, step: int) -> None:
        """Note the end of an optimizer step, the run's ``step``-th. A beat."""
        self.step = step
        self.steps_ended += 1
        self.beats += 1

    def beat(self) -> None:
        """Note that the run advances.

        A helper's beats count only where the loop may be waiting for it: in a save.
        """
        if self.phase == SAVE or threading.current_thread() is threading.main_thread():
            self.beats += 1

    @contextmanager
    def waiting(self, what: str, owners: Sequence[int] | None = None) -> Iterator[None]:
        """Within, this rank waits for others; after an error the note stays, to tell whose it is.

        :param owners: the ranks; None: all.
        """
        before = self.wait
        self.wait = Wait(what, None if owners is None else tuple(owners))
        yield
        self.wait = before


ACTIVITY = Activity()
