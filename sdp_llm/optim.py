"""A run config's optimizer and scheduler on plain tensors, for training without an engine.

The engine lets DeepSpeed make both; here they are the torch classes that DeepSpeed takes for the
same names, and DeepSpeed's own schedulers.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from sdp_llm.config import RunConfig, optimizer_dict, scheduler_dict
from sdp_llm.errors import ConfigError


def build_optimizer(run: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer that the config's ``optimizer`` section names.

    :raises ConfigError: for Lion, which torch does not have.
    """
    assert run.optimizer is not None
    name, params = run.optimizer.type, optimizer_dict(run.optimizer)["params"]
    if name == "Lion":
        raise ConfigError('optimizer.type = "Lion": not available in a simulation; use "AdamW"')
    params.pop("torch_adam", None)
    if params.pop("adam_w_mode", True) and name == "Adam":
        name = "AdamW"  # as DeepSpeed reads it
    return getattr(torch.optim, name)(groups, **params)


def build_scheduler(run: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The scheduler that the config's ``scheduler`` section names, or None."""
    if run.scheduler is None:
        return None
    section = scheduler_dict(run.scheduler, total_steps)
    classes = lr_schedules if hasattr(lr_schedules, section["type"]) else torch.optim.lr_scheduler
    return getattr(classes, section["type"])(optimizer, **section["params"])
