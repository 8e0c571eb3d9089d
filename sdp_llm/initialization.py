"""What a training loop calls: from a model and a config to the engine and what belongs to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sdp_llm.config import RunConfig, load_config, parse_config
from sdp_llm.engine import SDPEngine
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.from_config import Source
from sdp_llm.sharding.optimizer import ShardedOptimizer


def initialize(
    model: Source,
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    training_data: Any = None,
    collate_fn: Any = None,
    total_num_steps: int | None = None,
) -> tuple[SDPEngine, ShardedOptimizer, Any, Any]:
    """What ``deepspeed.initialize`` is to DeepSpeed: one call from a model and a config.

    Collective over the world; starts torch.distributed where it is not yet.

    :param model: a HuggingFace config of a decoder-only model, of which each rank builds its
        subnetwork alone; or a model, of which each rank keeps its subnetwork.
    :param config: a run config, its ``model``, ``data`` and ``training`` sections optional. Where
        ``model.init_from`` names a checkpoint, a rank reads its subnetwork's weights from it.
    :param optimizer: makes an element-wise optimizer from parameter groups, instead of the
        config's ``optimizer``: of all tensors in them, and where the plan changes, in these groups.
    :param lr_scheduler: makes a scheduler from an optimizer, instead of the config's.
    :param total_num_steps: the budget: that of ``sdp.schedule``, and what
        ``scheduler.params.total_num_steps: "auto"`` stands for.
    :returns: engine, optimizer, dataloader (None without ``training_data``) and scheduler.
    :raises ConfigError: for a wrong config, a model without a single list of blocks, or an
        ``optimizer`` that makes another one; for ``sdp.memory_limit_gib`` without a ``data``
        section.
    """
    if isinstance(config, RunConfig):
        run = config
    elif isinstance(config, Mapping):
        run = parse_config(config)
    else:
        run = load_config(Path(config))
    if run.sdp.memory_limit_gib is not None and run.data is None:
        raise ConfigError(
            f"sdp.memory_limit_gib = {run.sdp.memory_limit_gib:g}: memory cannot be predicted "
            "without data.sequence_length; remove it, or ask launch/plan.py before the run"
        )
    for name, value in {"optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
        if value is not None and not callable(value):
            raise ConfigError(
                f"{name}: {type(value).__name__} is an instance; the parameters that a rank "
                "optimises exist only inside the engine: pass a function that makes it from them"
            )
    engine = SDPEngine(
        model,
        run,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        training_data=training_data,
        collate_fn=collate_fn,
        total_num_steps=total_num_steps,
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler
