"""The device's memory is exhausted: one line that says what needs it and what would need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdp_llm.activity import ACTIVITY
from sdp_llm.config import RunConfig
from sdp_llm.errors import TrainingStopped
from sdp_llm.plan.tables import number, unit_for
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.prediction import Prediction, predict


@contextmanager
def out_of_memory_explained(run: RunConfig, inputs: Inputs, rank: int) -> Iterator[None]:
    """Within, what the allocator of a device cannot give ends training with one line.

    :raises TrainingStopped: for ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(_line(error, run, inputs, rank, ACTIVITY.step)) from error


def _line(
    error: torch.OutOfMemoryError, run: RunConfig, inputs: Inputs, rank: int, step: int
) -> str:
    said = str(error).split("\n")[0].split(". GPU ")[0].rstrip(".")
    needed = "what this model needs is not known"
    prediction = predict(run, inputs)
    if isinstance(prediction, Prediction):
        memory = prediction.memory(rank, step)
        unit, divisor = unit_for(memory.total)
        parts = (memory.total, memory.model_state, memory.transient, memory.activations)
        total, state, transient, activations = (number(size / divisor) for size in parts)
        needed = (
            f"predicted are {total} {unit}: model state {state}, transient {transient}, "
            f"activations {activations}"
        )
    return f"step {step + 1}: out of memory ({said}); {needed}; {_advice(run, inputs)}"


def _advice(run: RunConfig, inputs: Inputs) -> str:
    """What would need less, first what costs least."""
    possible = []
    if run.training.loss_chunk is None:
        possible.append("training.loss_chunk = 1024")
    if run.zero_optimization.stage < 2:
        possible.append("zero_optimization.stage = 2")
    if inputs.batch.micro_batch > 1:
        possible.append(f"train_micro_batch_size_per_gpu < {inputs.batch.micro_batch}")
    if run.model is not None and not run.model.gradient_checkpointing:
        possible.append("model.gradient_checkpointing = true")
    possible.append("a lower sdp.coverage")
    return f"what needs less, first what costs least: {', '.join(possible)}"
