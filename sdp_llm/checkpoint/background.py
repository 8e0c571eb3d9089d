"""A checkpoint written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sdp_llm.checkpoint.save import CheckpointWriting
from sdp_llm.checkpoint.shared_folder import WrittenFile
from sdp_llm.errors import ConfigError


class Snapshot:
    """A copy of this rank's tensors in host memory, which is kept and used again.

    Pinned where the tensors are on a GPU, so that they are copied at the bus's speed.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copy the tensors; they may change when this returns."""
        taken = dict(tensors)
        # What this rank holds no longer goes first, before there are buffers for other things.
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in taken}
        for key, tensor in taken.items():
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = _in_host_memory(tensor)
            self._buffers[key] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return [(key, self._buffers[key]) for key in taken]


def _in_host_memory(tensor: Tensor) -> Tensor:
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:  # of what may be pinned, nothing is left
        return torch.empty_like(tensor, device="cpu")


class BackgroundSave:
    """Writes a snapshot in a thread of its own, which takes part in no collective.

    ``is_finished`` says whether :meth:`finish` was called.

    :param writing: begun.
    :param wait: returns when no collective of training is under way; NCCL's must not run beside
        those of :meth:`finish`.
    """

    def __init__(
        self,
        writing: CheckpointWriting,
        tensors: list[tuple[str, Tensor]],
        wait: Callable[[], None],
    ) -> None:
        self._writing = writing
        self._wait = wait
        self._files: list[WrittenFile] = []
        self._failure: Exception | None = None
        self._seconds = 0.0
        self.is_finished = False
        self._thread = threading.Thread(target=self._write, args=(tensors,), daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether this rank's part is on the disk, or has failed."""
        return not self._thread.is_alive()

    def finish(self) -> float:
        """Wait for all ranks and give the checkpoint its name. Collective over the world.

        :returns: the seconds in which this rank wrote.
        :raises ConfigError: on every rank, when one could not write.
        """
        self._thread.join()
        self.is_finished = True
        self._wait()
        self._writing.finish(self._outcome)
        return self._seconds

    def _write(self, tensors: list[tuple[str, Tensor]]) -> None:
        started = time.perf_counter()
        try:
            self._files = self._writing.write(tensors)
        except (OSError, ConfigError) as error:
            self._failure = error
        self._seconds = time.perf_counter() - started

    def _outcome(self) -> list[WrittenFile]:
        if self._failure is not None:
            raise self._failure
        return self._files
