"""Steps that go wrong on one rank: all skip or stop together, and keep the last good checkpoint."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.config import load_config
from sdp_llm.data.sampler import samples_at
from sdp_llm.errors import TrainingStopped
from sdp_llm.training.backends import EngineBackend, Step
from sdp_llm.training.inputs import load_inputs
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.session import train
from tests.distributed.pool import Pool
from tests.distributed.tiny import weights
from tests.integration.conftest import SEQUENCE, Tiny

Pools = Callable[[int], Pool]

CULPRIT = 1


@dataclass(frozen=True)
class Outcome:
    """What one rank did: how it ended, what it printed, its weights before each step."""

    error: str
    said: str
    weights: list[dict[str, np.ndarray]]


# What happens to the loss, or to a weight, of a rank in a step.
LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * float("nan"),
    "inf with a finite gradient": lambda loss: loss + float("inf"),
    "large": lambda loss: loss * 3,
}


class Unlucky(EngineBackend):
    """The culprit has, in some steps, another loss than its own, or a bit of a weight flipped."""

    def __init__(self, run: Any, inputs: Any, fate: Mapping[int, str]) -> None:
        super().__init__(run, inputs)
        self._fate = fate
        self.weights: list[dict[str, np.ndarray]] = []

    def step(self, tokens: Tensor) -> Step:
        self.weights.append(weights(self.engine))
        fate = self._fate.get(len(self.weights)) if self.rank == CULPRIT else None
        if fate == "flip":
            self.engine.sharded.units[0].flat[:1].view(torch.int32).bitwise_xor_(1)
            # In fp32 the masters are views of the weights.
        loss = self._loss
        if fate in LOSSES:
            self._loss = lambda *args: LOSSES[fate](loss(*args))
        try:
            return super().step(tokens)
        finally:
            self._loss = loss


def job(config: str, overrides: list[str], fate: Mapping[int, str]) -> Outcome:
    """Run on a rank: what ``launch/pretrain.py`` does, with an unlucky rank."""
    run = load_config(config, ["training.export=false", "training.eval_interval=0", *overrides])
    inputs = load_inputs(run, dist.get_world_size())
    error, said = "", io.StringIO()
    backend = Unlucky(run, inputs, fate)
    try:
        with redirect_stdout(said):
            folder = RunFolder(run, inputs.schedule, dist.get_rank() == 0, "auto")
            train(run, inputs, backend, folder, "auto")
    except TrainingStopped as caught:
        error = str(caught)
    return Outcome(error, said.getvalue(), backend.weights)


def run_on(
    pools: Pools, tiny: Tiny, folder: Path, fate: Mapping[int, str], *overrides: str
) -> list[Outcome]:
    where = f"training.run_dir={folder}"
    keep = ["training.save_interval=2", "training.keep_last=9"]
    return pools(2).run(job, str(tiny.config), [where, *keep, *overrides], fate)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "kind", [pytest.param("nan", marks=pytest.mark.slow), "inf with a finite gradient"]
)
def test_all_ranks_skip_and_save_later(kind: str, tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    fate = {3: kind, 4: kind}
    outcomes = run_on(pools, tiny, tmp_path / "run", fate, "training.max_skipped_steps=3")
    for outcome in outcomes:
        assert outcome.error == ""
        for name, value in outcome.weights[2].items():
            np.testing.assert_array_equal(outcome.weights[4][name], value)
        changed = outcome.weights[5].items()
        assert any((value != outcome.weights[4][name]).any() for name, value in changed)
    said = outcomes[0].said
    assert (
        "step 3: skipped, the loss of rank 1 is not finite (1 in a row, the run stops at 3)" in said
    )
    assert (
        "step 4: skipped, the loss of rank 1 is not finite (2 in a row, the run stops at 3)" in said
    )
    assert "  skipped 2" in said
    # Due after step 4, owed by step 5.
    assert checkpoints(tmp_path / "run") == ["step-2", "step-5", "step-6"]


@pytest.mark.parametrize("is_async", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_too_many_stop_the_run_and_keep_the_last_good_checkpoint(
    is_async: str, tiny: Tiny, pools: Pools, tmp_path: Path
) -> None:
    fate = dict.fromkeys(range(3, 7), "nan")
    limit = "training.max_skipped_steps=3"
    save = ("training.keep_last=1", f"training.async_save={is_async}")
    outcomes = run_on(pools, tiny, tmp_path / "run", fate, limit, *save)
    for outcome in outcomes:
        assert outcome.error.startswith("step 5: the loss or gradient was not finite in 3 steps in")
        assert "training.max_skipped_steps = 3" in outcome.error
        assert len(outcome.weights) == 5
    assert checkpoints(tmp_path / "run") == ["step-2"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("failed", "checkpoints/step-2")
    assert outcomes[0].error in status["reason"]
    # The same command goes on from there.
    again = run_on(pools, tiny, tmp_path / "run", {}, limit)
    assert "continuing from" in again[0].said
    assert [len(outcome.weights) for outcome in again] == [4, 4]
    assert checkpoints(tmp_path / "run")[-1] == "step-6"


@pytest.mark.parametrize("masking", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_flipped_bit_stops_the_run(
    masking: str, tiny: Tiny, pools: Pools, tmp_path: Path
) -> None:
    """At stage 0: with partitioned masters it would be overwritten by the next step."""
    overrides = ("training.check_interval=2", f"sdp.masking={masking}")
    overrides += ("zero_optimization.stage=0",)
    outcomes = run_on(pools, tiny, tmp_path / "run", {3: "flip"}, *overrides)
    for outcome in outcomes:
        assert outcome.error.startswith(
            "step 4: the weights of embedding are not the same on all ranks that hold them: rank 0 "
            "against rank 1; look at the hardware of these ranks, and go on from a checkpoint of "
            "step 2 or before"
        )
    assert checkpoints(tmp_path / "run") == ["step-2"]
    fine = run_on(pools, tiny, tmp_path / "fine", {}, *overrides)
    assert [outcome.error for outcome in fine] == ["", ""]


def test_a_spike_names_what_the_rank_read(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    steps = ("training.steps=20", "training.save_interval=0", "training.spike_factor=2")
    outcomes = run_on(pools, tiny, tmp_path / "run", {5: "large", 19: "large"}, *steps)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    [line] = [text for text in outcomes[0].said.splitlines() if "is a spike" in text]
    assert line.startswith("step 19: the loss of rank 1 is a spike: ")
    entries = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    [entry] = [entry for entry in entries if "incident" in entry]
    data = load_inputs(load_config(tiny.config), 2).train
    read = samples_at(1234, 18 * 8 + 4, 4, len(data)).tolist()  # the second half of the batch
    assert (entry["step"], entry["rank"], entry["incident"]) == (19, 1, "loss spike")
    assert [place["sample"] for place in entry["read"]] == read
    lengths = data.dataset.document_lengths()
    for place in entry["read"]:
        first, last = place["documents"]
        start, stop = int(lengths[:first].sum()), int(lengths[: last + 1].sum())
        assert start <= place["sample"] * SEQUENCE < start + lengths[first]
        assert stop - lengths[last] <= (place["sample"] + 1) * SEQUENCE < stop
