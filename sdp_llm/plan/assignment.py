"""Which ranks own which blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sdp_llm.config import SDPConfig
from sdp_llm.config.sdp_section import STRATEGIES
from sdp_llm.errors import ConfigError
from sdp_llm.plan.strategies import balanced_sets, cyclic_sets, random_sets


@dataclass(frozen=True)
class Plan:
    """Which ranks own which blocks.

    Attributes:
        world_size: number of ranks `n`.
        owner_sets: for each block, by global index, its ranks in ascending order; all ranks for a
            pinned block.
        pinned: indices of the pinned blocks, ascending.
        strategy: "balanced", "cyclic", "random" or "explicit".
        seed: seed of the strategy.
    """

    world_size: int
    owner_sets: tuple[tuple[int, ...], ...]
    pinned: tuple[int, ...]
    strategy: str
    seed: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks `L`, pinned ones included."""
        return len(self.owner_sets)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are not pinned, ascending."""
        pinned = set(self.pinned)
        return tuple(block for block in range(self.num_blocks) if block not in pinned)

    @property
    def distinct_owner_sets(self) -> tuple[tuple[int, ...], ...]:
        """Each owner set once, in order of first appearance; the world set comes first.

        The world set is always there, because the shared parameters use it.
        """
        world = tuple(range(self.world_size))
        return tuple(dict.fromkeys((world, *self.owner_sets)))

    @property
    def coverage(self) -> Fraction:
        """Mean of `p_b / n` over the free blocks; 1 when there is none."""
        free = self.free_blocks
        if not free:
            return Fraction(1)
        owners = sum(len(self.owner_sets[block]) for block in free)
        return Fraction(owners, self.world_size * len(free))

    def owners(self, block: int | None) -> tuple[int, ...]:
        """The ranks that train a block, ascending; None: the shared parameters, so all of them."""
        return tuple(range(self.world_size)) if block is None else self.owner_sets[block]

    def owns(self, rank: int, block: int) -> bool:
        """Whether `rank` trains `block`."""
        return rank in self.owner_sets[block]

    def owned_blocks(self, rank: int) -> tuple[int, ...]:
        """Indices of all blocks of a rank, pinned ones included, ascending."""
        return tuple(block for block in range(self.num_blocks) if self.owns(rank, block))

    def load(self, rank: int) -> int:
        """Number of free blocks that a rank owns."""
        return len(self.owned_blocks(rank)) - len(self.pinned)

    def fingerprint(self) -> str:
        """16 hex digits over world size and owner sets; ranks with the same plan agree on it."""
        text = f"{self.world_size}:{self.owner_sets}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plan(
    world_size: int,
    num_blocks: int,
    *,
    coverage: Fraction | None = None,
    owners_per_block: int | None = None,
    strategy: str = "balanced",
    seed: int = 0,
    pinned_first: int = 1,
    pinned_last: int = 1,
    ranks_per_node: int = 1,
    owner_sets: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Assign blocks to ranks; the same arguments give the same plan on every rank.

    :param world_size: number of ranks `n`.
    :param num_blocks: number of blocks `L`.
    :param coverage: share of the ranks that own each free block; `coverage * n` must be whole.
    :param owners_per_block: the same as a number of ranks `p`.
    :param strategy: how free blocks are assigned, see `strategies.py`.
    :param seed: of "random", and of the candidates of "balanced".
    :param pinned_first: how many of the first blocks every rank owns.
    :param pinned_last: how many of the last blocks every rank owns.
    :param ranks_per_node: so many ranks in a row own the same blocks: the strategy deals blocks to
        nodes, and their gradients travel between the owning nodes only.
    :param owner_sets: one list of ranks for each of the `L` blocks. What all ranks own is then
        pinned; strategy, pinned counts and nodes are ignored.
    :raises ConfigError: not exactly one of coverage, owners_per_block and owner_sets is given, a
        value breaks its rule, or a rank is left without a block.
    """
    if world_size < 1:
        raise ConfigError(f"world size = {world_size}: must be at least 1; start at least one rank")
    if num_blocks < 1:
        raise ConfigError(f"num_hidden_layers = {num_blocks}: must be at least 1; add a block")
    if sum(value is not None for value in (coverage, owners_per_block, owner_sets)) != 1:
        raise ConfigError(
            f"sdp.coverage = {coverage}, sdp.owners_per_block = {owners_per_block}, "
            f"sdp.owner_sets = {owner_sets}: exactly one must be given; keep one of the three"
        )
    if owner_sets is not None:
        explicit, pinned = _explicit(owner_sets, world_size, num_blocks)
        return Plan(world_size, explicit, pinned, "explicit", seed)
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"sdp.strategy = {strategy!r}: must be one of {', '.join(STRATEGIES)}; "
            "for sets of your own give sdp.owner_sets"
        )
    if coverage is not None:
        given, owners = f"sdp.coverage = {coverage}", _owners_from_coverage(coverage, world_size)
    else:
        assert owners_per_block is not None
        given, owners = f"sdp.owners_per_block = {owners_per_block}", owners_per_block
        _check_owners(owners, world_size)
    pinned = _pinned(num_blocks, pinned_first, pinned_last)
    num_free = num_blocks - len(pinned)
    _check_free_blocks(given, owners, world_size, num_free, num_blocks)
    _check_nodes(given, owners, world_size, ranks_per_node)
    nodes, owning = world_size // ranks_per_node, owners // ranks_per_node
    by_node = _free_sets(strategy, nodes, num_free, owning, seed)
    free_sets = (_ranks_of(nodes_of_block, ranks_per_node) for nodes_of_block in by_node)
    everyone = tuple(range(world_size))
    sets = tuple(everyone if block in pinned else next(free_sets) for block in range(num_blocks))
    return Plan(world_size, sets, pinned, strategy, seed)


def _ranks_of(nodes: Sequence[int], ranks_per_node: int) -> tuple[int, ...]:
    return tuple(node * ranks_per_node + k for node in nodes for k in range(ranks_per_node))


def _free_sets(
    strategy: str, world_size: int, num_free: int, owners: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    if strategy == "cyclic":
        return cyclic_sets(world_size, num_free, owners)
    if strategy == "random":
        return random_sets(world_size, num_free, owners, seed)
    return balanced_sets(world_size, num_free, owners, seed)


def _owners_from_coverage(coverage: Fraction, world_size: int) -> int:
    """`p = coverage * n`, or an error with the nearest coverages that this world size has."""
    exact = coverage * world_size
    if exact.denominator == 1 and 1 <= exact <= world_size:
        return int(exact)
    if world_size == 1:
        raise ConfigError(
            f"sdp.coverage = {coverage}: one rank can only train with coverage 1; "
            "add `--set sdp.coverage=1`, or start more ranks"
        )
    below = min(max(int(exact), 1), world_size)
    above = min(max(int(exact) + 1, 1), world_size)
    nearest = [str(Fraction(owners, world_size)) for owners in dict.fromkeys((below, above))]
    raise ConfigError(
        f"sdp.coverage = {coverage}: coverage times the world size {world_size} must be a whole "
        f"number of owners in 1..{world_size}, not {exact}; use {' or '.join(nearest)}"
    )


def _check_owners(owners: int, world_size: int) -> None:
    if not 1 <= owners <= world_size:
        nearest = min(max(owners, 1), world_size)
        raise ConfigError(
            f"sdp.owners_per_block = {owners}: must be in 1..{world_size} (the world size); "
            f"use {nearest}" + (", or start more ranks" if owners > world_size else "")
        )


def _check_nodes(given: str, owners: int, world_size: int, ranks_per_node: int) -> None:
    """Blocks must be able to go to whole nodes."""
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise ConfigError(
            f"sdp.ranks_per_node = {ranks_per_node}: must divide the world size {world_size}; use "
            "the ranks of a node, or 1 for plans without regard to nodes"
        )
    if owners % ranks_per_node:
        below = owners // ranks_per_node * ranks_per_node
        possible = [p for p in (below, below + ranks_per_node) if p]
        choices = " or ".join(f"{p} (coverage {Fraction(p, world_size)})" for p in possible)
        raise ConfigError(
            f"{given}: with sdp.ranks_per_node = {ranks_per_node} whole nodes own a block, so that "
            f"the number of its owners must be a multiple of that, not {owners}; use {choices}, "
            "or sdp.ranks_per_node = 1"
        )


def _pinned(num_blocks: int, first: int, last: int) -> tuple[int, ...]:
    for key, value in (("sdp.pinned_first", first), ("sdp.pinned_last", last)):
        if value < 0:
            raise ConfigError(f"{key} = {value}: must not be negative; use 0 to pin none")
    if first + last > num_blocks:
        raise ConfigError(
            f"sdp.pinned_first = {first}, sdp.pinned_last = {last}: together they must not exceed "
            f"the model's {num_blocks} blocks; pin fewer"
        )
    return (*range(first), *range(num_blocks - last, num_blocks))


def _check_free_blocks(
    given: str, owners: int, world_size: int, num_free: int, num_blocks: int
) -> None:
    """There must be something to cover, and a block for every rank."""
    if num_free == 0 and owners < world_size:
        raise ConfigError(
            f"{given}: sdp.pinned_first and sdp.pinned_last pin all {num_blocks} blocks and leave "
            "none to cover; pin fewer, or use coverage 1"
        )
    if num_free == num_blocks and num_free * owners < world_size:
        needed = -(-world_size // num_free)
        raise ConfigError(
            f"{given}: {num_free} free blocks with {owners} owners each leave some of the "
            f"{world_size} ranks without a block; use at least {needed} owners per block, or set "
            "sdp.pinned_first = 1"
        )


def _explicit(
    owner_sets: Sequence[Sequence[int]], world_size: int, num_blocks: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Check a user's owner sets; returns them sorted, and the blocks that all ranks own."""
    if len(owner_sets) != num_blocks:
        raise ConfigError(
            f"sdp.owner_sets = {len(owner_sets)} lists: must be one list of ranks for each of the "
            f"{num_blocks} blocks, pinned blocks included; give {num_blocks} lists"
        )
    for block, owners in enumerate(owner_sets):
        where = f"sdp.owner_sets[{block}] = {list(owners)}"
        if not owners:
            raise ConfigError(f"{where}: a block needs an owner; name at least one rank")
        if len(set(owners)) != len(owners):
            raise ConfigError(f"{where}: names a rank twice; name each rank once")
        strangers = [rank for rank in owners if not 0 <= rank < world_size]
        if strangers:
            raise ConfigError(
                f"{where}: rank {strangers[0]} contradicts the world size {world_size}, ranks are "
                f"0..{world_size - 1}; change the list, or start as many ranks as it names"
            )
    idle = sorted(set(range(world_size)).difference(*owner_sets))
    if idle:
        raise ConfigError(
            f"sdp.owner_sets: gives no block to rank {idle[0]} of world size {world_size}, every "
            "rank must own one; add it to a list, or start only as many ranks as the lists name"
        )
    sets = tuple(tuple(sorted(owners)) for owners in owner_sets)
    return sets, tuple(block for block, owners in enumerate(sets) if len(owners) == world_size)


def plan_from_config(sdp: SDPConfig, world_size: int, num_blocks: int) -> Plan:
    """The plan that the ``sdp`` section of a run config describes; raises like make_plan."""
    return make_plan(
        world_size,
        num_blocks,
        coverage=sdp.coverage,
        owners_per_block=sdp.owners_per_block,
        strategy=sdp.strategy,
        seed=sdp.seed,
        pinned_first=sdp.pinned_first,
        pinned_last=sdp.pinned_last,
        ranks_per_node=sdp.ranks_per_node,
        owner_sets=sdp.owner_sets,
    )
