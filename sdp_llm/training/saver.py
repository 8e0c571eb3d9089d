"""When and how the training loop saves, and what it says about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from sdp_llm.checkpoint.together import agree
from sdp_llm.config import TrainingConfig
from sdp_llm.errors import ConfigError, TrainingStopped
from sdp_llm.training.checkpoints import remove, steps_in, steps_to_remove, tag_of
from sdp_llm.training.position import Position
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.status import PREEMPTED, Status

# Launchers give a rank this long between SIGTERM and SIGKILL.
LAUNCHER_GRACE_S = 30.0
# How fast a rank is taken to write before its first save has shown it.
ASSUMED_BYTES_PER_S = 5e8


class Saving(Protocol):
    """A backend that can save."""

    rank: int
    world_size: int

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write ``folder/tag``. Collective; raises ConfigError on every rank."""
        ...


class Saver:
    """Writes the checkpoints of a run.

    A periodic save that fails is told to the person and the run goes on: the checkpoints before it
    are as they were, and the next one is tried when it is due.

    :param global_batch: samples per step, for who continues with another number.
    :param size: about the bytes of a checkpoint.
    :param saved_step: the step of the checkpoint in this folder that the run continues from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        backend: Saving,
        folder: RunFolder,
        status: Status,
        say: Callable[[str], None],
        *,
        global_batch: int,
        size: int,
        saved_step: int | None = None,
    ) -> None:
        self._config = config
        self._backend = backend
        self._folder = folder
        self._status = status
        self._say = say
        self._global_batch = global_batch
        self._saved_step = saved_step
        self._save_seconds = size / backend.world_size / ASSUMED_BYTES_PER_S
        self._steps_seen = 0
        self._has_warned = False

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether a checkpoint is due after this step."""
        interval = self._config.save_interval
        return interval > 0 and (is_last or step % interval == 0) and step != self._saved_step

    def save(self, position: Position, total_steps: int) -> str | None:
        """Write a checkpoint and remove those that are no longer kept. Collective.

        :returns: why it failed; None when all went well.
        """
        started = time.perf_counter()
        state = {
            "trainer": asdict(position),
            "global_batch": self._global_batch,
            "total_steps": total_steps,
        }
        tag = tag_of(position.step)
        try:
            self._backend.save(self._folder.checkpoints, tag, state)
            self._saved_step = position.step
            agree(self._remove_old)
        except ConfigError as error:
            self._say(f"warning: step {position.step}: no checkpoint: {error}")
            self._status.write(step=position.step, warning=f"step {position.step}: {error}")
            return str(error)
        self._save_seconds = time.perf_counter() - started
        self._say(f"saved {self._folder.checkpoints / tag} in {self._save_seconds:.1f} s")
        self._folder.log({"step": position.step, "checkpoint/seconds": self._save_seconds})
        self._status.write(step=position.step, checkpoint=f"checkpoints/{tag}")
        return None

    def save_and_stop(self, position: Position, total_steps: int) -> None:
        """Save what is not saved yet, because the run was asked to stop. Collective.

        :raises TrainingStopped: on every rank, when that fails.
        """
        if position.step not in (0, self._saved_step):
            reason = self.save(position, total_steps)
            if reason is not None:
                raise TrainingStopped(
                    f"step {position.step}: asked to stop, but cannot save: {reason}; it goes on "
                    "from the checkpoint before"
                )
        self._status.write(state=PREEMPTED, step=position.step)
        self._say(
            f"stopped at step {position.step} of {total_steps}, as asked by a signal; the same "
            "command goes on from here"
        )

    def warn_if_too_slow(self, step_seconds: float) -> None:
        """Say once when a stop may take longer than a launcher waits.

        Looked at from the third step on, when the first one's preparations are over.
        """
        self._steps_seen += 1
        # A signal that just misses a step's agreement is seen in the next one.
        longest = 2 * step_seconds + self._save_seconds
        if self._has_warned or self._steps_seen < 3 or longest <= LAUNCHER_GRACE_S:
            return
        self._has_warned = True
        self._say(
            f"warning: a stop takes up to {longest:.0f} s (two steps of {step_seconds:.1f} s and a "
            f"save of {self._save_seconds:.1f} s), but launchers kill a rank {LAUNCHER_GRACE_S:.0f}"
            " s after SIGTERM: send SIGUSR1 to a rank earlier, as in the README, or lower "
            "training.save_interval"
        )

    def _remove_old(self) -> None:
        if self._backend.rank == 0:
            folder, config = self._folder.checkpoints, self._config
            old = steps_to_remove(steps_in(folder), config.keep_last, config.keep_every)
            remove(folder, old)
