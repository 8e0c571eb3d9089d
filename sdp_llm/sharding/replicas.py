"""Whether the ranks that hold a unit hold the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.world import all_gather

_CHUNK = 1 << 20  # elements at a time: their int64 copies take 24 MiB
_GOLDEN = -0x61C8864680B583EB  # 2**64 over the golden ratio, odd, as a signed integer
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor) -> Tensor:
    """A hash of the bits of a 1-D tensor: int64, 0-D, on its device.

    The sum, modulo 2**64, of each element's bits times an odd number that depends on its position:
    one changed element always changes it, as an odd factor loses nothing. Integers add up to the
    same in any order, so the CPU and every GPU agree.
    """
    words = values.detach().view(_WORDS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        factors = torch.arange(start, start + part.numel(), device=values.device)
        total += (part * factors.mul_(_GOLDEN).bitwise_or_(1)).sum()
    return total


def differing_units(sharded: ShardedModel) -> dict[str, list[list[int]]]:
    """The units whose weights differ between the ranks that hold them. Collective over the world.

    Every rank holds the shared units, and its owners a block; under backward masking every rank
    holds all blocks. The checksums of all units travel in one all-gather, of 8 bytes a unit.

    :returns: for each such unit the ranks that agree with each other, the most first; on every
        rank the same.
    """
    subnetwork = sharded.subnetwork
    units = subnetwork.layout.units
    here = {unit.layout.name: unit for unit in sharded.units}
    row = torch.zeros(len(units), dtype=torch.int64, device=sharded.device)
    for i, layout in enumerate(units):
        if layout.name in here:
            row[i] = checksum(here[layout.name].flat[: layout.numel])
    rows = all_gather(row, "checksums of the weights")
    size = len(rows)
    is_everywhere = subnetwork.masking == "backward"
    holders = {u.name: range(size) if is_everywhere else subnetwork.owners(u) for u in units}
    return _disagreements(holders, rows.tolist())


def _disagreements(
    holders: Mapping[str, Sequence[int]], checksums: Sequence[Sequence[int]]
) -> dict[str, list[list[int]]]:
    """:func:`differing_units` from the ranks of each unit and all ranks' checksums of all units."""
    found = {}
    for i, (name, ranks) in enumerate(holders.items()):
        camps: dict[int, list[int]] = {}
        for rank in ranks:
            camps.setdefault(checksums[rank][i], []).append(rank)
        if len(camps) > 1:
            found[name] = sorted(camps.values(), key=lambda camp: (-len(camp), camp))
    return found
