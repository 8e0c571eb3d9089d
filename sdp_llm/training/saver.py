"""When and how the training loop saves, and what it says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sdp_llm.activity import ACTIVITY, SAVE
from sdp_llm.agree import agree
from sdp_llm.config import TrainingConfig
from sdp_llm.errors import ConfigError, TrainingStopped, UnnamedCheckpoint
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

    def begin_save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Begin to write ``folder/tag`` in the background. Collective, raises likewise."""
        ...

    def finish_save(self) -> float:
        """End what :meth:`begin_save` began. Collective, raises likewise.

        :returns: the seconds in which this rank wrote.
        """
        ...


@dataclass(frozen=True)
class _Pending:
    """A save in the background: after which step, since when, and how long training waited."""

    step: int
    started: float
    stalled: float


class Saver:
    """Writes the checkpoints of a run.

    A periodic save that fails is told to the person and the run goes on: the checkpoints before it
    are as they were, and the next one is tried when it is due.

    :param facts: stored, so that a resume can say what is other than before.
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
        facts: Mapping[str, Any],
        size: int,
        saved_step: int | None = None,
    ) -> None:
        self._config = config
        self._backend = backend
        self._folder = folder
        self._status = status
        self._say = say
        self._facts = facts
        self._saved_step = saved_step
        self._pending: _Pending | None = None
        self._save_seconds = size / backend.world_size / ASSUMED_BYTES_PER_S
        self._steps_seen = 0
        self._has_warned = False
        self._is_owed = False

    def is_due(self, step: int, is_last: bool, was_skipped: bool = False) -> bool:
        """Whether a checkpoint is due after this step; to be asked after each.

        After a step that was skipped none is, and it is owed by the next step that is not: what
        comes before a non-finite step may be bad already, and must not push out a good one.
        """
        interval = self._config.save_interval
        is_due = interval > 0 and (is_last or self._is_owed or step % interval == 0)
        is_due = is_due and step != self._saved_step
        self._is_owed = is_due and was_skipped and not is_last
        return is_due and not self._is_owed

    def save(self, position: Position, *, can_wait: bool = False) -> str | None:
        """Write a checkpoint and remove those that are no longer kept. Collective.

        :param can_wait: with ``training.async_save``, only begin it, for :meth:`finish_written`.
        :returns: why it failed; None when all went well.
        """
        self.finish()
        ACTIVITY.enter(SAVE)
        started = time.perf_counter()
        is_async = can_wait and self._config.async_save
        begin = self._backend.begin_save if is_async else self._backend.save
        state = {"trainer": asdict(position), **self._facts}
        try:
            begin(self._folder.checkpoints, tag_of(position.step), state)
        except UnnamedCheckpoint as error:
            self._warn(position.step, error)
        except ConfigError as error:
            return self._failed(position.step, error)
        stalled = time.perf_counter() - started
        if is_async:
            self._pending = _Pending(position.step, started, stalled)
            return None
        self._save_seconds = stalled
        self._saved(_Pending(position.step, started, stalled))
        return None

    def finish_written(self, is_written: bool) -> None:
        """Give the checkpoint in the background its name, once all ranks have written. Collective.

        :param is_written: the same on all ranks.
        """
        if is_written:
            self._finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, where there is one. Collective."""
        if self._pending is None:
            return
        step, started = self._pending.step, time.perf_counter()
        self._finish()
        waited = time.perf_counter() - started
        self._say(f"waited {waited:.1f} s until the checkpoint of step {step} was written")

    def _finish(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        ACTIVITY.enter(SAVE)
        started = time.perf_counter()
        try:
            self._save_seconds = self._backend.finish_save()
        except UnnamedCheckpoint as error:
            self._warn(pending.step, error)
        except ConfigError as error:
            self._failed(pending.step, error)
            return
        stalled = pending.stalled + time.perf_counter() - started
        self._saved(replace(pending, stalled=stalled))

    def _saved(self, save: _Pending) -> None:
        self._saved_step = save.step
        tag, seconds = tag_of(save.step), time.perf_counter() - save.started
        stall = f", training waited {save.stalled:.1f} s" if self._config.async_save else ""
        self._say(f"saved {self._folder.checkpoints / tag} in {seconds:.1f} s{stall}")
        entry = {"checkpoint/seconds": seconds, "checkpoint/stalled_seconds": save.stalled}
        self._folder.log({"step": save.step, **entry})
        self._status.write(step=save.step, checkpoint=f"checkpoints/{tag}")
        try:
            agree(self._remove_old)
        except ConfigError as error:
            # They take space, but what was just saved is whole.
            self._warn(save.step, f"saved, but older checkpoints cannot be removed: {error}")

    def _failed(self, step: int, error: ConfigError) -> str:
        self._say(f"warning: step {step}: no checkpoint: {error}")
        self._status.write(step=step, warning=f"step {step}: {error}")
        return str(error)

    def _warn(self, step: int, reason: object) -> None:
        """Tell what is wrong about a checkpoint that is there all the same."""
        self._say(f"warning: step {step}: {reason}")
        self._status.write(warning=f"step {step}: {reason}")

    def save_and_stop(self, position: Position, total_steps: int) -> None:
        """Save what is not saved yet, because the run was asked to stop. Collective.

        :raises TrainingStopped: on every rank, when that fails.
        """
        self.finish()
        if position.step not in (0, self._saved_step):
            reason = self.save(position)
            if reason is not None:
                raise TrainingStopped(
                    f"step {position.step}: asked to stop, but cannot save: {reason}; it goes on "
                    "from the checkpoint before"
                )
        self._status.write(state=PREEMPTED, step=position.step)
        self._say(
            f"stopped at step {position.step} of {total_steps}, as asked by a signal; "
            f"{self._folder.continued_by} goes on from here"
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
        if self._backend.rank != 0:
            return
        folder, config = self._folder.checkpoints, self._config
        try:
            old = steps_to_remove(steps_in(folder), config.keep_last, config.keep_every)
            remove(folder, old)
        except OSError as error:
            raise ConfigError(
                f"{error}; mend that before the disk is full: each save tries again"
            ) from error
