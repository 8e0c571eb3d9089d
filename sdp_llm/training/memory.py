"""Predicted and measured memory side by side, once, when the first steps are over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdp_llm.engine import SDPEngine
from sdp_llm.plan.tables import number, table, unit_for
from sdp_llm.training.environment import device_type
from sdp_llm.training.metrics import memory
from sdp_llm.training.prediction import Prediction
from sdp_llm.world import all_gather

# The optimizer makes its moments in the first step; the second is the first to need all memory.
STEPS = 2
TOLERANCE = 0.1  # of what is predicted
STATE = ("weights", "gradients", "optimizer")
PEAK = "peak"


@dataclass(frozen=True)
class Compared:
    """One rank: bytes by name of a part, ``STATE`` and on CUDA ``PEAK``."""

    rank: int
    predicted: dict[str, float]
    measured: dict[str, float]

    @property
    def state(self) -> tuple[float, float]:
        """Model state, predicted and measured."""
        return sum(self.predicted[n] for n in STATE), sum(self.measured[n] for n in STATE)

    @property
    def difference(self) -> float:
        """How far the model state or the peak is off, as a share of what is predicted."""
        pairs = [self.state]
        if PEAK in self.predicted:
            pairs.append((self.predicted[PEAK], self.measured[PEAK]))
        return max(abs(measured / predicted - 1) for predicted, measured in pairs)


class MemoryCheck:
    """Compares once, and says what it finds. Does nothing where nothing is predicted.

    Model state is what the tensors of weights, gradients, masters and moments take. The peak is
    the allocator's on CUDA. On the CPU there is none: what a process has resident holds Python and
    its libraries, so that activations and buffers cannot be told from them.

    :param state_bytes: the bytes of each of ``STATE`` that this rank holds.
    :param log: appends to the run's metrics.
    """

    def __init__(
        self,
        prediction: Prediction,
        rank: int,
        state_bytes: Callable[[], dict[str, int]],
        say: Callable[[str], None],
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._prediction = prediction
        self._rank = rank
        self._state_bytes = state_bytes
        self._say = say
        self._log = log
        self._steps: list[int] = []

    def after(self, step: int, is_skipped: bool) -> None:
        """Step number ``step``, from 1, is over. Collective when it is the one to compare at."""
        # The optimizer made no moments in a step that was skipped.
        if is_skipped or len(self._steps) == STEPS:
            return
        self._steps.append(step)
        if len(self._steps) == STEPS:
            self._compare(step)

    def _compare(self, step: int) -> None:
        # Where the plan has just changed, model state is the new plan's, and the peak the most of
        # all plans so far.
        coming = self._prediction.memory(self._rank, step)
        predicted = {name: getattr(coming, name) for name in STATE}
        measured = dict(self._state_bytes())
        if device_type() == "cuda":
            past = [self._prediction.memory(self._rank, before - 1) for before in self._steps]
            predicted[PEAK] = max(cost.total for cost in (coming, *past))
            measured[PEAK] = memory()[1]
        values = [*predicted.values(), *(measured[name] for name in predicted)]
        own = torch.tensor(values, dtype=torch.float64, device=device_type())
        rows = all_gather(own, "memory of all ranks").tolist()
        half = len(predicted)
        ranks = [
            Compared(
                rank,
                dict(zip(predicted, row[:half], strict=True)),
                dict(zip(predicted, row[half:], strict=True)),
            )
            for rank, row in enumerate(rows)
        ]
        worst = max(ranks, key=lambda compared: compared.difference)
        for line in report(worst, step):
            self._say(line)
        self._log(
            {
                "step": step,
                "memory/rank": worst.rank,
                "memory/predicted": worst.predicted,
                "memory/measured": worst.measured,
            }
        )


def report(worst: Compared, step: int) -> list[str]:
    """The table of the rank that is furthest off, and a warning where that is too far."""
    predicted, measured = worst.state
    pairs = {name: (worst.predicted[name], worst.measured[name]) for name in STATE}
    pairs["model state"] = worst.state
    if PEAK in worst.predicted:
        pairs["peak of the allocator"] = (worst.predicted[PEAK], worst.measured[PEAK])
    unit, divisor = unit_for(max(max(pair) for pair in pairs.values()))
    rows = [
        (name, [number(p / divisor), number(m / divisor), f"{m / p:.3f}" if p else "-"])
        for name, (p, m) in pairs.items()
    ]
    title = f"memory after step {step}, {unit}"
    lines = [*table(title, ["predicted", "measured", "ratio"], rows).splitlines()]
    note = f"of rank {worst.rank}, the furthest off"
    if PEAK not in worst.predicted:
        note += "; activations and buffers cannot be measured on the CPU"
    lines += [note, ""]
    for name, (predicted, measured) in list(pairs.items())[len(STATE) :]:
        if abs(measured - predicted) > TOLERANCE * predicted:
            found, expected = (f"{number(size / divisor)} {unit}" for size in (measured, predicted))
            lines.append(
                f"warning: {name} of rank {worst.rank}: {found} instead of {expected} "
                f"({measured / predicted - 1:+.0%}); sdp.memory_limit_gib goes by what is predicted"
            )
    return lines


def model_state_bytes(engine: SDPEngine) -> dict[str, int]:
    """The bytes of the storages that hold this rank's weights, gradients, masters and moments.

    A storage that is several of them counts for the first: fp32 masters are views of the weights.
    """
    units = engine.sharded.units
    owned = [unit for unit in units if unit.is_owner]
    state = engine.basic_optimizer.state.values()
    moments = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
    members = {
        "weights": [unit.flat for unit in units],
        "gradients": [unit.grad for unit in owned],
        "optimizer": [*(unit.master for unit in owned), *moments],
    }
    seen: set[int] = set()
    found = dict.fromkeys(STATE, 0)
    for name, tensors in members.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[name] += storage.nbytes()
    return found
