"""A run config's optimizer and scheduler as torch classes, and the options of a saved optimizer.

The engine lets DeepSpeed make both; for training without an engine, here are the torch classes that
DeepSpeed takes for the same names, and DeepSpeed's own schedulers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch import Tensor

from sdp_llm.config import RunConfig, optimizer_dict, scheduler_dict
from sdp_llm.errors import ConfigError


def build_optimizer(run: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer that the config's ``optimizer`` section names.

    :raises ConfigError: it does not take the parameters.
    """
    assert run.optimizer is not None
    name, params = run.optimizer.type, optimizer_dict(run.optimizer)["params"]
    params.pop("torch_adam", None)
    if params.pop("adam_w_mode", True) and name == "Adam":
        name = "AdamW"  # as DeepSpeed reads it
    with wrong_parameters_explained("optimizer", name):
        return getattr(torch.optim, name)(groups, **params)


def build_scheduler(run: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The scheduler that the config's ``scheduler`` section names, or None.

    :raises ConfigError: it does not take the parameters.
    """
    if run.scheduler is None:
        return None
    section = scheduler_dict(run.scheduler, total_steps)
    classes = lr_schedules if hasattr(lr_schedules, section["type"]) else torch.optim.lr_scheduler
    with wrong_parameters_explained("scheduler", section["type"]):
        return getattr(classes, section["type"])(optimizer, **section["params"])


@contextmanager
def wrong_parameters_explained(section: str, kind: str) -> Iterator[None]:
    """Within, what an optimizer or a scheduler says of its parameters becomes one line.

    :param section: "optimizer" or "scheduler".
    :raises ConfigError: for what they raise where parameters are wrong.
    """
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ConfigError(
            f"{section}.params: {kind} cannot be made with them: {reason}; give those that its "
            "documentation allows"
        ) from error


def check_made(
    optimizer: Any, given: Sequence[Sequence[Tensor]], *, must_keep_groups: bool
) -> None:
    """Check what a caller's function has made of parameter groups.

    :param given: the tensors of each group that it was given.
    :param must_keep_groups: whether other tensors will come into these groups.
    :raises ConfigError: it does not optimise all of them, or in other groups, or with options that
        no checkpoint can keep.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer: the function returned a {type(optimizer).__name__}; return the "
            "torch.optim.Optimizer that it makes"
        )
    made = [{id(tensor) for tensor in group["params"]} for group in optimizer.param_groups]
    wanted = [{id(tensor) for tensor in tensors} for tensors in given]
    left_out = set().union(*wanted) - set().union(*made)
    if left_out:
        raise ConfigError(
            f"optimizer: the function leaves out {len(left_out)} of the "
            f"{sum(map(len, wanted))} tensors that it was given; pass all groups on to the "
            "optimizer, and give those that must not move an lr of 0"
        )
    if must_keep_groups and made != wanted:
        raise ConfigError(
            f"optimizer: the function makes {len(made)} parameter groups of other tensors than the "
            f"{len(wanted)} that it was given, and when sdp.schedule or sdp.rotate_every changes "
            "the plan, what arrives belongs to one of those; keep them, in their order"
        )
    for options in group_options(optimizer):
        for name, value in options.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ConfigError(
                    f"optimizer: {name} of a parameter group is a {type(value).__name__}, which "
                    "checkpoints cannot keep; give plain numbers, as float(...) makes"
                ) from error


# What torch's schedulers write into a parameter group, beside what they change there.
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}
# A scheduler that has noted this cycles these.
_NOTE_OF_CYCLES, _CYCLED = "max_momentum", {"momentum", "betas"}
# What an optimizer adds only when it begins.
_OF_BEGUN = {"step"}


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each parameter group is optimised with: all of it but the parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def check_options(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], folder: Path
) -> None:
    """Check that the optimizer can go on with saved :func:`group_options`.

    :param folder: of the checkpoint, for the message.
    :raises ConfigError: they are another optimizer's.
    """
    groups = optimizer.param_groups
    if len(saved) != len(groups) or not all(
        _is_of(optimizer, *pair) for pair in zip(groups, saved, strict=True)
    ):
        raise ConfigError(
            f"{folder}: saved with another optimizer than {type(optimizer).__name__}; use that "
            "one, or pass load_optimizer_states=False"
        )


def _is_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], options: dict[str, Any]
) -> bool:
    """Whether saved options are those of this optimizer, whatever scheduler there was or is."""
    own = group.keys() & optimizer.defaults.keys()
    return own <= options.keys() and options.keys() - _OF_SCHEDULERS - _OF_BEGUN <= group.keys()


def adopt_options(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], *, is_scheduled_on: bool
) -> None:
    """Go on with saved :func:`group_options`, which :func:`check_options` has let pass.

    :param is_scheduled_on: whether the saved scheduler goes on too. Otherwise what that one wrote
        stays behind, and what it cycled is as it is here, unless it is cycled here too.
    """
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        left = set() if is_scheduled_on else set(_OF_SCHEDULERS)
        if left and _NOTE_OF_CYCLES in options and _NOTE_OF_CYCLES not in group:
            left |= _CYCLED
        group.update({name: value for name, value in options.items() if name not in left})
