"""Compare the time of an optimizer step between systems that take turns in the same processes.

python benchmarks/step_time.py --model configs/model/llama_10m.json --world_size 2 \
    --output docs/results/step_time.json

All systems are alive at once and take turns of a few steps, round by round in another order, so
that a busy machine hits all alike; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks._case import tokens_of_step
from benchmarks._command import run_command
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from benchmarks._start import start
from benchmarks._systems import SDP, System, Workload, closed_form, parse_system
from sdp_llm.subnetwork.measure import load_model_config

SYSTEMS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_unsharded", "ddp_checkpointing")
SDP_SYSTEMS = ("sdp:1", "sdp:1/2", "sdp:1/2:backward")
RIVALS = ("DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "FSDP2, no resharding")
FLOPS_GOAL = 1.05


def measure(
    systems: Sequence[System],
    workload: Workload,
    model: PretrainedConfig,
    rounds: int,
    steps: int,
) -> list[list[float]]:
    """Run on a rank: seconds per step of every system, by round, after a first turn each."""
    running = [start(system, workload, model) for system in systems]
    case, vocabulary = workload.case(systems[0]), model.get_text_config().vocab_size
    seconds: list[list[float]] = [[] for _ in systems]
    for number in range(1 + rounds):
        batches = [tokens_of_step(case, vocabulary, number * steps + i) for i in range(steps)]
        for turn in range(len(systems)):
            s = (turn + number) % len(systems)
            dist.barrier()
            begin = time.perf_counter()
            for tokens in batches:
                running[s].train_step(tokens)
            running[s].wait()
            dist.barrier()
            if number > 0:
                seconds[s].append((time.perf_counter() - begin) / steps)
    for one in running:
        one.close()
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


_ABOUT = """\
{ranks} ranks, one sample of {sequence} tokens each, AdamW, {dtype}; seconds per step are medians \
of {rounds} rounds of {steps} steps, from a barrier to the end of the slowest rank; ratios are \
medians of the rounds' ratios. The FLOP ratio counts products of matrices and attention alone: \
where compute takes all the time, it is what the ratio of times comes to."""


def report(results: Sequence[dict[str, Any]], workload: Workload, steps: int) -> str:
    """The table, and whether the goals are reached."""
    base = results[0]
    tokens = workload.world_size * workload.sequence_length
    rows = []
    for result in results:
        seconds = median(result["seconds"])
        cells = [f"{seconds:.3f}", f"{tokens / seconds:,.0f}"]
        cells.append(f"{ratio(result['seconds'], base['seconds']):.3f}")
        cells.append(f"{result['flops'] / base['flops']:.3f}")
        rows.append([result["system"], *cells])
    name = base["system"]
    header = ["system", "s/step", "tokens/s", f"time over {name}", f"FLOPs over {name}"]
    about = _ABOUT.format(
        ranks=workload.world_size,
        sequence=workload.sequence_length,
        dtype=workload.dtype,
        rounds=len(base["seconds"]),
        steps=steps,
    )
    return "\n\n".join((about, markdown_table(header, rows), "\n".join(_verdicts(results))))


def _verdicts(results: Sequence[dict[str, Any]]) -> list[str]:
    by_name = {result["system"]: result for result in results}
    full = by_name.get(str(System(SDP)))
    rivals = [by_name[name] for name in RIVALS if name in by_name]
    lines = []
    if full is not None and rivals:
        fastest = min(rivals, key=lambda rival: median(rival["seconds"]))
        found = ratio(full["seconds"], fastest["seconds"])
        verdict = "reached" if found <= 1 else "MISSED"
        lines.append(
            f"- {full['system']} over the fastest of {', '.join(r['system'] for r in rivals)} "
            f"({fastest['system']}): {found:.3f}; goal 1.00: {verdict}."
        )
    for result in results:
        if full is None or not result["is_sdp"] or result is full:
            continue
        found = ratio(result["seconds"], full["seconds"])
        flops = result["flops"] / full["flops"]
        verdict = "reached" if found <= FLOPS_GOAL * flops else "MISSED"
        lines.append(
            f"- {result['system']} over C = 1: {found:.3f}, FLOP ratio {flops:.3f}; goal "
            f"{FLOPS_GOAL * flops:.3f}: {verdict}."
        )
    return lines


def run(arguments: argparse.Namespace) -> None:
    """Measure all systems in one launch, and write the table.

    :raises ConfigError: for a model or a system that does not exist.
    """
    model = load_model_config(arguments.model)
    workload = Workload(arguments.world_size, arguments.sequence_length, arguments.bf16)
    systems = [parse_system(text) for text in arguments.systems]
    call = (systems, workload, model, arguments.rounds, arguments.steps)
    ranks = run_ranks(workload.world_size, measure, *call)
    results = [
        {
            "system": str(system),
            "is_sdp": system.kind == SDP,
            "seconds": [max(times) for times in zip(*(rank[s] for rank in ranks), strict=True)],
            "flops": closed_form(system, workload, model).compute.mean,
        }
        for s, system in enumerate(systems)
    ]
    name = Path(arguments.model).stem
    text = report(results, workload, arguments.steps)
    print(text)
    content = {"model": name, "workload": asdict(workload), "results": results}
    write_results(arguments.output, f"Step time of {name}", text, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="step_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="configs/model/llama_10m.json", help="a HF config")
    parser.add_argument("--world_size", type=int, default=2, help="number of gloo ranks")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and messages")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each system")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=[*SYSTEMS, *SDP_SYSTEMS],
        help="what is compared; the first is the base of the ratios",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; the page is beside it")
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
