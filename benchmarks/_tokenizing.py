"""One run of the bare tokenizer, or of tokenize_fineweb: how long it takes, and what it holds."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest import mock

import psutil

from benchmarks._text import read_texts
from data_prep import tokenize_fineweb
from data_prep._corpus import GrowingCorpus
from data_prep._encoding import IN_FLIGHT  # the import also turns the tokenizer's threads off
from data_prep._tokenizer import load_tokenizer

_BATCH = 256  # documents
# "spawn", as tokenize_fineweb: processes that share no memory with this one.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class BareRun:
    """The tokenizer and nothing else, on documents in memory.

    Attributes:
        text_bytes: UTF-8, of all processes.
        tokens: Without any end of sequence.
        seconds: From the first start to the last end.
        cpu_seconds: Of all processes.
    """

    text_bytes: int
    tokens: int
    seconds: float
    cpu_seconds: float


def run_bare(tokenizer: Path, files: list[Path], call: bool = False) -> BareRun:
    """Encode each file's documents in a process of its own, all at once, in batches of 256.

    :param call: Not ``encode_batch_fast`` but ``tokenizer(texts)["input_ids"]``.
    """
    barrier = _CONTEXT.Barrier(len(files))
    with ProcessPoolExecutor(len(files), _CONTEXT, _wait_at, (barrier,)) as pool:
        runs = list(pool.map(partial(_encode_bare, tokenizer, call), files))
    starts, ends, cpu, sizes, tokens = zip(*runs, strict=True)
    return BareRun(sum(sizes), sum(tokens), max(ends) - min(starts), sum(cpu))


_barrier: Barrier | None = None  # of this process


def _wait_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _encode_bare(tokenizer: Path, call: bool, file: Path) -> tuple[float, float, float, int, int]:
    """Return start, end and CPU time (seconds), bytes and tokens."""
    texts = read_texts(str(file))
    size = sum(len(text.encode()) for text in texts)
    encode = _encode_by_call(tokenizer) if call else _encode_by_backend(tokenizer)
    encode(texts[:_BATCH])
    assert _barrier is not None
    _barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    tokens = sum(encode(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH))
    return start, time.perf_counter(), time.process_time() - cpu, size, tokens


def _encode_by_backend(tokenizer: Path) -> Callable[[list[str]], int]:
    backend = load_tokenizer(tokenizer).backend_tokenizer
    backend.encode_special_tokens = True
    # The ids stay where the tokenizer made them; only their number is asked for.
    return lambda texts: sum(map(len, backend.encode_batch_fast(texts, add_special_tokens=False)))


def _encode_by_call(tokenizer: Path) -> Callable[[list[str]], int]:
    loaded = load_tokenizer(tokenizer)
    return lambda texts: sum(map(len, loaded(texts, verbose=False)["input_ids"]))


@dataclass(frozen=True)
class PipelineRun:
    """A run of tokenize_fineweb.

    Attributes:
        text_bytes: UTF-8, of all documents of the corpus.
        tokens: With the end of sequence of each document.
        seconds: From the moment at which a worker has come up to the finished corpus.
        cpu_seconds: Of all processes in that time.
        workers: Processes that encoded; fewer than were asked for if the source is small.
        worker_start: Peak resident bytes of a worker when the clock starts.
        worker_peak: The same at the last piece; of the worker that has held most.
        main_peak: Peak resident bytes of the process that started the workers.
    """

    text_bytes: int
    tokens: int
    seconds: float
    cpu_seconds: float
    workers: int
    worker_start: int
    worker_peak: int
    main_peak: int


def run_pipeline(
    tokenizer: Path, files: list[Path], workers: int, folder: Path, *more: str
) -> PipelineRun:
    """Run tokenize_fineweb in a new process on some files.

    The source begins with as many files of one word as are encoded before anything else is handed
    to the workers. The clock starts when the first of them is done: no time is left out in which
    any of the other files was worked on.

    :param folder: Empty; holds the source and the output.
    :param more: Further options of tokenize_fineweb.
    """
    source = folder / "source"
    source.mkdir()
    for number in range(IN_FLIGHT * workers):
        (source / f"0-{number:06d}.txt").write_text(f"word{number}")
    for number, file in enumerate(files):
        (source / f"1-{number:06d}{file.suffix}").symlink_to(file.resolve())
    argv = ["--source", source, "--tokenizer", tokenizer, "--output", folder / "corpus"]
    argv += ["--workers", workers, *more]
    with ProcessPoolExecutor(1, _CONTEXT) as pool:
        return pool.submit(_run_observed, [str(part) for part in argv]).result()


class _Observed:
    """What was seen of a run as its pieces were committed. Times in seconds, memory in bytes."""

    start: float | None = None
    workers = 0
    cpu_start = 0.0
    cpu_of_workers = 0.0  # since the start of these processes
    worker_start = 0
    worker_peak = 0

    def committed(self) -> None:
        """Look at this process and its workers, which are alive until all is committed."""
        # Python's own tracker of resources is a child too.
        children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
        workers = [child.pid for child in children] or [os.getpid()]
        self.workers = len(workers)
        self.worker_peak = max(map(_peak_resident, workers))
        self.cpu_of_workers = sum(sum(child.cpu_times()[:2]) for child in children)
        if self.start is None:
            self.start, self.worker_start = time.perf_counter(), self.worker_peak
            self.cpu_start = time.process_time() + self.cpu_of_workers

    def cpu_seconds(self) -> float:
        """CPU time since the first commit, of this process and its workers."""
        return time.process_time() + self.cpu_of_workers - self.cpu_start


class _ObservedCorpus(GrowingCorpus):
    def __init__(self, observed: _Observed, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._observed = observed

    def append(self, *arguments: Any) -> None:
        super().append(*arguments)
        self._observed.committed()


def _run_observed(argv: list[str]) -> PipelineRun:
    observed = _Observed()
    made = partial(_ObservedCorpus, observed)
    said = io.StringIO()
    with mock.patch.object(tokenize_fineweb, "GrowingCorpus", made), redirect_stdout(said):
        status = tokenize_fineweb.main(argv)
    end, cpu_seconds = time.perf_counter(), observed.cpu_seconds()
    if status or observed.start is None:
        raise RuntimeError(f"tokenize_fineweb ended with {status}: {said.getvalue()}")
    output = Path(argv[argv.index("--output") + 1])
    described = json.loads((output / "manifest.json").read_text())
    if described["dropped"]:
        raise RuntimeError(f"documents were left out: {described['dropped']}")
    splits = described["splits"].values()
    return PipelineRun(
        text_bytes=sum(split["utf8_bytes"] for split in splits),
        tokens=sum(split["tokens"] for split in splits),
        seconds=end - observed.start,
        cpu_seconds=cpu_seconds,
        workers=observed.workers,
        worker_start=observed.worker_start,
        worker_peak=observed.worker_peak,
        main_peak=_peak_resident(os.getpid()),
    )


def _peak_resident(process: int) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), 0)
