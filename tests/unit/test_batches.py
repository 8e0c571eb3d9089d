"""Batches ahead of time: the same in any number of workers, and one line when a worker fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sdp_llm.data import (
    BlendedDataset,
    CorpusUse,
    IndexedDataset,
    IndexedDatasetWriter,
    PackedDataset,
    TrainingData,
)
from sdp_llm.errors import TrainingStopped
from sdp_llm.training.batches import StepBatches, read_batches
from tests.distributed.pool import _CONTEXT

BATCH, STEPS = 6, 7


@pytest.fixture(autouse=True)
def server() -> None:
    """The server of this process must be the one with the imports that the pools need."""
    _CONTEXT.set_forkserver_preload(
        ["torch", "transformers", "deepspeed", "sdp_llm.initialization"]
    )
    multiprocessing.forkserver.ensure_running()


def blend(folder: Path) -> BlendedDataset:
    corpora = []
    for i, size in enumerate((70, 130)):
        with IndexedDatasetWriter(folder / f"c{i}", "int32") as writer:
            writer.add_document(1000 * i + np.arange(4 * size + 1))
        corpora.append(PackedDataset(IndexedDataset(folder / f"c{i}"), 4))
    return BlendedDataset(corpora, [1, 3])


def batches(data: TrainingData, **changes: int) -> StepBatches:
    return replace(StepBatches(data, 5, 0, BATCH, 0, 1), **changes)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_reads_the_same_in_order(tmp_path: Path, workers: int) -> None:
    data, before = blend(tmp_path), torch.get_rng_state()
    found = list(read_batches(batches(data), STEPS, num_workers=workers))
    np.testing.assert_array_equal(torch.cat(found), data.read(5, 0, STEPS * BATCH))
    assert all(tokens.dtype == torch.int64 for tokens in found)
    assert torch.equal(torch.get_rng_state(), before), "dropout must not depend on who reads"


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_starts_anywhere(tmp_path: Path, workers: int) -> None:
    data = blend(tmp_path)
    ranks = [
        list(
            read_batches(
                batches(data, samples_consumed=997, rank=rank, world_size=2), 2, num_workers=workers
            )
        )
        for rank in range(2)
    ]
    together = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    np.testing.assert_array_equal(torch.cat(together), data.read(5, 997, 2 * BATCH))


def test_a_worker_gets_the_path_and_not_the_tokens(tmp_path: Path) -> None:
    data = blend(tmp_path)
    sent = pickle.dumps(data.corpora[1].dataset)
    assert len(sent) < 300
    (tmp_path / "c1.idx").unlink()
    with pytest.raises(ValueError, match="no such file"):
        pickle.loads(sent)


@dataclass(frozen=True)
class Failing:
    """Fails at the fourth batch, in the process that reads it."""

    how: str
    sequence_length: int = 4

    def read(self, seed: int, first: int, count: int) -> npt.NDArray[np.int64]:
        if first < 3 * BATCH:
            return np.full((count, 5), first, dtype=np.int64)
        if self.how == "raise":
            raise IndexError("tokens [1, 2) of 1")
        if self.how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def require_batch(self, global_batch_size: int) -> None:
        """Any is fine."""

    def usage(self, num_samples: int) -> list[CorpusUse]:
        return []


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "no batch 4: a worker failed with IndexError: tokens [1, 2) of 1; look"),
        ("exit", ": a worker was killed ("),
        ("kill", ": a worker was killed ("),
    ],
)
def test_a_worker_that_fails_is_one_line(how: str, reason: str) -> None:
    read: list[int] = []
    reading = read_batches(batches(Failing(how)), STEPS, num_workers=1)
    with pytest.raises(TrainingStopped) as caught:
        read.extend(int(tokens[0, 0]) for tokens in reading)
    assert read == [0, BATCH, 2 * BATCH][: len(read)]
    message = str(caught.value)
    assert message.startswith("data.num_workers = 1: no batch ")
    assert reason in message
    assert "read without workers (data.num_workers = 0)" in message
    assert "\n" not in message


def test_without_workers_the_error_is_what_was_raised() -> None:
    reading = read_batches(batches(Failing("raise")), STEPS)
    with pytest.raises(IndexError, match="tokens"):
        list(reading)
