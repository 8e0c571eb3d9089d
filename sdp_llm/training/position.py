"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """What the training loop counts; checkpoints carry it.

    ``samples`` (and ``tokens``) consumed say which data come next, at any world size and batch;
    ``skipped`` counts the steps with non-finite gradients, ``skipped_in_a_row`` the last of them;
    ``seconds`` is the time spent in steps, ``flops`` the operations of all ranks, as far as their
    number is known; ``validated`` is the step of the last validation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    validated: int = 0
