"""From a subnetwork's structure to the units that store it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sdp_llm.activity import ACTIVITY
from sdp_llm.agree import agree
from sdp_llm.sharding.arrival import wait_before_use
from sdp_llm.sharding.collectives import Communicator
from sdp_llm.sharding.groups import OwnerGroups, create_owner_groups
from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.build import Subnetwork, initial_values
from sdp_llm.subnetwork.init import bind


@dataclass(frozen=True)
class ShardedModel:
    """A rank's subnetwork, the units that store it in forward order, and how they communicate.

    ``groups`` has the process group of every owner set that a phase of the run uses; ``hooks`` are
    those by which the model waits for the units.
    """

    subnetwork: Subnetwork
    units: tuple[Unit, ...]
    communicator: Communicator
    stage: int
    groups: OwnerGroups
    hooks: tuple[RemovableHandle, ...]

    @property
    def owned(self) -> tuple[Unit, ...]:
        """The units that this rank trains."""
        return tuple(unit for unit in self.units if unit.is_owner)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.units[0].dtype

    @property
    def device(self) -> torch.device:
        return self.units[0].device

    def wait(self) -> None:
        """Return when the weights of all units may be used."""
        for unit in self.units:
            unit.wait()


def materialize(
    subnetwork: Subnetwork,
    *,
    seed: int,
    stage: int,
    dtype: torch.dtype,
    communication_dtype: torch.dtype,
    device: torch.device,
    owner_sets: Sequence[tuple[int, ...]],
    timeout: timedelta,
) -> ShardedModel:
    """Give the subnetwork its values: stored in units, of which the parameters become views.

    Collective over the world. Peak memory: the units, and the fp32 values of one more.

    :param seed: of the initial values; unused where they are read from a checkpoint, or where the
        caller gave a model with values: then those of the lowest rank that holds a unit count.
    :param owner_sets: each that the run will use, in the same order on every rank.
    :param timeout: of the owner sets' process groups.
    :raises ConfigError: on every rank, when one finds no value for a parameter.
    """
    groups: OwnerGroups = {}
    create_owner_groups(groups, owner_sets, timeout)
    is_given = subnetwork.given is not None
    units: list[Unit] = []

    def make_units() -> None:
        for pieces, values in initial_values(subnetwork, seed):
            owners = subnetwork.owners(pieces[0])
            if is_given:
                _adopt_lowest_rank(subnetwork, groups, owners, values, device)
            for layout in pieces:
                unit = Unit(
                    layout,
                    values,
                    owners=owners,
                    group=groups[owners],
                    rank=subnetwork.rank,
                    stage=stage,
                    dtype=dtype,
                    device=device,
                )
                bind(subnetwork.model, unit.views(), subnetwork.layout.aliases)
                units.append(unit)
            ACTIVITY.beat()
            del values  # before the next unit's are drawn

    if is_given:
        make_units()  # a rank that failed alone would leave others in its broadcasts
    else:
        agree(make_units)
    if subnetwork.given is not None:
        subnetwork.given.clear()
    subnetwork.model.to(device)  # the buffers; every parameter is there already
    return ShardedModel(
        subnetwork,
        tuple(units),
        Communicator(device, communication_dtype),
        stage,
        groups,
        tuple(wait_before_use(subnetwork.model, units)),
    )


def _adopt_lowest_rank(
    subnetwork: Subnetwork,
    groups: OwnerGroups,
    owners: tuple[int, ...],
    values: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Overwrite ``values`` by those of the lowest rank that holds the unit, as DeepSpeed does."""
    holders = tuple(range(subnetwork.plan.world_size))
    if subnetwork.masking == "forward":
        holders = owners
    group = groups[holders]
    if group is None:
        return
    for value in values.values():
        travelling = value.to(device)
        with ACTIVITY.waiting("initial values", holders):
            dist.broadcast(travelling, holders[0], group=group)
        value.copy_(travelling)
