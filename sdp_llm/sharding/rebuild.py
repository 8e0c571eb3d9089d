"""From one plan and masking to another, in memory and without a change of a bit.

What owners optimise (fp32 masters and optimizer state) travels straight to the new owners, unit by
unit; the weights are cast from it afterwards. A unit that keeps its owners and the ranks that store
it stays untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import torch

from sdp_llm.agree import agree, check_agreement
from sdp_llm.config.sdp_section import MASKINGS
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan
from sdp_llm.plan.move import Move, order
from sdp_llm.sharding.arrival import wait_before_use
from sdp_llm.sharding.groups import create_owner_groups
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.optimizer import parameter_groups
from sdp_llm.sharding.pieces import Description, Pieces, describe, exchange, put, take
from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.adapter import UnitLayout, find_blocks
from sdp_llm.subnetwork.build import Subnetwork
from sdp_llm.subnetwork.init import bind
from sdp_llm.subnetwork.masking import mask_blocks, restore_blocks
from sdp_llm.subnetwork.skippable import check_skippable, skips_blocks

Units = dict[str, Unit]  # of this rank, by name


def rebuild(
    sharded: ShardedModel,
    inner: torch.optim.Optimizer,
    plan: Plan,
    masking: str,
    *,
    decay_all: bool,
    timeout: timedelta,
) -> tuple[ShardedModel, list[Unit]]:
    """Go over to another plan and masking. Collective over the world.

    ``sharded`` is of no use afterwards. Memory: gradients, and weights that this rank must not
    keep, are given up first; then it holds at most one unit beyond the larger of what it holds
    before and after, in all changes that were tried (:func:`~sdp_llm.plan.move.order`).

    :param inner: on the groups of :func:`~sdp_llm.sharding.optimizer.parameter_groups`; it and its
        groups stay the same objects.
    :param timeout: of the process groups of owner sets that are new.
    :returns: what to go on with, and this rank's units whose weights must be distributed yet.
    :raises ConfigError: on every rank, and nothing has changed, when the plan does not fit the run
        or differs between ranks, when blocks would be skipped that cannot be, when gradients are
        accumulated, or when the optimizer has other groups.
    """
    before = sharded.subnetwork
    check_agreement("change_plan: the plan", lambda: f"{plan.fingerprint()} {masking}")
    after = replace(before, plan=plan, masking=masking)
    known = _agree(sharded, inner, after, decay_all)
    changed = _changed(before, after)
    create_owner_groups(sharded.groups, plan.distinct_owner_sets, timeout)
    for hook in sharded.hooks:
        hook.remove()
    for group in inner.param_groups:
        group["params"] = []
    model = before.model
    _, blocks = find_blocks(model)
    restore_blocks(blocks, before.absent)
    units = {unit.layout.name: unit for unit in sharded.units}
    held = _give_up(units, changed, after, inner)
    _move(held, changed, sharded, after, known)
    absent = mask_blocks(blocks, plan.owned_blocks(after.rank), masking)
    after.residual_scale.set(plan, masking)
    after = replace(after, absent=absent)
    for part in changed:
        if after.holds(part) and part.name not in units:
            unit = units[part.name] = _store(part, sharded, after)
            if unit.is_owner:
                put(unit, held.pop(part.name), inner, known)
    model.to(sharded.device)  # the buffers of blocks that were absent
    stored = tuple(units[part.name] for part in before.layout.units if part.name in units)
    hooks = tuple(wait_before_use(model, stored))
    result = replace(sharded, subnetwork=after, units=stored, hooks=hooks)
    fresh = parameter_groups(result.owned, decay_all)
    for group, slices in zip(inner.param_groups, fresh, strict=True):
        group["params"] = slices["params"]
    return result, [units[part.name] for part in changed if part.name in units]


def _changed(before: Subnetwork, after: Subnetwork) -> list[UnitLayout]:
    """The units of which a rank, this or another, is to store something else."""
    is_other_masking = before.masking != after.masking
    return [
        part
        for part in before.layout.units
        if before.owners(part) != after.owners(part)
        or (is_other_masking and len(after.owners(part)) < after.plan.world_size)
    ]


def _agree(
    sharded: ShardedModel, inner: torch.optim.Optimizer, after: Subnetwork, decay_all: bool
) -> Description:
    """Check that all ranks can change, and tell each what the owners' optimizers keep."""

    def check() -> Description:
        _check(sharded, inner, after, decay_all)
        names = {part.name for part in _changed(sharded.subnetwork, after)}
        return describe([unit for unit in sharded.owned if unit.layout.name in names], inner)

    return {name: state for part in agree(check) for name, state in part.items()}


def _check(
    sharded: ShardedModel, inner: torch.optim.Optimizer, after: Subnetwork, decay_all: bool
) -> None:
    old, new = sharded.subnetwork.plan, after.plan
    if (new.world_size, new.num_blocks) != (old.world_size, old.num_blocks):
        raise ConfigError(
            f"change_plan: the plan is for {new.world_size} ranks and {new.num_blocks} blocks, the "
            f"run has {old.world_size} and {old.num_blocks}; make a plan for these"
        )
    if after.masking not in MASKINGS:
        raise ConfigError(
            f"change_plan: masking = {after.masking!r}: must be one of {', '.join(MASKINGS)}"
        )
    if skips_blocks(new, after.masking) and not skips_blocks(old, sharded.subnetwork.masking):
        check_skippable(after.model)
    if any(unit.grad.any() for unit in sharded.owned):
        raise ConfigError(
            "change_plan: gradients are accumulated, which stay where they are; change the plan "
            "between optimizer steps, or call engine.zero_grad() before"
        )
    made = [{id(p) for p in group["params"]} for group in inner.param_groups]
    given = parameter_groups(sharded.owned, decay_all)
    if made != [{id(p) for p in group["params"]} for group in given]:
        raise ConfigError(
            "change_plan: the optimizer has other parameter groups than the two that it was made "
            "from, and what arrives belongs to one of those; keep them, in their order"
        )


def _give_up(
    units: Units, changed: Sequence[UnitLayout], after: Subnetwork, inner: torch.optim.Optimizer
) -> dict[str, Pieces]:
    """Free the storage of what changes here; what this rank optimised of it is kept apart."""
    held = {}
    for part in changed:
        unit = units.get(part.name)
        if unit is None or (unit.is_owner and unit.owners == after.owners(part)):
            continue
        if unit.is_owner:
            held[part.name] = take(unit, inner)
        for spec in part.parameters:
            # Graphs of passes that are over refer to the parameter still, and would to its data.
            parameter = after.model.get_parameter(spec.name)
            parameter.data = parameter.new_empty(0)
        empty = {spec.name: torch.empty(spec.shape, device="meta") for spec in part.parameters}
        bind(after.model, empty, after.layout.aliases)
        unit.release()
        del units[part.name]
    return held


def _move(
    held: dict[str, Pieces],
    changed: Sequence[UnitLayout],
    sharded: ShardedModel,
    after: Subnetwork,
    known: Description,
) -> None:
    """Turn what this rank holds into what it is to hold, one unit after the other."""
    before = sharded.subnetwork
    moves = []
    for part in changed:
        move = Move(part.numel, before.owners(part), after.owners(part))
        if move.old != move.new:
            moves.append((part, move))
    stage, world_size = sharded.stage, after.plan.world_size
    for i in order([move for _, move in moves], world_size, stage):
        part, move = moves[i]
        held[part.name] = exchange(
            part,
            move,
            held.pop(part.name, {}),
            known,
            sharded.communicator,
            rank=after.rank,
            stage=stage,
            device=sharded.device,
        )


def _store(part: UnitLayout, sharded: ShardedModel, after: Subnetwork) -> Unit:
    """A unit that is new on this rank, of which the model's parameters become views."""
    owners = after.owners(part)
    unit = Unit(
        part,
        None,
        owners=owners,
        group=sharded.groups[owners],
        rank=after.rank,
        stage=sharded.stage,
        dtype=sharded.dtype,
        device=sharded.device,
    )
    bind(after.model, unit.views(), after.layout.aliases)
    return unit
