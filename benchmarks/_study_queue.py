"""Train the missing runs of the study, each in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks._record import ROOT
from benchmarks._study_cases import Case, Model, Run
from benchmarks._study_plan import Planned, planned
from benchmarks._study_results import Results, read_results, result_path
from sdp_llm.errors import ConfigError
from sdp_llm.training.progress import duration

STOP = "stop"  # a file in the output folder: no further run begins
ATTEMPTS = 2  # at a run that fails
_POLL_S = 1.0
_START_S = 15.0  # of a process, before it trains
# glibc keeps what is freed, instead of asking for the same zeroed pages in every step: a tenth of
# the time of so small a model.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# Seconds per operation by width, on a core of its own, until there are results of it.
_GUESSES = {16: 1e-10, 32: 6e-11, 64: 3.5e-11, 128: 2.5e-11}


@dataclass(frozen=True)
class Settings:
    """What to train, and where.

    Attributes:
        data: folder of the tokenized corpus.
        output: folder of the study.
        questions: in order of their importance.
        seeds: of every case.
        workers: runs at a time.
        device: "cpu", a core for each run, or "cuda", which all runs share.
    """

    data: Path
    output: Path
    questions: Sequence[int]
    seeds: int
    workers: int
    device: str = "cpu"


@dataclass(frozen=True)
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    started: float


def missing(settings: Settings, results: Results) -> Iterator[Planned]:
    """The runs without a result, in their order."""
    for entry in planned(results.rates, settings.questions, settings.seeds):
        if entry.run is None or entry.run not in results.by_run:
            yield entry


def train_missing(settings: Settings) -> list[str]:
    """Train until nothing is missing, or the file ``stop`` is in the output folder.

    It may be killed at any moment: what was not finished is trained again.

    :returns: the ids of runs that failed.
    :raises ConfigError: another process trains in the folder.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    children: list[_Child] = []
    attempts: Counter[Run] = Counter()
    with _lock(settings.output) as lock:
        try:
            while True:
                ended = [child for child in children if child.process.poll() is not None]
                for child in ended:
                    children.remove(child)
                    _tell(settings, child)
                results = read_results(settings.output)
                while len(children) < settings.workers:
                    run = _next(settings, results, children, attempts)
                    if run is None:
                        break
                    attempts[run] += 1
                    children.append(_start(settings, run, lock))
                if not children:
                    break
                while all(child.process.poll() is None for child in children):
                    time.sleep(_POLL_S)
        finally:
            for child in children:
                child.process.terminate()
            for child in children:
                child.process.wait()
    return [run.id for run in attempts if not result_path(settings.output, run).exists()]


def _next(
    settings: Settings, results: Results, children: Sequence[_Child], attempts: Counter[Run]
) -> Run | None:
    if (settings.output / STOP).exists():
        return None
    running = {child.run for child in children}
    for entry in missing(settings, results):
        run = entry.run
        if run is not None and run not in running and attempts[run] < ATTEMPTS:
            return run
    return None


def _start(settings: Settings, run: Run, lock: int) -> _Child:
    command = [sys.executable, str(ROOT / "benchmarks" / "study.py"), "one"]
    command += ["--data", str(settings.data), "--output", str(settings.output)]
    command += ["--run", json.dumps(run.to_json())]
    log = settings.output / "logs" / f"{run.id}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        # The lock goes with it: should this process be killed, no other starts before it ends.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            env=os.environ | _MALLOC | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": settings.device},
        )
    return _Child(run, process, time.monotonic())


def _tell(settings: Settings, child: _Child) -> None:
    seconds = time.monotonic() - child.started
    path = result_path(settings.output, child.run)
    text = f"FAILED with status {child.process.returncode}, see logs/{child.run.id}.txt"
    if path.exists():
        text = f"loss {json.loads(path.read_text(encoding='utf-8'))['loss']:.4f}"
    print(f"{duration(seconds):>9}  {child.run.id}  {text}", flush=True)


@contextmanager
def _lock(output: Path) -> Iterator[int]:
    descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output {output}: another process trains there, or the last runs of one that "
                "was killed; wait until they have ended"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def seconds_of(case: Case, results: Results) -> float:
    """How long a run of the case takes, from the runs of its width that are there."""
    rate = _seconds_per_operation(case.model, results)
    return _START_S + rate * case.flops_per_token() * case.tokens()


def _seconds_per_operation(model: Model, results: Results) -> float:
    found = [
        result["cpu_seconds"] / (run.case.flops_per_token() * run.case.tokens())
        for run, result in results.by_run.items()
        if run.case.model.hidden == model.hidden and "cpu_seconds" in result
    ]
    return median(found) if found else _GUESSES[model.hidden]
