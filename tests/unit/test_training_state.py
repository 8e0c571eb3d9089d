"""What an engine adopts from a checkpoint beside tensors, once JSON has kept it."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from sdp_llm.checkpoint.training_state import adopt_scheduler, check_scheduler
from sdp_llm.config import parse_config
from sdp_llm.config.deepspeed_keys import TORCH_SCHEDULERS
from sdp_llm.errors import ConfigError
from sdp_llm.optim import (
    adopt_options,
    build_optimizer,
    build_scheduler,
    check_options,
    group_options,
)

FOLDER = Path("step-7")
PARAMS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 9, 9, 12]},
    "CosineAnnealingLR": {"T_max": 20},
    "CosineAnnealingWarmRestarts": {"T_0": 6},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 30, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "WarmupLR": {"warmup_num_steps": 10},
    "WarmupCosineLR": {"total_num_steps": 30, "warmup_num_steps": 10},
}


# They cycle the momentum too, and write what they need for it into the parameter groups.
CYCLING: dict[str, dict[str, Any]] = {
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 30},
}
SEQUENTIAL = "SequentialLR"


def scheduled(name: str) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0, momentum=0.9)
    if name == SEQUENTIAL:
        return optimizer, in_parts(optimizer)
    classes = torch.optim.lr_scheduler if name in TORCH_SCHEDULERS else lr_schedules
    return optimizer, getattr(classes, name)(optimizer, **PARAMS.get(name, {}))


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def in_parts(optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler of one's own, whose state is a list of others' states."""
    parts = torch.optim.lr_scheduler
    warmup, then = parts.LinearLR(optimizer, 0.1, 1.0, 4), parts.MultiStepLR(optimizer, [5, 9, 9])
    return parts.SequentialLR(optimizer, [warmup, then], [4])


@pytest.mark.parametrize("name", sorted({*TORCH_SCHEDULERS, *PARAMS, SEQUENTIAL}))
def test_rates_go_on_as_if_never_stopped(name: str) -> None:
    straight = rates(*scheduled(name), 20)
    optimizer, scheduler = scheduled(name)
    first = rates(optimizer, scheduler, 7)
    state = {"scheduler": scheduler.state_dict(), "groups": group_options(optimizer)}
    kept = json.loads(json.dumps(state))
    optimizer, scheduler = scheduled(name)
    check_options(optimizer, kept["groups"], FOLDER)
    adopt_options(optimizer, kept["groups"], is_scheduled_on=True)
    check_scheduler(scheduler, kept, FOLDER)
    adopt_scheduler(scheduler, kept)
    assert first + rates(optimizer, scheduler, 13) == straight


def cycled(name: str, optimizer: torch.optim.Optimizer) -> Any:
    return getattr(torch.optim.lr_scheduler, name)(optimizer, **CYCLING[name])


def adam() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=0.5, betas=(0.7, 0.99))


def test_a_cycle_that_would_end_before_the_run_is_an_error() -> None:
    def cycle(total_steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(adam(), max_lr=0.5, total_steps=total_steps)

    saved = {"scheduler": json.loads(json.dumps(cycle(10).state_dict()))}
    check_scheduler(cycle(10), saved, FOLDER)
    check_scheduler(cycle(5), saved, FOLDER)
    with pytest.raises(ConfigError, match="a OneCycleLR of total_steps = 10, here it has 20; it"):
        check_scheduler(cycle(20), saved, FOLDER)


@pytest.mark.parametrize("name", CYCLING)
def test_cycles_go_on_as_if_never_stopped(name: str) -> None:
    def seen(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[Any]:
        group = optimizer.param_groups[0]
        return [(*rates(optimizer, scheduler, 1), *group["betas"]) for _ in range(count)]

    optimizer = adam()
    straight = seen(optimizer, cycled(name, optimizer), 20)
    optimizer = adam()
    scheduler = cycled(name, optimizer)
    first = seen(optimizer, scheduler, 7)
    state = {"scheduler": scheduler.state_dict(), "groups": group_options(optimizer)}
    kept = json.loads(json.dumps(state))
    optimizer = adam()
    scheduler = cycled(name, optimizer)
    check_options(optimizer, kept["groups"], FOLDER)
    adopt_options(optimizer, kept["groups"], is_scheduled_on=True)
    check_scheduler(scheduler, kept, FOLDER)
    adopt_scheduler(scheduler, kept)
    assert first + seen(optimizer, scheduler, 13) == straight


@pytest.mark.parametrize("name", CYCLING)
def test_a_cycle_is_no_other_optimizer(name: str) -> None:
    """Saved under a cycle and loaded without, and the reverse; the scheduler is to blame."""
    optimizer, plain = adam(), adam()
    scheduler = cycled(name, optimizer)
    options, now = group_options(plain), torch.optim.lr_scheduler.StepLR(plain, 3)
    check_options(optimizer, options, FOLDER)
    with pytest.raises(ConfigError, match=f"another learning-rate scheduler than {name}; keep"):
        check_scheduler(scheduler, {"scheduler": now.state_dict()}, FOLDER)
    rates(optimizer, scheduler, 3)
    check_options(plain, group_options(optimizer), FOLDER)
    with pytest.raises(ConfigError, match="another learning-rate scheduler than StepLR; keep"):
        check_scheduler(now, {"scheduler": scheduler.state_dict()}, FOLDER)


@pytest.mark.parametrize("name", CYCLING)
def test_a_cycle_that_does_not_go_on_leaves_nothing(name: str) -> None:
    optimizer, plain, other = adam(), adam(), adam()
    rates(optimizer, cycled(name, optimizer), 3)
    saved, keys = group_options(optimizer), plain.param_groups[0].keys()
    adopt_options(plain, saved, is_scheduled_on=False)
    assert plain.param_groups[0].keys() == keys
    assert plain.param_groups[0]["betas"] == (0.7, 0.99)
    assert plain.param_groups[0]["lr"] == saved[0]["lr"]
    torch.optim.lr_scheduler.OneCycleLR(other, max_lr=3.0, total_steps=30)
    adopt_options(other, saved, is_scheduled_on=False)
    assert other.param_groups[0]["max_lr"] == 3.0


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        *permutations(TORCH_SCHEDULERS, 2),
        *(("WarmupLR", "StepLR"), ("StepLR", "WarmupLR")),
    ],
)
def test_another_kind_of_scheduler_is_an_error(saved: str, now: str) -> None:
    state = {"scheduler": scheduled(saved)[1].state_dict()}
    with pytest.raises(ConfigError, match=f"another learning-rate scheduler than {now}; keep"):
        check_scheduler(scheduled(now)[1], state, FOLDER)


def test_what_an_optimizer_adds_when_it_begins_is_no_difference() -> None:
    """A scheduler notes the first rate; fused kernels may count their steps in the group."""
    optimizer, _ = scheduled("WarmupLR")
    saved = [{**options, "step": 7, "initial_lr": 0.5} for options in group_options(optimizer)]
    check_options(optimizer, saved, FOLDER)
    adopt_options(optimizer, saved, is_scheduled_on=True)
    assert optimizer.param_groups[0]["step"] == 7
    with pytest.raises(ConfigError, match="saved with another optimizer than SGD"):
        check_options(optimizer, [{**saved[0], "betas": [0.9, 0.95]}], FOLDER)


@pytest.mark.parametrize(
    ("kind", "params", "reason"),
    [
        ("LinearLR", {"start_factor": 2}, "Starting multiplicative factor"),
        ("OneCycleLR", {"max_lr": 1.0}, "total_steps"),
        ("OneCycleLR", {"max_lr": [1.0, 2.0], "total_steps": 10}, "same length"),
    ],
)
def test_parameters_that_a_scheduler_does_not_take(
    kind: str, params: dict[str, float], reason: str
) -> None:
    run = parse_config({"scheduler": {"type": kind, "params": params}})
    with pytest.raises(ConfigError, match=f"^scheduler.params: {kind} cannot .*{reason}.*; give"):
        build_scheduler(run, scheduled("StepLR")[0], 10)


@pytest.mark.parametrize(
    ("kind", "params", "reason"),
    [
        ("SGD", {"lr": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum and zero"),
    ],
)
def test_parameters_that_an_optimizer_does_not_take(
    kind: str, params: dict[str, Any], reason: str
) -> None:
    run = parse_config({"optimizer": {"type": kind, "params": params}})
    with pytest.raises(ConfigError, match=f"^optimizer.params: {kind} cannot .*{reason}.*; give"):
        build_optimizer(run, [{"params": [torch.zeros(2, requires_grad=True)]}])


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"total_steps": 9}, r"total_steps = 9"),
        ({"epochs": 3, "steps_per_epoch": 3}, r"epochs \* steps_per_epoch = 9"),
    ],
)
def test_a_cycle_of_fewer_steps_than_the_budget(params: dict[str, int], shown: str) -> None:
    run = parse_config({"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1.0, **params}}})
    with pytest.raises(ConfigError, match=rf"^scheduler\.params\.{shown}: the budget is 10 steps"):
        build_scheduler(run, adam(), 10)
    optimizer = adam()
    rates(optimizer, build_scheduler(run, optimizer, 9), 9)
