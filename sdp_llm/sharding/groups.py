"""One process group per distinct owner set."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from sdp_llm.activity import ACTIVITY

OwnerGroups = dict[tuple[int, ...], dist.ProcessGroup | None]


def create_owner_groups(
    groups: OwnerGroups, owner_sets: Iterable[tuple[int, ...]], timeout: timedelta
) -> None:
    """Add the process group of every owner set that has none yet; None for sets of one rank.

    Collective over the world: every rank creates every group, in one order, also those it is not
    in, because torch.distributed requires it. The set of all ranks uses the world group.
    """
    for owners in owner_sets:
        if owners in groups:
            continue
        if len(owners) == 1:
            groups[owners] = None
        elif len(owners) == dist.get_world_size():
            groups[owners] = dist.group.WORLD
        else:
            with ACTIVITY.waiting(f"process group of ranks {list(owners)}"):
                groups[owners] = dist.new_group(list(owners), timeout=timeout)
            ACTIVITY.beat()
