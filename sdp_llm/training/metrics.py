"""Numbers of all ranks: reduced on log steps only, so that no other step waits for them."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from sdp_llm.training.environment import device_type
from sdp_llm.world import all_gather


@dataclass(frozen=True)
class Reduced:
    """The steps since the last call, over all ranks.

    ``loss`` is the mean loss (nats per token); ``lowest_loss`` and ``highest_loss`` are those of
    the workers ``lowest_rank`` and ``highest_rank``, whose mean is lowest and highest, and
    ``loss_std`` the standard deviation over the workers: subnetworks differ. Memory is bytes, least
    and most of all ranks; ``seconds`` is the time spent in steps.
    """

    loss: float
    lowest_loss: float
    lowest_rank: int
    highest_loss: float
    highest_rank: int
    loss_std: float
    memory_now: tuple[int, int]
    memory_peak: tuple[int, int]
    steps: int
    seconds: float


class Meter:
    """Collects the losses of this process's workers until they are asked for."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._steps = 0
        self._seconds = 0.0
        self._started = time.perf_counter()
        self.last_step_seconds = 0.0

    def start(self) -> None:
        """A stretch of steps begins; what happened since :meth:`pause` does not count."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """The stretch of steps is over for now."""
        self.last_step_seconds = time.perf_counter() - self._started
        self._seconds += self.last_step_seconds

    def add(self, losses: Tensor) -> None:
        """Note the losses (1-D, one per worker of this process) of a step."""
        self._total = losses.double() if self._total is None else self._total + losses.double()
        self._steps += 1

    def reduce(self) -> Reduced:
        """Reduce over all ranks and start anew. Collective where torch.distributed runs."""
        assert self._total is not None
        now, peak = memory()
        means = self._total / self._steps
        sizes = torch.tensor([now, peak], dtype=torch.float64, device=means.device)
        rows = all_gather(torch.cat([means, sizes]), "losses of the log line")
        losses, memories = rows[:, :-2].flatten(), rows[:, -2:]
        lowest, highest = int(losses.argmin()), int(losses.argmax())
        low, high = memories.min(0).values.tolist(), memories.max(0).values.tolist()
        result = Reduced(
            losses.mean().item(),
            losses[lowest].item(),
            lowest,
            losses[highest].item(),
            highest,
            losses.std(correction=0).item(),
            (int(low[0]), int(high[0])),
            (int(low[1]), int(high[1])),
            self._steps,
            self._seconds,
        )
        self._total, self._steps, self._seconds = None, 0, 0.0
        return result


def memory() -> tuple[int, int]:
    """Bytes now and at the peak: of the GPU's allocator, or this process's resident memory."""
    if device_type() == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    now = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return now, max(now, peak)  # Linux keeps the peak with less precision
