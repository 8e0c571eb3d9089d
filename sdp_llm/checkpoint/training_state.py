"""What a checkpoint says beside its tensors, and how an engine goes on from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdp_llm.config import RunConfig, to_dict
from sdp_llm.errors import ConfigError
from sdp_llm.optim import group_options
from sdp_llm.subnetwork.build import Subnetwork
from sdp_llm.versions import versions

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # attributes of DeepSpeed's engine


def training_state(
    engine: Any, run: RunConfig, subnetwork: Subnetwork, client_state: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ``state`` that an engine's checkpoint is saved with."""
    scheduler = engine.lr_scheduler
    plan = subnetwork.plan
    return {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "param_groups": group_options(engine.basic_optimizer),
        "client_state": dict(client_state or {}),
        # For the reader, and for comparing what a run goes on with.
        "config": to_dict(run),
        "model": subnetwork.config.to_dict(),
        "plan": {
            "world_size": plan.world_size,
            "owners": plan.owner_sets,
            "masking": subnetwork.masking,
        },
        "versions": versions(),
    }


def check_scheduler(scheduler: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Check that the learning-rate scheduler can go on as the saved one.

    :param folder: of the checkpoint, for the message.
    :raises ConfigError: it has none, or one of another kind or that ends before this one.
    """
    saved = state["scheduler"]
    if saved is None:
        raise ConfigError(
            f"{folder}: saved without a learning-rate scheduler; pass "
            "load_lr_scheduler_states=False, or remove scheduler from the config"
        )
    if saved.keys() != scheduler.state_dict().keys():
        raise ConfigError(
            f"{folder}: saved with another learning-rate scheduler than "
            f"{type(scheduler).__name__}; keep scheduler.type, or pass "
            "load_lr_scheduler_states=False"
        )
    # OneCycleLR's: it takes no step after its last.
    last, here = saved.get("total_steps"), getattr(scheduler, "total_steps", None)
    if last is not None and here is not None and last < here:
        raise ConfigError(
            f"{folder}: saved with a {type(scheduler).__name__} of total_steps = {last}, here it "
            f"has {here}; it goes on as the saved one, and that takes no step after its last: keep "
            "scheduler.params and the budget, or pass load_lr_scheduler_states=False"
        )


def adopt_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Go on as the saved scheduler, which :func:`check_scheduler` has let pass."""
    saved, here = state["scheduler"], scheduler.state_dict()
    scheduler.load_state_dict({name: _as_in(here[name], value) for name, value in saved.items()})


def _as_in(here: Any, saved: Any) -> Any:
    """A value that JSON has kept: its objects have no numbers as keys, as milestones do."""
    if isinstance(here, Counter):
        return Counter({int(key): n for key, n in saved.items()})
    if isinstance(here, dict):
        return {name: _as_in(here.get(name), value) for name, value in saved.items()}
    if isinstance(here, list) and len(here) == len(saved):  # the parts of a scheduler
        return [_as_in(*pair) for pair in zip(here, saved, strict=True)]
    return saved
