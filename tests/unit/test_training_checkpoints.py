"""Which checkpoints of a run stay, and whether they fit."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError, TrainingStopped, UnnamedCheckpoint
from sdp_llm.training.checkpoints import (
    check_space,
    checkpoint_bytes,
    clear_rubbish,
    remove,
    set_aside,
    steps_in,
    steps_to_remove,
)
from sdp_llm.training.position import Position
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.saver import Saver
from sdp_llm.training.status import Status, read_status
from tests.unit.test_training_run_folder import SCHEDULE, run_at


def folder_with(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "checkpoints"
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("steps", "last", "every", "removed"),
    [
        ([], 1, 0, []),
        ([10], 1, 0, []),
        ([10, 20, 30], 1, 0, [10, 20]),
        ([30, 10, 20], 2, 0, [10]),
        ([10, 20, 30, 40], 1, 20, [10, 30]),
        ([10, 20, 30, 40, 50], 2, 20, [10, 30]),
        ([10, 20], 5, 0, []),
    ],
)
def test_which_go(steps: list[int], last: int, every: int, removed: list[int]) -> None:
    assert steps_to_remove(steps, last, every) == removed


def test_only_complete_names_count(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "step-9", "step-10", ".step-11.partial", "step-12.set-aside")
    assert steps_in(folder) == [9, 10]
    assert steps_in(tmp_path / "none") == []
    remove(folder, [9])
    assert names(folder) == {"step-10", ".step-11.partial", "step-12.set-aside"}
    assert set_aside(folder, 9) == ["step-10.set-aside"]
    assert set_aside(folder, 9) == []
    assert not (folder / "latest").exists()
    (folder / ".latest.7.partial").touch()
    clear_rubbish(folder)
    assert names(folder) == {"step-10.set-aside", "step-12.set-aside"}


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "step-3", "step-3.set-aside")
    assert set_aside(folder, 2) == ["step-3.set-aside-2"]
    folder_with(tmp_path, "step-3")
    assert set_aside(folder, 2) == ["step-3.set-aside-3"]
    assert len(names(folder)) == 3
    assert steps_in(folder) == []


def test_what_was_replaced_is_rubbish_once_another_has_its_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "step-1", ".step-1.replaced", ".step-2.replaced")
    (folder / "step-1" / "new").touch()
    clear_rubbish(folder)
    assert names(folder) == {"step-1", "step-2"}
    assert (folder / "step-1" / "new").exists()


def test_the_latest_is_one_that_was_not_set_aside(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "step-9", "step-10", "step-11")
    (folder / "latest").write_text("step-11")
    set_aside(folder, 10)
    assert find_checkpoint(folder) == folder / "step-10"
    set_aside(folder, 10)
    assert find_checkpoint(folder) == folder / "step-10"
    set_aside(folder, 0)
    assert find_checkpoint(folder) == folder


SPACE = [
    # save_interval, keep_last, keep_every, step, steps, there: checkpoints that must still fit
    (10, 2, 0, 0, 100, [], 3),  # one more while the next is written
    (10, 2, 0, 50, 100, [40, 50], 1),  # beside those two
    (10, 2, 20, 0, 100, [], 7),  # 20, 40, ..., 100 and 90, and one more
    (10, 5, 0, 0, 20, [], 2),  # never more than there are
    (10, 5, 0, 0, 25, [], 3),
    (0, 2, 0, 0, 100, [], 1),  # where it is stopped
    (10, 2, 0, 100, 100, [90, 100], 0),
]


@pytest.mark.parametrize(("interval", "last", "every", "step", "steps", "there", "count"), SPACE)
def test_the_disk_must_hold_what_is_to_come(
    interval: int,
    last: int,
    every: int,
    step: int,
    steps: int,
    there: list[int],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folder_with(tmp_path, *(f"step-{n}" for n in there))
    training = {"save_interval": interval, "keep_last": last, "keep_every": every}
    run = parse_config({"training": training})
    usage = namedtuple("usage", "free")
    size = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(count * size))
    check_space(run, folder, size, step, steps)
    if count == 0:
        return
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(count * size - 1))
    with pytest.raises(ConfigError) as caught:
        check_space(run, folder, size, step, steps)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"training.keep_last = {last}, training.keep_every = {every}: ")
    assert f"{count} more checkpoints of 1.0 GB need {count}.0 GB, but " in message
    assert "make room, keep fewer" in message


@pytest.mark.parametrize(("optimizer", "size"), [("AdamW", 12), ("Adagrad", 8)])
def test_the_size_is_that_of_masters_and_moments(optimizer: str, size: int) -> None:
    run = parse_config({"optimizer": {"type": optimizer, "params": {"lr": 1e-3}}})
    assert checkpoint_bytes(run, 1000) == size * 1000


# -- what is said ---------------------------------------------------------------------------------


class Disk:
    """A backend that only makes folders."""

    rank, world_size = 0, 2

    def __init__(self, fails: bool = False, is_latest_stuck: bool = False) -> None:
        self.fails = fails
        self.is_latest_stuck = is_latest_stuck
        self.state: dict[str, Any] = {}

    def save(self, folder: Path, tag: str, state: dict) -> None:  # type: ignore[type-arg]
        if self.fails:
            raise ConfigError("rank 1: cannot write: full")
        (folder / tag).mkdir(parents=True)
        self.state = state
        if self.is_latest_stuck:
            raise UnnamedCheckpoint("rank 0: latest: cannot be written")


class SlowDisk(Disk):
    """Writes in the background for 40 seconds, as it says."""

    begin_save = Disk.save

    def finish_save(self) -> float:
        return 40.0


def saver(
    tmp_path: Path, disk: Disk, said: list[str], size: int = 0, is_async: bool = False
) -> Saver:
    run = run_at(tmp_path / "run")
    folder = RunFolder(run, SCHEDULE, is_writer=True)
    status = Status(folder.path, 0, 100)
    status.write()
    training = replace(run.training, async_save=is_async)
    return Saver(training, disk, folder, status, said.append, facts={"total_steps": 9}, size=size)


def test_a_long_stop_is_warned_about_once(tmp_path: Path) -> None:
    said: list[str] = []
    # 10 GB by each of two ranks at half a gigabyte per second.
    slow = saver(tmp_path, Disk(), said, size=20 * 10**9)
    slow.warn_if_too_slow(9.0)
    slow.warn_if_too_slow(4.9)
    slow.warn_if_too_slow(4.9)
    assert said == []
    slow.warn_if_too_slow(5.1)
    slow.warn_if_too_slow(5.1)
    [line] = said
    assert line.startswith("warning: a stop takes up to 30 s (two steps of 5.1 s and a save of 20.")
    slow = saver(tmp_path / "other", Disk(), said, size=20 * 10**9)
    slow.save(Position(step=1))  # it was quick
    for _ in range(5):
        slow.warn_if_too_slow(5.1)
    assert sum("warning" in line for line in said) == 1


def test_a_stop_is_expected_to_take_as_long_as_writing(tmp_path: Path) -> None:
    said: list[str] = []
    slow = saver(tmp_path, SlowDisk(), said, is_async=True)
    slow.save(Position(step=1), can_wait=True)
    slow.finish_written(True)
    for _ in range(3):
        slow.warn_if_too_slow(0.5)
    assert "warning: a stop takes up to 41 s (two steps of 0.5 s and a save of 40.0 s)" in said[-1]


def test_a_checkpoint_that_latest_does_not_name_counts(tmp_path: Path) -> None:
    said: list[str] = []
    job = saver(tmp_path, Disk(is_latest_stuck=True), said)
    for step in range(1, 6):
        assert job.save(Position(step=step)) is None
    assert said[0] == "warning: step 1: rank 0: latest: cannot be written"
    assert said[1].startswith("saved ")
    entry = read_status(tmp_path / "run")
    assert (entry["step"], entry["checkpoint"]) == (5, "checkpoints/step-5")
    assert entry["warning"] == "step 5: rank 0: latest: cannot be written"
    kept = parse_config({}).training.keep_last
    assert steps_in(tmp_path / "run" / "checkpoints") == [*range(6 - kept, 6)]
    job.save_and_stop(Position(step=5), 9)
    assert said[-1].startswith("stopped at step 5 of 9")


def test_a_checkpoint_has_the_position_and_the_facts(tmp_path: Path) -> None:
    disk = Disk()
    saver(tmp_path, disk, []).save(Position(step=7))
    assert disk.state == {"trainer": asdict(Position(step=7)), "total_steps": 9}


def test_saves_that_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = saver(tmp_path, Disk(), [])
    assert [step for step in (1, 999, 1000, 2000) if job.is_due(step, False)] == [1000, 2000]
    assert job.is_due(7, True)
    job.save(Position(step=7))
    assert not job.is_due(7, True)


def test_a_save_that_fails_is_a_warning_or_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    disk = Disk(fails=True)
    job = saver(tmp_path, disk, said)
    assert job.save(Position(step=3)) == "rank 1: cannot write: full"
    assert said == ["warning: step 3: no checkpoint: rank 1: cannot write: full"]
    with pytest.raises(TrainingStopped, match="step 3: asked to stop, but cannot save: rank 1"):
        job.save_and_stop(Position(step=3), 9)
    disk.fails = False
    job.save_and_stop(Position(step=4), 9)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoints/step-4")


def test_old_checkpoints_that_stay_are_a_warning_only(tmp_path: Path) -> None:
    said: list[str] = []
    job = saver(tmp_path, Disk(), said)
    for step in (1, 2):
        job.save(Position(step=step))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-1.removed").touch()  # in the way
    said.clear()
    assert job.save(Position(step=3)) is None
    saved, warning = said
    assert saved.startswith(f"saved {checkpoints / 'step-3'} in ")
    rule = "step 3: saved, but older checkpoints cannot be removed: rank 0: "
    assert warning.startswith(f"warning: {rule}")
    assert str(checkpoints / "step-1") in warning
    assert warning.endswith("; mend that before the disk is full: each save tries again")
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 3
    status = read_status(tmp_path / "run")
    assert (status["step"], status["checkpoint"]) == (3, "checkpoints/step-3")
    assert status["warning"].startswith(rule)
    job.save_and_stop(Position(step=4), 9)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["checkpoint"]) == ("preempted", "checkpoints/step-4")
    (checkpoints / ".step-1.removed").unlink()
    job.save(Position(step=5))
    assert names(checkpoints) == {"step-4", "step-5"}


def test_the_first_failure_is_the_reason(tmp_path: Path) -> None:
    Status(tmp_path, 0, 9).write(step=2)
    Status(tmp_path, 3, 9).fail("step 2: x")
    Status(tmp_path, 1, 9).fail("step 2: connection lost")
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("failed", "rank 3: step 2: x")
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) == {}


def test_a_status_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Status(tmp_path / "nowhere", 0, 9).write(step=1)
    assert "status.json: cannot write: " in capsys.readouterr().out


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdp_llm.training import run_folder

    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.1)
    first = RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
    with pytest.raises(ConfigError, match="another process trains in this folder"):
        RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
    del first
    RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
