"""Signals to ranks and launchers: one agreed save, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT
from tests.integration.conftest import Tiny, command_environment, execute, script, with_deepspeed
from tests.integration.test_resume import shards

LONG = 100_000  # steps: it ends because it is asked to

LAUNCHERS = ["deepspeed", "torchrun"]


def command(tiny: Tiny, folder: Path, launcher: str, steps: int) -> list[str | Path]:
    overrides = [f"training.run_dir={folder}", f"training.steps={steps}", "steps_per_print=10"]
    overrides += ["training.eval_interval=0", "training.eval_samples=2", "training.export=false"]
    # A constant rate, so that the steps before the stop do not depend on the budget.
    arguments = [tiny.config, "--set", *overrides, "scheduler=null"]
    if launcher == "deepspeed":
        return with_deepspeed(*arguments)
    start = [script("torchrun"), "--standalone", "--nproc_per_node", "2"]
    return [*start, "launch/pretrain.py", "--deepspeed_config", *arguments]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def steps_logged(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]


class Started:
    """A run in the background."""

    def __init__(self, command: list[str | Path], folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=command_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, is_so: Any, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def wait_for_steps(self) -> None:
        metrics = self.folder / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and len(steps_logged(self.folder)) >= 2)

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of the run whose command line has ``part`` as the program that Python runs."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [psutil.Process(self.process.pid), *children]
        return [p for p in found if any(part in word for word in p.cmdline()[:4])]

    def end(self, seconds: float = 60) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            pytest.fail(f"no end after {seconds} s\n{self.log.read_text()}")


def ranks(run: Started) -> list[psutil.Process]:
    return [
        p for p in run.processes("launch/pretrain.py") if "launcher" not in " ".join(p.cmdline())
    ]


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Started:
    return Started(command(tiny, tmp_path / "run", "deepspeed", LONG), tmp_path / "run")


def test_a_signal_to_one_rank(run: Started) -> None:
    run.wait_for_steps()
    rank = next(p for p in ranks(run) if p.environ()["RANK"] == "1")
    rank.send_signal(signal.SIGUSR1)
    assert run.end() == 0, run.log.read_text()
    assert run.log.read_text().count("exits successfully") == 2
    said = status(run.folder)
    assert said["state"] == "preempted"
    assert said["checkpoint"] == f"checkpoints/step-{said['step']}"
    assert "the same command goes on from here" in run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher(launcher: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Started(command(tiny, folder, launcher, LONG), folder)
    run.wait_for_steps()
    program = "launcher.launch" if launcher == "deepspeed" else "torchrun"
    run.processes(program)[0].send_signal(signal.SIGTERM)
    run.end()
    stopped = status(folder)
    assert stopped["state"] == "preempted", run.log.read_text()
    last = stopped["step"] + 4
    done = execute(*command(tiny, folder, launcher, last))
    assert done.status == 0, done.output
    assert f"checkpoints/step-{stopped['step']}: step {stopped['step']} of {last}" in done.stdout
    assert status(folder)["state"] == "finished"
    logged = steps_logged(folder)
    assert logged == sorted(set(logged))
    assert logged[-1] == last


@pytest.mark.slow
def test_a_signal_during_start_up(run: Started) -> None:
    run.wait_until(lambda: len(ranks(run)) == 2)
    time.sleep(1.5)  # imports
    ranks(run)[0].send_signal(signal.SIGUSR1)
    assert run.end() == 0, run.log.read_text()
    assert (status(run.folder)["state"], status(run.folder)["step"]) == ("preempted", 0)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_then_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    often = ["training.save_interval=5"]
    run = Started([*command(tiny, folder, "deepspeed", LONG), *often], folder)
    run.wait_until(lambda: (folder / "checkpoints" / "step-10").exists())
    ranks(run)[1].kill()
    run.end(90)
    said = status(folder)
    assert said["state"] == "failed"
    newest = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    # One rank fewer: another plan.
    alone = ["launch/pretrain.py", "--deepspeed_config", tiny.config, "--set", "sdp.coverage=1"]
    alone += [f"training.run_dir={folder}", f"training.steps={newest + 2}", "scheduler=null"]
    done = execute(sys.executable, *alone, "training.export=false")
    assert done.status == 0, done.output
    assert f"checkpoints/step-{newest}: step {newest} of" in done.stdout


@pytest.mark.slow
def test_killed_right_after_a_change_of_phase(tiny: Tiny, tmp_path: Path) -> None:
    """All ranks at once; the run goes on in its second phase, to the same bits at the end."""
    steps = 200
    phases = [{"until": 0.5, "rotate_every": 1}, {"until": 1, "masking": "backward"}]
    options = [f"sdp.schedule={json.dumps(phases)}", "training.save_interval=100"]

    def arguments(name: str) -> list[str | Path]:
        return [*command(tiny, tmp_path / name, "torchrun", steps), *options]

    run = Started(arguments("killed"), tmp_path / "killed")
    run.wait_until((tmp_path / "killed" / "checkpoints" / "step-100").exists)
    for process in [*psutil.Process(run.process.pid).children(recursive=True), run.process]:
        process.kill()
    run.process.wait()
    assert status(run.folder)["state"] == "running", "it was not over yet"
    again = execute(*arguments("killed"))
    assert again.status == 0, again.output
    assert f"checkpoints/step-100: step 100 of {steps}" in again.stdout
    straight = execute(*arguments("straight"))
    assert straight.status == 0, straight.output
    assert shards(tmp_path / "killed") == shards(tmp_path / "straight")
    assert {*shards(tmp_path / "straight")} == {"step-100", f"step-{steps}"}


# -- the second signal ----------------------------------------------------------------------------

WAITING = """
import ctypes, os, sys, time
from sdp_llm.training.signals import StopRequest
stop = StopRequest()
stop.hear_sigterm()
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
if "block" in sys.argv:
    while True:
        ctypes.CDLL(None).sleep(30)  # as in a collective: no Python code runs there
while not stop.is_set():
    time.sleep(0.01)
print("asked", flush=True)
stop.settle()
time.sleep(float(sys.argv[1]))
"""


def waiting(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A process that waits for signals, and a child of it."""
    command = [sys.executable, "-c", WAITING, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    process, child = waiting("0", "block")
    process.send_signal(number)
    process.send_signal(number)  # what a launcher passes on is not a second request
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(2) == 128 + number
    os.kill(child, signal.SIGKILL)


def test_children_ignore_the_signals_and_do_not_pass_them_on() -> None:
    process, child = waiting("1.5")
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.3)
    assert psutil.Process(child).status() == psutil.STATUS_SLEEPING
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)  # too late to matter
    assert process.wait(3) == 0
    os.kill(child, signal.SIGKILL)
