"""Measure the time of an optimizer step over slow links, for data parallelism of several kinds.

python benchmarks/slow_network.py --gbits 10 1 0.1 --output docs/results/slow_network.json

The ranks run in network namespaces of their own, joined by links that are limited in both
directions. That takes Linux, root, `ip` and `tc`; without them nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks._case import tokens_of_step
from benchmarks._command import run_command
from benchmarks._network import Network, interface_bytes, star_network, why_no_star
from benchmarks._ranks import TIMEOUT_S, run_ranks
from benchmarks._record import write_results
from benchmarks._slow_page import Measured, draw, page
from benchmarks._start import start
from benchmarks._systems import System, Workload, closed_form, parse_system
from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.measure import load_model_config

SYSTEMS = (
    *("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_unsharded"),
    *("sdp:1/2:forward:2", "sdp:1/2:backward:2", "sdp:1/2:forward:1", "sdp:1:forward:2"),
)


def measure(
    system: System,
    workload: Workload,
    model: PretrainedConfig,
    network: Network,
    gbits: Sequence[float],
    steps: int,
) -> list[tuple[float, float]]:
    """Run on a rank: seconds and bytes that this rank sent, both per step, at each bandwidth.

    The system starts, and takes a first step, on links that are not limited. The seconds are
    those of the slowest rank.
    """
    running = start(system, workload, model)
    vocabulary = model.get_text_config().vocab_size
    case = workload.case(system)
    batches = [tokens_of_step(case, vocabulary, step) for step in range(1 + steps)]
    running.train_step(batches[0])
    running.wait()  # what it still gathers is not of the steps that are measured
    found = []
    for bandwidth in gbits:
        network.limit(dist.get_rank(), bandwidth)
        dist.barrier()
        sent, begin = interface_bytes(), time.perf_counter()
        for tokens in batches[1:]:
            running.train_step(tokens)
        running.wait()
        seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append((seconds.item() / steps, (interface_bytes() - sent) / steps))
        dist.barrier()  # no link changes before all have read
    running.close()
    return found


def _patience_s(sent: int, gbits: Sequence[float], steps: int) -> int:
    """How long a system may take that sends so many bytes per step."""
    return TIMEOUT_S + round(sum(10 * sent * 8 / (g * 1e9) for g in gbits) * steps)


def run(arguments: argparse.Namespace) -> None:
    """Measure every system in every round, and write the tables and the picture.

    :raises ConfigError: for a model or a system that does not exist.
    """
    for option in ("world_size", "sequence_length", "steps", "rounds"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option} {getattr(arguments, option)}: must be at least 1")
    reason = why_no_star()
    if reason is not None:
        raise ConfigError(f"{reason}; nothing was measured")
    model = load_model_config(arguments.model)
    workload = Workload(arguments.world_size, arguments.sequence_length, arguments.bf16)
    systems = [parse_system(text) for text in arguments.systems]
    bytes_of = {s: closed_form(s, workload, model).traffic.mean for s in systems}
    measured = [Measured(str(s), g, bytes_of[s]) for g in arguments.gbits for s in systems]
    with star_network(arguments.world_size, arguments.delay_ms) as network:
        for number in range(arguments.rounds):
            for system in systems:
                patience = _patience_s(bytes_of[system], arguments.gbits, arguments.steps)
                ranks = run_ranks(
                    arguments.world_size,
                    measure,
                    *(system, workload, model, network, arguments.gbits, arguments.steps),
                    prepare=network.enter,
                    timeout_s=patience,
                )
                entries = [entry for entry in measured if entry.system == str(system)]
                for entry, of_ranks in zip(entries, zip(*ranks, strict=True), strict=True):
                    entry.seconds.append(of_ranks[0][0])
                    entry.sent.append([sent for _, sent in of_ranks])
                seconds = ", ".join(f"{e.gbits:g} Gbit/s {e.seconds[-1]:.2f} s" for e in entries)
                print(f"round {number + 1}: {system}: {seconds}", flush=True)
    _write(arguments, workload, systems, measured, network.why_no_delay)


def _write(
    arguments: argparse.Namespace,
    workload: Workload,
    systems: Sequence[System],
    measured: Sequence[Measured],
    why_no_delay: str | None,
) -> None:
    output: Path = arguments.output
    name = Path(arguments.model).stem
    picture = output.with_suffix(".png")
    text = page(systems, workload, measured, arguments.steps)
    delay = f"{arguments.delay_ms:g} ms were added, one way"
    if why_no_delay is not None:
        delay = f"not measured ({why_no_delay}); the links add only what their queues hold"
    text += f"\n\nDelay: {delay}."
    print(f"\n{text}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if draw(measured, picture):
        text = f"![tokens per second]({picture.name})\n\n{text}"
    else:
        print("slow_network: no picture: it needs matplotlib (extra plots)", file=sys.stderr)
    content = {
        "model": name,
        "workload": asdict(workload),
        "steps": arguments.steps,
        "delay_ms": arguments.delay_ms if why_no_delay is None else None,
        "why_no_delay": why_no_delay,
        "results": [asdict(entry) for entry in measured],
    }
    title = f"Slow links: {name}, {workload.world_size} ranks, {workload.dtype}"
    write_results(output, title, text, content)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: give Gbit/s above 0 and at most 1000")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slow_network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="configs/model/llama_134m.json", help="a HF config")
    parser.add_argument("--world_size", type=int, default=4, help="number of gloo ranks")
    parser.add_argument("--sequence_length", type=int, default=32, help="tokens of a sample")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weights and what travels in bf16 (default), or all in fp32",
    )
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help="what is compared")
    parser.add_argument(
        "--gbits", type=_positive, nargs="+", default=[10.0, 1.0, 0.1], help="of each link"
    )
    parser.add_argument("--delay_ms", type=float, default=0.0, help="one way, with tc netem")
    parser.add_argument("--steps", type=int, default=1, help="timed steps per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each system is measured")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; page and picture are written beside it"
    )
    return parser


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), run)


if __name__ == "__main__":
    sys.exit(main())
