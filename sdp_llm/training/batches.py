"""This process's batch of each step, read by the process itself or ahead of it by workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdp_llm.data import TrainingData, batch_for_rank
from sdp_llm.errors import TrainingStopped
from sdp_llm.training.signals import kept_from_children

# Not fork: this process has threads (gloo, OpenMP, CUDA), whose locks a forked child would find
# held for ever. Not spawn: the workers would be children of this process, and torch raises the
# death of a child from a signal handler, in the middle of whatever runs. The server is a fresh
# process without threads; it has the imports, and its workers share their memory.
_CONTEXT = "forkserver"
_PRELOAD = ["torch", "sdp_llm.training.batches"]


@dataclass(frozen=True)
class StepBatches(Dataset[Tensor]):
    """Item ``k`` is what ``rank`` reads in step ``k`` after ``samples_consumed`` samples.

    A function of ``k`` alone, so that the order is the same whoever reads.
    """

    data: TrainingData
    seed: int
    samples_consumed: int
    global_batch: int
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> Tensor:
        """Token ids ``[global_batch / world_size, sequence + 1]``, int64."""
        consumed = self.samples_consumed + step * self.global_batch
        tokens = batch_for_rank(
            self.data, self.seed, consumed, self.global_batch, self.rank, self.world_size
        )
        return torch.from_numpy(tokens)


def read_batches(
    batches: StepBatches, num_steps: int, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Tensor]:
    """The batches of ``num_steps`` steps, in order.

    :param num_workers: processes that read ahead, two batches each; 0: read when asked.
    :param pin_memory: put the batches where a GPU can copy them from while it computes.
    :raises TrainingStopped: a worker failed or was killed; one line that says why.
    """
    context = None
    if num_workers > 0:
        context = multiprocessing.get_context(_CONTEXT)
        context.set_forkserver_preload(_PRELOAD)
    loader = DataLoader(
        batches,
        sampler=range(num_steps),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=context,
        pin_memory=pin_memory,
        # Else it would draw from the generator of the model's dropout.
        generator=torch.Generator(),
    )
    with kept_from_children():
        iterator = iter(loader)
    for step in range(num_steps):
        try:
            tokens = next(iterator)
        except Exception as error:
            if num_workers == 0:
                raise
            raise TrainingStopped(
                f"data.num_workers = {num_workers}: no batch {step + 1}: {_reason(error)}; look "
                "whether the corpora are whole and the machine has memory, or read without workers "
                "(data.num_workers = 0)"
            ) from error
        yield tokens


def _reason(error: Exception) -> str:
    """One line of what torch says about a worker."""
    # Of what a worker raised the last line, for its traceback is above.
    last = str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
    has_raised = str(error).startswith("Caught ")
    # A worker that was killed cannot hand over the batches either that it had read.
    return f"a worker failed with {last}" if has_raised else f"a worker was killed ({last})"
