"""What a rank says when its device has no more memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdp_llm.activity import ACTIVITY
from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError, TrainingStopped
from sdp_llm.plan import schedule_from_config
from sdp_llm.plan.size import BlockSize, CostSetup, ModelSize, UnitSize
from sdp_llm.training import exhausted
from sdp_llm.training.prediction import Prediction

MIB, GIB = 2**20, 2**30
Line = Callable[..., str]
SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Of the allocated memory 75.00 GiB is allocated by PyTorch."
)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    """What rank 1 says in the fifth step, from its config, its prediction and its micro-batch."""
    monkeypatch.setattr(ACTIVITY, "step", 4)

    def said(config: dict[str, Any], prediction: Any, micro_batch: int = 8) -> str:
        monkeypatch.setattr(exhausted, "predict", lambda run, inputs: prediction)
        inputs: Any = SimpleNamespace(batch=SimpleNamespace(micro_batch=micro_batch))
        with (
            pytest.raises(TrainingStopped) as stopped,
            exhausted.out_of_memory_explained(parse_config(config), inputs, 1),
        ):
            raise torch.OutOfMemoryError(SAID)
        return str(stopped.value)

    return said


def test_the_line_has_what_is_predicted_and_what_would_need_less(line: Line) -> None:
    units = tuple(UnitSize(b, 256 * MIB, MIB) for b in range(4))
    size = ModelSize(units, (BlockSize(256 * MIB, GIB, GIB),) * 4, 0, 64, 128, 8)
    config = {"model": {"config": "model.json"}, "sdp": {"coverage": "1/2"}}
    schedule = schedule_from_config(parse_config(config).sdp, 2, 4, 10)
    prediction = Prediction(size, CostSetup(), schedule)
    memory = prediction.memory(1, 4)
    assert line(config, prediction) == (
        "step 5: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); predicted are "
        f"{memory.total / GIB:.1f} GiB: model state {memory.model_state / GIB:.1f}, transient "
        f"{memory.transient / GIB:.2f}, activations {memory.activations / GIB:.2f}; what needs "
        "less, first what costs least: training.loss_chunk = 1024, zero_optimization.stage = 2, "
        "train_micro_batch_size_per_gpu < 8, model.gradient_checkpointing = true, a lower "
        "sdp.coverage"
    )


def test_what_is_done_already_is_no_advice(line: Line) -> None:
    config = {
        "zero_optimization": {"stage": 2},
        "training": {"loss_chunk": 512},
        "model": {"config": "model.json", "gradient_checkpointing": True},
    }
    said = line(config, ConfigError("a model of experts"), micro_batch=1)
    assert said == (
        "step 5: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); what this model "
        "needs is not known; what needs less, first what costs least: a lower sdp.coverage"
    )


def test_other_errors_are_left_alone() -> None:
    inputs: Any = None
    with (
        pytest.raises(RuntimeError, match="something else"),
        exhausted.out_of_memory_explained(parse_config({}), inputs, 0),
    ):
        raise RuntimeError("something else")
