"""What data parallelism of several kinds would cost per rank on clusters that are not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from benchmarks._record import GIB, markdown_table
from benchmarks._time_model import Cluster, peer_step_time, sdp_step_time
from sdp_llm.plan import Plan, make_plan
from sdp_llm.plan.cost import sdp_cost
from sdp_llm.plan.peers import peer_cost
from sdp_llm.plan.size import CostSetup, ModelSize

WORLD_SIZES = tuple(2**i for i in range(3, 11))  # 8 to 1,024
SHOWN = (8, 64, 1024)
BY_NODE = ", by node"
PEERS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, no resharding")


@dataclass(frozen=True)
class Subnetworks:
    """A way to make plans for growing worlds: coverage or the owners of a block stay the same.

    With ``by_node`` the ranks of a node own the same blocks, otherwise the planner deals blocks to
    ranks as it always does.
    """

    coverage: Fraction | None = None
    owners: int | None = None
    by_node: bool = False

    def __str__(self) -> str:
        share = f"p = {self.owners}" if self.coverage is None else f"C = {self.coverage}"
        return f"SDP, {share}{BY_NODE if self.by_node else ''}"

    def plan(self, world_size: int, num_blocks: int, ranks_per_node: int) -> Plan | None:
        """The plan for a world; None where p or the owning nodes are not whole, or too few.

        Too few is when there is not a free block for each rank.
        """
        size = ranks_per_node if self.by_node else 1
        owners = Fraction(self.owners or 0)
        if self.coverage is not None:
            owners = self.coverage * world_size
        is_whole = world_size % size == 0 and (owners / size).denominator == 1
        is_possible = is_whole and 1 <= owners <= world_size
        if not is_possible or owners * (num_blocks - 2) < world_size:
            return None
        return make_plan(world_size, num_blocks, owners_per_block=int(owners), ranks_per_node=size)


def predict(
    size: ModelSize,
    subnetworks: Sequence[Subnetworks],
    clusters: Mapping[str, Cluster],
    world_sizes: Sequence[int] = WORLD_SIZES,
) -> list[dict[str, Any]]:
    """One entry per system and world size: bytes of memory and traffic, seconds by cluster.

    Everything is bf16 with fp32 masters, AdamW, NCCL; SDP masks forward, at stage 2. Memory is
    that of the rank that needs most, ``sent`` the mean over the ranks.

    :param clusters: by name; the first one's nodes are those of plans by node.
    """
    setup = CostSetup("forward", 2, 2, 2, backend="nccl")
    ranks_per_node = next(iter(clusters.values())).ranks_per_node
    entries = []
    for n in world_sizes:
        for peer in PEERS:
            cost = peer_cost(size, n, setup, peer)
            times = {c: peer_step_time(size, n, setup, at, peer) for c, at in _variants(clusters)}
            entries.append(_entry(peer, n, cost, times))
        for kind in subnetworks:
            plan = kind.plan(n, len(size.blocks), ranks_per_node)
            if plan is not None:
                cost = sdp_cost(size, plan, setup)
                times = {c: sdp_step_time(size, plan, setup, at) for c, at in _variants(clusters)}
                entries.append(_entry(str(kind), n, cost, times))
    return entries


def _variants(clusters: Mapping[str, Cluster]) -> Iterator[tuple[str, Cluster]]:
    """Each cluster as it is, and with one link for each owner set."""
    for name, cluster in clusters.items():
        yield name, cluster
        yield f"{name}, one link", replace(cluster, shares_links=False)


def _entry(system: str, world_size: int, cost: Any, times: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "system": system,
        "world_size": world_size,
        "memory": cost.memory.total,
        "model_state": cost.memory.model_state,
        "sent": cost.traffic.mean,
        "flops_per_token": cost.compute.maximum,
        "seconds": {name: asdict(time) | {"total": time.total} for name, time in times.items()},
    }


def series(entries: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The entries by system and world size."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["system"], {})[entry["world_size"]] = entry
    return found


def cost_table(entries: Sequence[dict[str, Any]]) -> str:
    """Memory and traffic at a few world sizes."""
    rows = []
    for system, by_size in series(entries).items():
        cells = [
            f"{by_size[n][name] / unit:,.1f}" if n in by_size else "-"
            for name, unit in (("memory", GIB), ("sent", 1e9))
            for n in SHOWN
        ]
        rows.append([system, *cells])
    header = [f"{name}, n = {n:,}" for name in ("memory, GiB", "sent, GB") for n in SHOWN]
    return markdown_table(["system", *header], rows)


def time_table(entries: Sequence[dict[str, Any]], cluster: str, has_nodes: bool) -> str:
    """Seconds per step by world size.

    :param has_nodes: whether nodes have several ranks: then also plans by node, and at the largest
        size the time with one link for each owner set.
    """
    sizes = sorted({entry["world_size"] for entry in entries})
    columns = [(n, cluster) for n in sizes]
    header = ["system", *(f"n = {n:,}" for n in sizes)]
    if has_nodes:
        columns.append((sizes[-1], f"{cluster}, one link"))
        header.append(f"{sizes[-1]:,}, one link")
    rows = []
    for system, by_size in series(entries).items():
        if system.endswith(BY_NODE) and not has_nodes:
            continue
        times = [
            by_size[n]["seconds"][name]["total"] if n in by_size else None for n, name in columns
        ]
        rows.append([system, *("-" if t is None else f"{t:,.3g}" for t in times)])
    return markdown_table(header, rows)
