"""The folder of one run: what it was started with, what it measured and what it saved."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from sdp_llm.agree import agree
from sdp_llm.config import RunConfig, to_dict
from sdp_llm.errors import ConfigError
from sdp_llm.files import append_text, replace_text
from sdp_llm.plan import Schedule
from sdp_llm.training.checkpoints import clear_rubbish, set_aside, steps_in
from sdp_llm.training.prediction import Prediction
from sdp_llm.training.status import UNFINISHED, read_status
from sdp_llm.versions import versions

METRICS = "metrics.jsonl"
CONFIG, PLAN, ENVIRONMENT = "config.json", "plan.json", "environment.json"
# A killed run's last helpers hold the folder for a few seconds more.
PATIENCE_S = 10.0


class RunFolder:
    """Takes the folder for this process's run and writes into it, on rank 0 only.

    - ``config.json``: the resolved run config, which starts the same run again
    - ``plan.json``: the steps of every phase, and the owner set of every block in it
    - ``environment.json``: versions, commit, command line, world size
    - ``prediction.json``: parameters, memory, traffic and FLOPs of every rank, where they are known
    - ``metrics.jsonl``: one object per log line, validation and checkpoint
    - ``checkpoints/step-N``

    Collective: all ranks raise when rank 0 cannot take it. :meth:`begin` writes the first four.

    ``continued_by`` says which command continues the run.

    :param resume: "none": the folder must not hold a run; "auto": it may, to be continued; a path:
        it may if the path is inside, or nothing was saved yet.
    :raises ConfigError: when it holds a run or files of the same names that are no run's, another
        process writes into it, or it is not writable.
    """

    def __init__(
        self, run: RunConfig, schedule: Schedule, is_writer: bool, resume: str = "none"
    ) -> None:
        assert run.training.run_dir is not None
        self.path = Path(run.training.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self._run = run
        self._schedule = schedule
        self._is_writer = is_writer
        self._metrics = self.path / METRICS
        self.continued_by = "the same command" + " without --resume" * (resume != "auto")
        self._write_together(lambda: self._take(resume))

    def begin(self, step: int = 0, prediction: Prediction | ConfigError | None = None) -> list[str]:
        """Write what the run is started with, and forget what came after ``step``. Collective.

        :param step: 0 also where it begins from a checkpoint of another folder: what this one has
            is of another run then.
        :param prediction: written where it is one.
        :returns: lines that say what was forgotten, on rank 0.
        """
        forgotten: list[str] = []
        self._write_together(lambda: forgotten.extend(self._begin(step)))
        if isinstance(prediction, Prediction):
            content = prediction.as_dict()
            self._write_together(lambda: self._write("prediction.json", content))
        return forgotten

    def log(self, values: dict[str, Any]) -> None:
        """Append one object to the metrics, with the time (seconds since 1970)."""
        if not self._is_writer:
            return
        line = json.dumps({**values, "time": round(time.time(), 3)}) + "\n"
        try:
            append_text(self._metrics, line)
        except OSError as error:
            # A full disk must not end a run that it does not hurt otherwise.
            print(f"warning: {self._metrics}: cannot write: {error}; make room", flush=True)

    @property
    def _key(self) -> str:
        return f"training.run_dir = {json.dumps(str(self.path))}"

    def _write_together(self, action: Any) -> None:
        def on_the_writer() -> None:
            if not self._is_writer:
                return
            try:
                action()
            except OSError as error:
                raise ConfigError(
                    f"{self._key}: cannot write: {error}; name a folder that can be created"
                ) from error

        agree(on_the_writer)

    def _take(self, resume: str) -> None:
        if self._metrics.exists() and not self._may_continue(resume):
            advice = "" if resume in ("auto", "none") else " (without --resume it is continued)"
            raise ConfigError(
                f"{self._key}: holds a run already; choose another folder, or remove it{advice}"
            )
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        clear_rubbish(self.path)
        clear_rubbish(self.checkpoints)

    def _may_continue(self, resume: str) -> bool:
        if resume == "none":
            return False
        # Without a checkpoint it starts again; one that finished is worth something.
        is_unfinished = read_status(self.path).get("state") in UNFINISHED
        has_saved = bool(steps_in(self.checkpoints))
        if resume == "auto":
            return has_saved or is_unfinished
        # That a path is not there is another error, which comes when its checkpoint is read.
        path = Path(resume)
        is_inside = path.resolve().is_relative_to(self.path.resolve())
        return is_inside or not path.exists() or (is_unfinished and not has_saved)

    def _refuse_foreign(self) -> None:
        """A run begins with its metrics: without them these files are of something else."""
        if self._metrics.exists() or steps_in(self.checkpoints):
            return
        for name in (CONFIG, PLAN, ENVIRONMENT):
            if (self.path / name).is_file():
                raise ConfigError(
                    f"{self._key}: has a {name} and no {METRICS}, so that it is no run's; choose "
                    "a folder of its own for the run"
                )

    def _lock(self) -> None:
        """Keep other processes out as long as this object lives."""
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"{self._key}: another process trains in this folder; wait until it has "
                        "ended, or choose another folder"
                    ) from None
                time.sleep(0.2)
            except OSError:
                return  # a file system without locks
            else:
                return

    def _begin(self, step: int) -> list[str]:
        forgotten = [f"{name}: of steps that are done again" for name in self._set_aside(step)]
        kept, dropped = [], 0
        if self._metrics.exists():
            # What a crash left of a line may not even be text.
            for line in self._metrics.read_text("utf-8", errors="replace").splitlines():
                if _step_of(line) <= step and step > 0:
                    kept.append(line + "\n")
                else:
                    dropped += 1
        if dropped:
            forgotten.append(f"{METRICS}: {dropped} lines of steps that are done again removed")
        replace_text(self._metrics, "".join(kept))
        self._write(CONFIG, to_dict(self._run))
        self._write(PLAN, _phases(self._schedule))
        self._write(ENVIRONMENT, _environment(self._schedule.world_size))
        return forgotten

    def _set_aside(self, step: int) -> list[str]:
        return set_aside(self.checkpoints, step) if self.checkpoints.is_dir() else []

    def _write(self, name: str, content: Any) -> None:
        replace_text(self.path / name, json.dumps(content, indent=2) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics; of one that a crash cut off, later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _phases(schedule: Schedule) -> dict[str, Any]:
    """Each phase from step ``start`` up to, not including, ``stop``, before its rotations."""
    phases = [phase.as_dict() for phase in schedule.phases]
    return {"world_size": schedule.world_size, "phases": phases}


def _environment(world_size: int) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "world_size": world_size,
        "packages": versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` for changed files; None outside git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie in another repository, whose commit is not its own.
        git("ls-files", "--error-unmatch", "--", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None
