"""The status file of a run folder: what became of the run, whatever its launcher says."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdp_llm.activity import ACTIVITY
from sdp_llm.files import replace_text
from sdp_llm.processes import this_process, was_killed

STATUS = "status.json"
RUNNING, FINISHED, PREEMPTED, FAILED = "running", "finished", "preempted", "failed"
UNFINISHED = (RUNNING, PREEMPTED, FAILED)


def read_status(run_dir: Path) -> dict[str, Any]:
    """What the status file says; nothing where there is none that can be read."""
    try:
        content = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def describe_status(status: Mapping[str, Any]) -> str:
    """What became of a run, in a line; "" where there is no status."""
    if "state" not in status:
        return ""
    where = f"pid {status.get('pid')} on {status.get('host')}"
    if was_killed(status):
        return f"killed at step {status.get('step')} or later ({where} is gone)"
    text = f"{status['state']}, step {status.get('step')} of {status.get('total_steps')}"
    if status["state"] == FAILED:
        return f"{text}: {status.get('reason')}"
    return f"{text} ({where})" if status["state"] == RUNNING else text


class Status:
    """Writes ``status.json``: ``state`` is running, finished, preempted or failed.

    Beside it stand ``step`` (at the last save, or where it ended) and ``total_steps``,
    ``checkpoint`` (the newest complete one, relative to the run folder, or null), ``began_from``
    (the checkpoint of another folder that the run was begun from, or null), ``reason`` of a
    failure, ``warning`` (the last save, or removal of old checkpoints, that failed), ``host`` and
    ``pid`` of the process that wrote it, with ``machine`` and ``started`` that tell it from a later
    one of the same number, and ``time`` (seconds since 1970). A run that says "running" without a
    process was killed without a chance to say more.
    """

    def __init__(
        self, run_dir: Path, rank: int, total_steps: int, began_from: str | None = None
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._content: dict[str, Any] = {
            "state": RUNNING,
            "step": 0,
            "total_steps": total_steps,
            "checkpoint": None,
            "began_from": began_from,
        }

    def write(self, **changes: Any) -> None:
        """Change entries and write the file, on rank 0."""
        self._content |= changes
        if self._rank == 0:
            self._replace()

    def fail(self, reason: str) -> None:
        """Say why the run ends; the first rank to say so is the one that counts."""
        if read_status(self._run_dir).get("state") == RUNNING:
            said = {"step": ACTIVITY.step, "reason": f"rank {self._rank}: {reason}"}
            self._content |= {"state": FAILED} | said
            self._replace()

    def _replace(self) -> None:
        who = asdict(this_process()) | {"time": round(time.time(), 3)}
        text = json.dumps(self._content | who, indent=2) + "\n"
        try:
            replace_text(self._run_dir / STATUS, text)
        except OSError as error:
            # A full disk must not end a run that it does not hurt otherwise.
            print(f"{self._run_dir / STATUS}: cannot write: {error}", flush=True)
