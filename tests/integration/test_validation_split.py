"""The whole model's loss over validation samples that ranks cannot share evenly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.config import load_config
from sdp_llm.data import IndexedDataset, PackedDataset, validation_samples
from sdp_llm.evaluation import Evaluation
from sdp_llm.initialization import initialize
from sdp_llm.plan import make_plan
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.measure import load_model_config
from sdp_llm.training.backends import EngineBackend
from sdp_llm.training.inputs import load_inputs, load_tokenizer
from sdp_llm.training.metrics import Meter
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.trainer import Trainer
from tests.distributed.pool import Pool
from tests.integration.conftest import Tiny

Pools = Callable[[int], Pool]

SEED = 7


def evaluate_shares(config: str, shares: list[list[Tensor]], micro_batch: int) -> list[Evaluation]:
    """Run on a rank: the loss over each share of this rank, with new weights."""
    run = load_config(config, [f"training.seed={SEED}"])
    assert run.model is not None
    engine, *_ = initialize(load_model_config(run.model.config), run, total_num_steps=1)
    return [engine.evaluate(share[dist.get_rank()], micro_batch) for share in shares]


def whole_loss(tiny: Tiny, samples: Tensor) -> float:
    """The same weights in one process."""
    config = load_model_config(tiny.model)
    plan = make_plan(1, config.num_hidden_layers, owners_per_block=1)
    make: Any = torch.optim.SGD
    return Simulation(config, plan, make, seed=SEED).evaluate([samples])


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_any_split_has_the_loss_of_the_union(pools: Pools, tiny: Tiny, micro_batch: int) -> None:
    dataset = PackedDataset(IndexedDataset(f"{tiny.corpus}/validation_text_document"), 16)
    samples = torch.from_numpy(dataset.batch(validation_samples(dataset, 7)))
    cuts = (0, 1, 3, 4, 7)
    shares = [[samples[:cut], samples[cut:]] for cut in cuts]
    expected = whole_loss(tiny, samples)
    for results in pools(2).run(evaluate_shares, str(tiny.config), shares, micro_batch):
        for cut, result in zip(cuts, results, strict=True):
            assert result.loss == pytest.approx(expected, abs=1e-5), cut
            assert result.tokens == 7 * 16
    # And the parts differ, so that leaving one out would show.
    assert whole_loss(tiny, samples[:3]) != pytest.approx(expected, abs=1e-3)


def trainer_outcome(config: str, folder: Path, samples: int) -> tuple[int, float, float | None]:
    """Run on a rank: the samples it holds, the loss and the bits per byte."""
    overrides = [f"training.run_dir={folder}", f"training.eval_samples={samples}"]
    run = load_config(config, [*overrides, f"training.seed={SEED}"])
    inputs = load_inputs(run, dist.get_world_size())
    run_folder = RunFolder(run, inputs.schedule, is_writer=dist.get_rank() == 0)
    job = Trainer(run, inputs, EngineBackend(run, inputs), run_folder, 1)
    job.validate()
    assert job.last_validation is not None
    own = 0 if job._validation is None else len(job._validation)
    return own, job.last_validation.loss, job.bits_per_byte(job.last_validation)


@pytest.mark.parametrize(("samples", "counts"), [(1, (1, 0)), (5, (3, 2))])
def test_the_trainer_counts_the_bytes_of_all_ranks(
    pools: Pools, tiny: Tiny, tmp_path: Path, samples: int, counts: tuple[int, int]
) -> None:
    outcomes = pools(2).run(trainer_outcome, str(tiny.config), tmp_path / "run", samples)
    run = load_config(tiny.config)
    assert run.data is not None
    assert run.data.validation is not None
    dataset = PackedDataset(IndexedDataset(run.data.validation), run.data.sequence_length)
    union = torch.from_numpy(dataset.batch(validation_samples(dataset, samples)))
    tokenizer = load_tokenizer(str(tiny.tokenizer))
    sizes = [
        [len(t.encode()) for t in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        for rows in (union, union[:, :1])
    ]
    size = sum(sizes[0]) - sum(sizes[1])
    assert size > samples * run.data.sequence_length  # more than a byte per token
    expected = whole_loss(tiny, union)
    for rank, (own, loss, bits) in enumerate(outcomes):
        assert own == counts[rank]
        assert loss == pytest.approx(expected, abs=1e-5)
        assert bits == pytest.approx(loss * union[:, 1:].numel() / math.log(2) / size)


def reduced(losses: list[list[float]]) -> tuple[float, float, float, int, tuple[int, int]]:
    """Run on a rank: what the meter makes of one loss per step of this rank."""
    meter = Meter()
    for loss in losses[dist.get_rank()]:
        meter.add(torch.tensor([loss]))
    result = meter.reduce()
    return result.loss, result.lowest_loss, result.highest_loss, result.steps, result.memory_now


def test_the_meter_reduces_over_ranks(pools: Pools) -> None:
    first, second = pools(2).run(reduced, [[1.0, 3.0], [4.0, 8.0]])
    assert first == second
    assert first[:4] == (4.0, 2.0, 6.0, 2)
    assert 2**25 < first[4][0] <= first[4][1]
