"""Ranks that hang, die, fail or never come: the run ends in time and says whose fault it is."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from tests.integration.conftest import Tiny, free_port, script
from tests.integration.test_stopping import Started, ranks, status, steps_logged

RANKS = 4
TIMEOUT_S = 6
# What a run may take beyond the timeout.
MORE_S = 15
FOREVER = 100_000


def command(
    tiny: Tiny, folder: Path, *, entry: str = "launch/pretrain.py", world_size: int = RANKS
) -> list[str | Path]:
    overrides = [f"training.run_dir={folder}", f"training.steps={FOREVER}", "scheduler=null"]
    overrides += ["training.eval_interval=0", "training.eval_samples=4", "training.export=false"]
    overrides += [f"training.step_timeout={TIMEOUT_S}", "training.save_interval=0"]
    launcher = [script("deepspeed"), "--num_accelerators", str(world_size), entry]
    return [*launcher, "--deepspeed_config", tiny.config, "--set", *overrides]


class Watched(Started):
    """A run of which one rank is about to be hurt."""

    started: ClassVar[list[Watched]] = []

    def __init__(self, command: list[str | Path], folder: Path) -> None:
        super().__init__(command, folder)
        self.started.append(self)

    def wait_for_training(self) -> list[psutil.Process]:
        """Until all ranks train; they in order of their ranks."""
        metrics = self.folder / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and len(steps_logged(self.folder)) >= 2, 240)
        return sorted(ranks(self), key=lambda p: int(p.environ()["RANK"]))

    def ends(self, seconds: float) -> str:
        """What it printed, when it ends in time and nothing of it stays."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        started = time.monotonic()
        assert self.end(seconds) != 0
        print(f"ended after {time.monotonic() - started:.1f} s with {self.process.returncode}")
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive
        assert not [*self.folder.glob(".*")]
        assert not [*Path(os.environ["TMPDIR"]).iterdir()]
        shared = {f"torch_{process.pid}_" for process in processes}
        assert not [p for p in Path("/dev/shm").iterdir() if p.name.startswith(tuple(shared))]
        return self.log.read_text()


def said(log: str) -> dict[int, str]:
    """The line by which each rank ended."""
    return {int(rank): line for rank, line in re.findall(r"error: \[rank (\d)\] (.*)", log)}


@pytest.fixture(autouse=True)
def _temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))


@pytest.fixture(autouse=True)
def _no_run_stays() -> Iterator[None]:
    """Whatever a test found: its runs would train for ever."""
    yield
    while Watched.started:
        run = Watched.started.pop()
        if run.process.poll() is None:
            for process in psutil.Process(run.process.pid).children(recursive=True):
                process.kill()
            run.process.kill()


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Watched:
    return Watched(command(tiny, tmp_path / "run"), tmp_path / "run")


def faulty(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, rank: str
) -> Watched:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULTY_RANK", rank)
    return Watched(command(tiny, folder, entry="tests/integration/faulty.py"), folder)


def has_stacks(folder: Path, rank: int) -> bool:
    path = folder / f"stacks-rank-{rank}.txt"
    return path.exists() and f"stacks of rank {rank} " in path.read_text()


def check_stopped(run: Watched, hurt: int) -> str:
    """A rank is stopped; the others name it, end it and end."""
    processes = run.wait_for_training()
    pid = processes[hurt].pid
    processes[hurt].send_signal(signal.SIGSTOP)
    log = run.ends(TIMEOUT_S + MORE_S)
    living = [rank for rank in range(len(processes)) if rank != hurt]
    lines = said(log)
    assert sorted(lines) == living, log
    for rank in living:
        assert f"no step ended within {TIMEOUT_S} s (training.step_timeout): " in lines[rank]
        assert f"rank {hurt} (pid {pid} on " in lines[rank]
        assert "is stopped" in lines[rank]
        assert has_stacks(run.folder, rank)
        assert f"stacks of rank {rank} " in log
    assert status(run.folder)["state"] == "failed"
    assert f"rank {hurt} (pid {pid} on " in status(run.folder)["reason"]
    return log


def test_a_stopped_rank_is_named_and_ended(tiny: Tiny, tmp_path: Path) -> None:
    run = Watched(command(tiny, tmp_path / "run", world_size=2), tmp_path / "run")
    log = check_stopped(run, 1)
    assert len(re.findall("^> +1 .* stopped ", log, re.MULTILINE)) == 1, log
    assert len(re.findall("^ +0 .* running ", log, re.MULTILINE)) == 1, log


@pytest.mark.slow
def test_one_of_four_is_stopped(run: Watched) -> None:
    log = check_stopped(run, 2)
    assert len(re.findall("^> +2 .* stopped ", log, re.MULTILINE)) == 1, log
    assert len(re.findall("^ +[013] .* running ", log, re.MULTILINE)) == 3, log
    assert "exits with return code = 4" in log


@pytest.mark.slow
def test_rank_0_which_keeps_the_store_is_stopped(run: Watched) -> None:
    log = check_stopped(run, 0)
    assert "exits with return code = 4" in log
    assert log.count("the ranks' store does not answer") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [0, 3])
def test_a_killed_rank_is_named(hurt: int, run: Watched) -> None:
    processes = run.wait_for_training()
    pid = processes[hurt].pid
    processes[hurt].kill()
    log = run.ends(TIMEOUT_S + MORE_S)
    lines = said(log)
    assert lines
    assert hurt not in lines
    for line in lines.values():
        assert f"rank {hurt} (pid {pid} on " in line
        assert "is gone, killed or crashed" in line
    reason = status(run.folder)["reason"]
    assert status(run.folder)["state"] == "failed"
    assert f"rank {hurt} (pid {pid} on " in reason


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [0, 1])
def test_a_rank_that_fails_is_named(
    hurt: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = faulty(tiny, tmp_path / "run", monkeypatch, "fail", str(hurt))
    run.wait_for_training()
    log = run.ends(TIMEOUT_S + MORE_S)
    assert log.count("ArithmeticError: the model broke") >= 1
    reason = status(run.folder)["reason"]
    assert "ArithmeticError: the model broke" in reason
    for rank, line in said(log).items():
        assert rank != hurt
        assert f"rank {hurt} failed in forward/backward after step " in line


@pytest.mark.slow
def test_a_rank_without_memory_says_what_needs_less(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = faulty(tiny, tmp_path / "run", monkeypatch, "exhaust", "1")
    run.wait_for_training()
    log = run.ends(TIMEOUT_S + MORE_S)
    lines = said(log)
    # A step has two forward passes.
    assert lines[1].startswith("step 3: out of memory (CUDA out of memory. Tried to allocate 2.00 ")
    assert "sdp.coverage" in lines[1]
    assert "Traceback" not in log
    assert "exits with return code = " in log
    reason = status(run.folder)["reason"]
    assert "rank 1 failed in forward/backward" in reason or "out of memory" in reason


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "keep_lock"])
def test_a_rank_whose_loader_stalls_is_named(
    fault: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = faulty(tiny, tmp_path / "run", monkeypatch, fault, "1")
    run.wait_for_training()
    log = run.ends(TIMEOUT_S + MORE_S)
    lines = said(log)
    assert {0, 2, 3} <= lines.keys()
    for line in lines.values():
        # Who keeps the lock has not said that it reads data by now.
        how = (
            r"does not answer, last in .*" if fault == "keep_lock" else r"last in data after step 4"
        )
        assert re.search(rf"rank 1 \(pid \d+ on \S+\) {how}$", line), line
    assert re.search(r'faulty.py", line \d+ in slow', log)  # its own stacks
    assert "rank 1 " in status(run.folder)["reason"]


# -- the start ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "line"),
    [
        (
            "other_seed",
            "2",
            "the ranks differ in training.seed: 5 on rank 2, 1234 on ranks 0, 1, 3; start every "
            "rank with the same files, packages and arguments",
        ),
        (
            "other_packages",
            "0,1",
            'the ranks differ in version of deepspeed: "9.9" on ranks 0, 1, ',
        ),
        (
            "absent",
            "1",
            f"rank 1 of {RANKS} did not come within {3 * TIMEOUT_S} s (three times training.",
        ),
    ],
)
def test_what_is_not_the_same_everywhere(
    fault: str,
    rank: str,
    line: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = faulty(tiny, tmp_path / "run", monkeypatch, fault, rank)
    run.end(240)
    log = run.log.read_text()
    lines = said(log)
    assert sorted(lines) == [r for r in range(RANKS) if fault != "absent" or str(r) not in rank]
    assert all(line in said_line for said_line in lines.values()), log
    assert "exits with return code = 2" in log
    assert "Traceback" not in log
    assert not run.folder.exists()


@pytest.mark.slow
def test_two_runs_at_once_do_not_meet(tiny: Tiny, tmp_path: Path) -> None:
    """Both take the launcher's default port."""
    runs = [Watched(command(tiny, tmp_path / name), tmp_path / name) for name in ("one", "two")]
    for run in runs:
        run.wait_for_training()
    ports = {p.environ()["MASTER_PORT"] for run in runs for p in ranks(run)}
    assert ports == {"29500"}  # what the launcher said
    for run in runs:
        ranks(run)[0].send_signal(signal.SIGUSR1)
    for run in runs:
        assert run.end() == 0, run.log.read_text()
        assert status(run.folder)["state"] == "preempted"
        assert json.loads((run.folder / "plan.json").read_text())["world_size"] == RANKS


@pytest.mark.slow
def test_a_port_that_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """By another run: that one goes on."""
    port = str(free_port())
    first = command(tiny, tmp_path / "one")
    first[1:1] = ["--master_port", port]
    one = Watched(first, tmp_path / "one")
    one.wait_for_training()
    second = command(tiny, tmp_path / "two")
    second[1:1] = ["--master_port", port]
    two = Watched(second, tmp_path / "two")
    two.end(240)
    lines = said(two.log.read_text())
    assert f"MASTER_PORT = {port}: another process listens there; give each run a" in lines[0]
    assert all(f"MASTER_PORT = {port}: another run on this machine" in lines[r] for r in lines if r)
    assert not two.folder.exists()
    ranks(one)[0].send_signal(signal.SIGUSR1)
    assert one.end() == 0, one.log.read_text()
