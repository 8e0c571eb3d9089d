"""That our tables agree with the installed DeepSpeed and torch, and DeepSpeed takes our dict."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
from deepspeed.monitor.config import WandbConfig as DeepSpeedWandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

from sdp_llm.config import (
    BF16Config,
    FileMonitorConfig,
    WandbConfig,
    ZeroConfig,
    deepspeed_dict,
    parse_config,
)
from sdp_llm.config import deepspeed_keys as tables
from sdp_llm.errors import ConfigError


def deepspeed_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    return names | {field.alias for field in model.model_fields.values() if field.alias}


@pytest.mark.parametrize(
    ("section", "model", "ours"),
    [
        ("zero_optimization", DeepSpeedZeroConfig, ZeroConfig),
        ("bf16", DeepSpeedBF16Config, BF16Config),
        ("tensorboard", TensorBoardConfig, FileMonitorConfig),
        ("csv_monitor", CSVConfig, FileMonitorConfig),
        ("wandb", DeepSpeedWandbConfig, WandbConfig),
    ],
)
def test_every_key_of_deepspeed_is_honoured_or_refused_by_name(
    section: str, model: type[BaseModel], ours: type
) -> None:
    honoured = {item.name for item in fields(ours)}
    assert honoured <= deepspeed_names(model)
    for name in deepspeed_names(model) - honoured:
        with pytest.raises(ConfigError, match="valid in DeepSpeed but not supported together"):
            parse_config({section: {name: 1}})


def test_removed_keys_are_those_of_deepspeed() -> None:
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(tables.REMOVED) == removed


@pytest.mark.parametrize("name", sorted(tables.SCHEDULERS))
def test_scheduler_parameters_are_those_of_deepspeed(name: str) -> None:
    signature = inspect.signature(getattr(lr_schedules, name).__init__).parameters
    assert {"self", "optimizer", *tables.SCHEDULERS[name]} == set(signature)
    required = [key for key, value in signature.items() if value.default is value.empty]
    if name == "WarmupDecayLR":
        required.append("warmup_max_lr")  # ours: DeepSpeed's default is seldom what is meant
    assert required == ["self", "optimizer", *tables.REQUIRED_SCHEDULER_PARAMS.get(name, ())]


def test_torch_schedulers_exist() -> None:
    known = {*tables.TORCH_SCHEDULERS, *tables.UNSUPPORTED_SCHEDULERS, "LRScheduler"}
    assert known == set(torch.optim.lr_scheduler.__all__)


@pytest.mark.parametrize("name", tables.TORCH_SCHEDULERS)
def test_scheduler_parameters_are_those_of_torch(name: str) -> None:
    signature = inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters
    functions = {"scale_fn"} & set(signature)
    assert {"optimizer", *functions, *tables.TORCH_SCHEDULERS[name]} == set(signature)
    required = [key for key, value in signature.items() if value.default is value.empty]
    assert required == ["optimizer", *tables.REQUIRED_SCHEDULER_PARAMS.get(name, ())]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop"])
def test_optimizer_parameters_are_those_of_torch(name: str) -> None:
    only_deepspeed = {"torch_adam", "adam_w_mode"}
    signature = set(inspect.signature(getattr(torch.optim, name).__init__).parameters)
    assert set(tables.OPTIMIZERS[name]) - only_deepspeed <= signature


def test_deepspeed_accepts_the_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 4)
    config = parse_config(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "adamw", "params": {"lr": 1e-3}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": "auto", "warmup_max_lr": 1e-3},
            },
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "communication_data_type": "fp32",
            "csv_monitor": {"enabled": True, "output_path": "logs"},
            "wandb": {"enabled": False},
            "wall_clock_breakdown": True,
        }
    )
    result = deepspeed_config.DeepSpeedConfig(deepspeed_dict(config, 4, 100))
    assert result.world_size == 4
    assert result.gradient_accumulation_steps == 2
    assert result.optimizer_name == "adamw"
    assert result.scheduler_params == {"total_num_steps": 100, "warmup_max_lr": 1e-3}
    assert result.zero_optimization_stage == 0
    assert result.gradient_clipping == 0.0
    assert result.steps_per_print is None
    assert result.bfloat16_config.enabled
    assert result.communication_data_type is torch.float32
    assert result.monitor_config.csv_monitor.output_path == "logs"
    assert result.wall_clock_breakdown
