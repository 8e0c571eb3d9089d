"""One process group per distinct owner set."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan

OwnerGroups = dict[tuple[int, ...], dist.ProcessGroup | None]


def create_owner_groups(plan: Plan, timeout: timedelta) -> OwnerGroups:
    """The process group of every distinct owner set, None for sets of one rank.

    Collective over the world: every rank creates every group, in one order, also those it is not
    in, because torch.distributed requires it. The set of all ranks uses the world group.
    """
    world = tuple(range(plan.world_size))
    groups: OwnerGroups = {world: dist.group.WORLD if plan.world_size > 1 else None}
    for owners in plan.distinct_owner_sets:
        if owners in groups:
            continue
        is_single = len(owners) == 1
        groups[owners] = None if is_single else dist.new_group(list(owners), timeout=timeout)
    return groups


def check_agreement(what: str, fingerprint: str) -> None:
    """Compare a fingerprint between all ranks.

    :raises ConfigError: on every rank, naming the ranks that differ from rank 0.
    """
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    different = [rank for rank, value in enumerate(found) if value != found[0]]
    if different:
        raise ConfigError(
            f"{what} on ranks {different} differs from rank 0's ({found[different[0]]} against "
            f"{found[0]}): start every rank with the same files and arguments"
        )
