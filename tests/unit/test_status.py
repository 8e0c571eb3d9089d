"""What the status file says, also when nobody had the time to write it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sdp_llm.activity import ACTIVITY
from sdp_llm.processes import this_process, was_killed
from sdp_llm.training.status import (
    FAILED,
    FINISHED,
    RUNNING,
    Status,
    describe_status,
    read_status,
)

GONE = replace(this_process(), pid=2**22 + 7)


def test_a_run_that_runs(tmp_path: Path) -> None:
    status = Status(tmp_path, 0, 20)
    status.write(state=RUNNING, step=5)
    said = read_status(tmp_path)
    assert not was_killed(said)
    assert describe_status(said) == (
        f"running, step 5 of 20 (pid {this_process().pid} on {this_process().host})"
    )
    status.write(state=FINISHED, step=20)
    assert describe_status(read_status(tmp_path)) == "finished, step 20 of 20"


def test_a_failure_has_its_reason_and_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ACTIVITY, "step", 6)
    Status(tmp_path, 0, 20).write(state=RUNNING, step=5)
    Status(tmp_path, 3, 20).fail("step 7: no")
    assert read_status(tmp_path)["state"] == FAILED
    assert describe_status(read_status(tmp_path)) == "failed, step 6 of 20: rank 3: step 7: no"


@pytest.mark.parametrize(
    ("changes", "is_killed"),
    [
        ({}, True),
        ({"state": FINISHED}, False),
        ({"machine": "another"}, False),  # who knows
        ({"started": None}, False),
    ],
)
def test_a_run_that_was_killed(changes: dict[str, object], is_killed: bool) -> None:
    said = {"state": RUNNING, "step": 5, "total_steps": 20, **asdict(GONE), **changes}
    assert was_killed(said) == is_killed
    is_said = describe_status(said).startswith("killed at step 5 or later (pid ")
    assert is_said == is_killed


def test_no_status() -> None:
    assert describe_status({}) == ""
    assert not was_killed({})
