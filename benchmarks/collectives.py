"""Compare gloo's collectives with the same bytes sent straight between pairs of ranks.

python benchmarks/collectives.py --world_size 2 --output docs/results/collectives.json

All take turns in the same processes; seconds are medians, from a barrier to the slowest rank's end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch
import torch.distributed as dist

from benchmarks._command import run_command
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from sdp_llm.sharding.collectives import Communicator

MIB = 2**20
REDUCE, GATHER = "reduce-scatter", "all-gather"
WAYS = (
    ("all-reduce", "all_reduce"),
    (REDUCE, "all_to_all_single"),
    (REDUCE, "between pairs (sdp_llm)"),
    (GATHER, "all_gather_single"),
    (GATHER, "between pairs (sdp_llm)"),
)


def measure(mebibytes: int, rounds: int) -> list[list[float]]:
    """Run on a rank: the seconds of every round, by way."""
    group = dist.group.WORLD
    assert group is not None
    n, rank = group.size(), group.rank()
    full = torch.ones(mebibytes * MIB // 4 // n * n)
    other = torch.empty_like(full)
    communicator = Communicator(full.device, full.dtype)
    received = full.new_empty(communicator.received_numel(full.numel(), group))
    own = full.view(n, -1)[rank]
    actions: tuple[Callable[[], object], ...] = (
        lambda: dist.all_reduce(full),
        lambda: dist.all_to_all_single(other, full),
        lambda: communicator.reduce_scatter(full, received, group)[1].wait(),
        lambda: dist.all_gather_single(full, own),
        lambda: communicator.all_gather(full, group).wait(),
    )
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(1 + rounds):
        for action, found in zip(actions, seconds, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            action()
            found.append(time.perf_counter() - begin)
    return [found[1:] for found in seconds]


_ABOUT = """\
{mebibytes} MiB of fp32 on {ranks} gloo ranks over the loopback interface, medians of {rounds} \
rounds in which all take turns. The additions after a reduce-scatter between pairs, and after an \
all-to-all, are not in it. An all-reduce sends twice as much as the others."""


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write the table."""
    ranks = run_ranks(arguments.world_size, measure, arguments.mebibytes, arguments.rounds)
    rows, results = [], []
    for i, (operation, way) in enumerate(WAYS):
        seconds = [max(times) for times in zip(*(rank[i] for rank in ranks), strict=True)]
        results.append({"operation": operation, "way": way, "seconds": seconds})
        rows.append([operation, way, f"{median(seconds) * 1e3:.1f}"])
    about = _ABOUT.format(
        mebibytes=arguments.mebibytes, ranks=arguments.world_size, rounds=arguments.rounds
    )
    text = f"{about}\n\n{markdown_table(['operation', 'way', 'ms'], rows)}"
    print(text)
    write_results(arguments.output, "Collectives on gloo", text, {"results": results})


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world_size", type=int, default=2, help="number of gloo ranks")
    parser.add_argument("--mebibytes", type=int, default=40, help="of the whole tensor")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the page is beside it")
    return run_command(parser, run)


if __name__ == "__main__":
    sys.exit(main())
