"""The training loop around a backend that only takes notes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from sdp_llm.cli import run_command
from sdp_llm.config import parse_config, resolve_batch
from sdp_llm.data import IndexedDataset, IndexedDatasetWriter, PackedDataset, samples_at
from sdp_llm.errors import ConfigError, TrainingStopped
from sdp_llm.evaluation import Evaluation
from sdp_llm.plan import schedule_from_config
from sdp_llm.training.backends import Step
from sdp_llm.training.inputs import Inputs, target_bytes
from sdp_llm.training.position import Position
from sdp_llm.training.prediction import Prediction
from sdp_llm.training.progress import HEADER_EVERY, header
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.trainer import Trainer

SEQUENCE, BATCH, SEED, SAMPLES = 4, 6, 5, 40


class Notes:
    """A backend whose step i has the loss i, and a gradient that is finite or not."""

    def __init__(self, skipped: str = "", rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.lr = 0.25
        self.batches: list[Tensor] = []
        self.evaluated: list[tuple[int, Tensor, int]] = []
        self.exported: list[tuple[Path, str | None]] = []
        self.monitored: list[tuple[dict[str, float], int]] = []
        self._skipped = skipped

    def step(self, tokens: Tensor) -> Step:
        i = len(self.batches)
        self.batches.append(tokens)
        is_skipped = self._skipped[i : i + 1] == "x"
        norm = math.nan if is_skipped else 0.5 * i
        return Step(torch.tensor([float(i + 1)]), norm, is_skipped)

    def wait_for_weights(self) -> None:
        pass

    def must_stop(self) -> bool:
        return False

    def evaluate(self, samples: Tensor, micro_batch: int) -> Evaluation:
        self.evaluated.append((len(self.batches), samples, micro_batch))
        return Evaluation(3.0 + len(self.batches), samples[:, 1:].numel())

    def export(self, folder: Path, tokenizer: str | None) -> None:
        self.exported.append((folder, tokenizer))

    def monitor(self, values: dict[str, float], samples: int) -> None:
        self.monitored.append((values, samples))


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.arange(SEQUENCE * SAMPLES + 1))
    return PackedDataset(IndexedDataset(tmp_path / "corpus"), SEQUENCE)


def trainer(
    dataset: PackedDataset,
    folder: Path,
    backend: Notes,
    steps: int = 10,
    sdp: Mapping[str, Any] | None = None,
    prediction: Prediction | ConfigError | None = None,
    **training: Any,
) -> Trainer:
    run = parse_config(
        {
            "train_batch_size": BATCH,
            "steps_per_print": 4,
            "sdp": sdp or {"coverage": 1},
            "model": {"config": "unused.json"},
            "data": {"train": "unused", "sequence_length": SEQUENCE},
            "training": {"run_dir": str(folder / "run"), "seed": SEED, **training},
        }
    )
    schedule = schedule_from_config(run.sdp, backend.world_size, 4, steps)
    batch = resolve_batch(run, backend.world_size)
    inputs = Inputs(LlamaConfig(num_hidden_layers=4), schedule, batch, dataset, dataset, {})
    run_folder = RunFolder(run, schedule, is_writer=True)
    return Trainer(run, inputs, backend, run_folder, steps, prediction=prediction)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_order_of_things(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Notes()
    slow_before = trainer(dataset, tmp_path, backend, eval_interval=4, eval_samples=5)
    slow_before.position.seconds = 1e6
    slow_before.fit()
    assert [step for step, *_ in backend.evaluated] == [4, 8, 10]
    assert backend.exported == [(tmp_path / "run" / "model", None)]
    entries = metrics(tmp_path)
    lines = [e for e in entries if "loss" in e]
    assert [e["step"] for e in lines] == [4, 8, 10]
    assert [e["loss"] for e in lines] == [2.5, 6.5, 9.5]  # means since the line before
    assert [e["validation"] for e in lines] == [7.0, 11.0, 13.0]
    assert [e["grad_norm"] for e in lines] == [1.5, 3.5, 4.5]
    assert [e["samples"] for e in lines] == [24, 48, 60]
    assert [e["tokens"] for e in lines] == [96, 192, 240]
    assert lines[-1]["eta"] == 0
    # Steps 8 and 10 come next, of 6 and 2 that are left.
    assert lines[0]["to_validation"] == pytest.approx(lines[0]["eta"] * 4 / 6)
    assert lines[1]["to_validation"] == pytest.approx(lines[1]["eta"])
    assert lines[2]["to_validation"] is None
    assert lines[0]["eta"] < 1000  # whatever it took until the resume
    assert [e["validation/loss"] for e in entries if "validation/loss" in e] == [7.0, 11.0, 13.0]
    assert [samples for values, samples in backend.monitored if "train/loss" in values] == [
        24,
        48,
        60,
    ]
    shown, _ = next(entry for entry in backend.monitored if "train/loss" in entry[0])
    names = ["lr", "grad_norm", "lowest_loss", "highest_loss", "tokens_per_second"]
    assert set(shown) == {f"train/{name}" for name in ["loss", "memory_peak", *names]}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == header()
    assert [line.split()[0] for line in printed[1:4]] == ["4/10", "8/10", "10/10"]
    assert printed[4] == f"exporting to {tmp_path / 'run' / 'model'}"


def test_a_validation_is_shown_once(dataset: PackedDataset, tmp_path: Path) -> None:
    trainer(dataset, tmp_path, Notes(), steps=20, eval_interval=10).fit()
    shown = {e["step"]: e["validation"] for e in metrics(tmp_path) if "loss" in e}
    assert shown == {4: None, 8: None, 12: 13.0, 16: None, 20: 23.0}


def test_without_an_interval_the_end_is_validated(dataset: PackedDataset, tmp_path: Path) -> None:
    backend = Notes()
    trainer(dataset, tmp_path, backend, export=False).fit()
    assert [step for step, *_ in backend.evaluated] == [10]
    assert backend.exported == []


def test_the_header_returns(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(dataset, tmp_path, Notes(), steps=4 * (HEADER_EVERY + 2)).fit()
    printed = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(printed) if line == header()] == [0, HEADER_EVERY + 1]


def test_only_rank_0_prints(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(dataset, tmp_path, Notes(rank=1, world_size=2), steps=4).fit()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_read_their_slices_of_the_promised_samples(
    dataset: PackedDataset, tmp_path: Path, world_size: int
) -> None:
    backends = [Notes(rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank, backend in enumerate(backends):
        trainer(dataset, tmp_path / str(rank), backend, eval_samples=1).fit()
    for step in range(10):
        together = torch.cat([backend.batches[step] for backend in backends]).numpy()
        order = samples_at(SEED, step * BATCH, BATCH, SAMPLES)
        np.testing.assert_array_equal(together, dataset.batch(order))


def test_reading_goes_on_where_the_trainer_is(dataset: PackedDataset, tmp_path: Path) -> None:
    backend = Notes()
    job = trainer(dataset, tmp_path, backend)
    job.position = Position(step=7, samples=7 * BATCH)
    job.fit()
    together = torch.cat(backend.batches).numpy()
    np.testing.assert_array_equal(together, dataset.read(SEED, 7 * BATCH, 3 * BATCH))


@pytest.mark.parametrize(("world_size", "samples"), [(1, 5), (2, 5), (3, 7), (3, 4), (6, 2)])
def test_ranks_share_the_validation_samples(
    dataset: PackedDataset, tmp_path: Path, world_size: int, samples: int
) -> None:
    parts = []
    for rank in range(world_size):
        backend = Notes(rank=rank, world_size=world_size)
        trainer(dataset, tmp_path / str(rank), backend, eval_samples=samples).validate()
        [(_, part, micro_batch)] = backend.evaluated
        assert micro_batch == BATCH // world_size
        assert part.shape[1:] == (SEQUENCE + 1,)
        assert len(part) <= -(-samples // world_size)
        parts.append(part)
    together = torch.cat(parts).numpy()
    spread = np.arange(samples) * SAMPLES // samples
    np.testing.assert_array_equal(together, dataset.batch(spread))


def test_the_validation_micro_batch_can_be_given(dataset: PackedDataset, tmp_path: Path) -> None:
    backend = Notes()
    trainer(dataset, tmp_path, backend, eval_micro_batch_size=4).validate()
    assert backend.evaluated[0][2] == 4


# -- phases ---------------------------------------------------------------------------------------

PHASES = {
    "coverage": 1,
    "rotate_every": 1,
    "schedule": [{"until": 0.6}, {"until": 0.7, "masking": "backward"}, {"until": 1, "seed": 3}],
}


def test_a_phase_is_announced_and_its_end_logged(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(dataset, tmp_path, Notes(), sdp=PHASES).fit()
    lines = [e for e in metrics(tmp_path) if "loss" in e]
    # A line every four steps, and at the end of each phase: none is about two of them.
    assert [(e["step"], e["phase"]) for e in lines] == [(4, 1), (6, 1), (7, 2), (8, 3), (10, 3)]
    assert [e["loss"] for e in lines] == [2.5, 5.5, 7.0, 8.0, 9.5]
    printed = capsys.readouterr().out.splitlines()
    announced = {line: i for i, line in enumerate(printed) if line.startswith("phase")}
    rotating = "rotating every step"
    assert list(announced) == [
        f"phase 1 of 3, steps 1 to 6: coverage 1, forward masking, {rotating}",
        f"phase 2 of 3, steps 7 to 7: coverage 1, backward masking, {rotating}",
        f"phase 3 of 3, steps 8 to 10: coverage 1, forward masking, {rotating}",
    ]
    after = [printed[i + 1].split()[0] for i in announced.values()]
    assert after == ["step", "7/10", "8/10"]


def test_operations_are_counted_by_phase(dataset: PackedDataset, tmp_path: Path) -> None:
    """And go on from those of the position, which another plan may have taken."""
    starts = {0: 10.0, 6: 20.0, 7: 30.0}
    prediction = Mock(spec=Prediction)
    prediction.flops_per_token.side_effect = lambda phase: starts[phase.start]
    job = trainer(dataset, tmp_path, Notes(), sdp=PHASES, prediction=prediction)
    job.position = Position(step=5, samples=5 * BATCH, flops=1e6)
    job.fit()
    lines = [e for e in metrics(tmp_path) if "loss" in e]
    added = [10.0, 10.0 + 20.0, 10.0 + 20.0 + 30.0, 10.0 + 20.0 + 3 * 30.0]
    assert [(e["step"], e["flops"] - 1e6) for e in lines] == [
        (step, BATCH * SEQUENCE * flops) for step, flops in zip((6, 7, 8, 10), added, strict=True)
    ]
    assert [e["seconds"] for e in lines] == sorted(e["seconds"] for e in lines)


def test_operations_that_nobody_predicts_are_not_known(
    dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer(dataset, tmp_path, Notes(), prediction=ConfigError("experts")).fit()
    assert {e["flops"] for e in metrics(tmp_path) if "loss" in e} == {None}


def test_a_run_that_goes_on_says_its_phase(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = trainer(dataset, tmp_path, Notes(), sdp=PHASES)
    job.position = Position(step=6, samples=6 * BATCH)
    job.fit()
    printed = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in printed if line.startswith("phase")] == [
        "phase 2 of 3",
        "phase 3 of 3",
    ]
    assert [e["phase"] for e in metrics(tmp_path) if "loss" in e] == [2, 3, 3]


def test_one_phase_is_not_announced(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(dataset, tmp_path, Notes(), sdp={"coverage": 1, "rotate_every": 2}).fit()
    assert "phase 1" not in capsys.readouterr().out
    assert [(e["step"], e["phase"]) for e in metrics(tmp_path) if "loss" in e] == [
        (4, 1),
        (8, 1),
        (10, 1),
    ]


# -- steps that are skipped -----------------------------------------------------------------------


def test_it_stops_after_too_many_skipped_steps_in_a_row(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Notes(skipped=".xx.xxx")
    job = trainer(dataset, tmp_path, backend, max_skipped_steps=3)
    with pytest.raises(TrainingStopped) as caught:
        job.fit()
    assert len(backend.batches) == 7
    assert backend.exported == []
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 7: the loss or gradient was not finite in 3 steps in a")
    assert "training.max_skipped_steps = 3" in message
    assert "lower the learning rate" in message
    assert "skipped 2" in capsys.readouterr().out  # in the line of step 4


def test_the_status_of_a_stopped_run_is_3(
    dataset: PackedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    job = trainer(dataset, tmp_path, Notes(skipped="xx"), max_skipped_steps=2)
    arguments = argparse.Namespace(debug=False)
    assert run_command("pretrain", lambda _: job.fit(), arguments) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: error: step 2: the loss or gradient was not finite in 2")


def test_steps_that_are_skipped_now_and_then_are_counted(
    dataset: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Notes(skipped="x.xx.xx.x.")
    trainer(dataset, tmp_path, backend, max_skipped_steps=3).fit()
    assert len(backend.batches) == 10
    lines = [e for e in metrics(tmp_path) if "loss" in e]
    assert [e["skipped"] for e in lines] == [3, 5, 6]
    assert "skipped 6" in capsys.readouterr().out


# -- bits per byte --------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one letter per id, that drops a space at the start like sentencepiece."""

    letters = " abcäöü"

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        texts = ["".join(self.letters[int(i) % len(self.letters)] for i in row) for row in rows]
        return [text.removeprefix(" ") for text in texts]


def test_the_bytes_of_targets() -> None:
    # "ab a", of which the model predicts "b a"; " äb", of which it predicts "äb".
    assert target_bytes(Letters(), torch.tensor([[1, 2, 0, 1]])) == 3
    assert target_bytes(Letters(), torch.tensor([[0, 4, 2]])) == 3
    # The space after the first token counts, though it is the first that is predicted.
    assert target_bytes(Letters(), torch.tensor([[1, 0, 2], [1, 0, 3]])) == 4
    assert target_bytes(Letters(), torch.zeros(0, 5, dtype=torch.int64)) == 0


def test_bits_per_byte_are_the_loss_of_the_text(
    dataset: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdp_llm.training.trainer.load_tokenizer", lambda _: Letters())
    job = trainer(dataset, tmp_path, Notes(), eval_samples=3)
    assert job.bits_per_byte(Evaluation(1.0, 12)) is None  # the config names no tokenizer
    assert job.run.data is not None
    run = replace(job.run, data=replace(job.run.data, tokenizer="letters"))
    run = replace(run, training=replace(run.training, run_dir=str(tmp_path / "other")))
    folder = RunFolder(run, job.inputs.schedule, is_writer=True)
    job = Trainer(run, job.inputs, Notes(), folder, 1)
    job.validate()
    [entry] = [json.loads(x) for x in (tmp_path / "other" / "metrics.jsonl").open()]
    # Samples 0, 13 and 26 of four targets each: ids 1 to 4, 53 to 56, 105 to 108.
    ids = [*range(1, 5), *range(53, 57), *range(105, 109)]
    size = sum(len(Letters.letters[i % len(Letters.letters)].encode()) for i in ids)
    assert entry["validation/tokens"] == 12
    assert entry["validation/bits_per_byte"] == pytest.approx(3.0 / math.log(2) * 12 / size)
