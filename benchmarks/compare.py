"""Measure memory and traffic of data parallelism of several kinds, next to the closed forms.

python benchmarks/compare.py --model configs/model/llama_60m.json --output docs/results/compare.json

Every system runs in fresh processes, all of them in a network namespace whose loopback interface
counts the bytes, where one can be made (Linux, root, `ip`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch.distributed as dist
from transformers import LlamaConfig, PretrainedConfig

from benchmarks import _compare_page
from benchmarks._case import tokens_of_step
from benchmarks._command import run_command
from benchmarks._network import counted_network, enter_loopback, loopback_bytes
from benchmarks._ranks import run_ranks
from benchmarks._record import write_results
from benchmarks._resident import reset_peak, resident
from benchmarks._start import start
from benchmarks._systems import PEERS, SDP, System, Workload, closed_form, parse_system
from benchmarks.allocator import record_allocations
from benchmarks.storages import sort_storages
from sdp_llm.subnetwork.measure import load_model_config

SDP_SYSTEMS = tuple(
    f"sdp:{coverage}:{masking}:{stage}"
    for coverage in ("1", "3/4", "1/2", "1/4")
    for masking in ("forward", "backward")
    for stage in (1, 2)
    if coverage != "1" or masking == "forward"
)
# DeepSpeed's engine makes its buffers, and every optimizer its moments, in the first step.
WARM_UP = 2


def measure(
    system: System, workload: Workload, model: PretrainedConfig, steps: int
) -> dict[str, Any]:
    """Run on a rank: bytes of memory in a step, and the bytes sent in ``steps`` steps.

    ``state`` are the storages that live between steps by category; ``activations`` what the
    forward pass adds to them until the backward pass starts; ``peak`` the most of all storages.
    ``resident`` is the peak resident size above that before building, when a tiny model
    has loaded the code; None where the system does
    not say; ``built`` the peak while building. ``interface`` is what all ranks sent, and
    ``collectives`` this rank as SDP counts it.
    """
    _load_code(workload)
    reset_peak()
    baseline = resident("VmRSS")
    running = start(system, workload, model)
    case, vocabulary = workload.case(system), model.get_text_config().vocab_size
    built = resident("VmHWM") - baseline
    for step in range(WARM_UP):
        running.train_step(tokens_of_step(case, vocabulary, step))
    running.wait()
    batch = tokens_of_step(case, vocabulary, WARM_UP)
    is_reset = reset_peak()
    running.train_step(batch)
    running.wait()
    resident_most = resident("VmHWM") - baseline if is_reset else None
    found = sort_storages(running.members())

    def step_and_wait(mark: Any) -> None:
        running.train_step(batch, mark)
        running.wait()

    allocated = record_allocations(step_and_wait)
    dist.barrier()
    sent, counted = loopback_bytes(), running.sent()
    dist.barrier()  # nobody sends before all have read
    for _ in range(steps):
        running.train_step(batch)
    running.wait()
    dist.barrier()
    sent, counted = loopback_bytes() - sent, running.sent() - counted
    dist.barrier()
    running.close()
    return {
        "state": {"weights": found.weights, "gradients": found.gradients}
        | {"optimizer": found.optimizer, "other": found.other},
        "others": [list(entry) for entry in found.others[:5]],
        "activations": allocated.at_mark,
        "peak": found.total + allocated.peak,
        "resident": resident_most,
        "built": built,
        "interface": sent,
        "collectives": counted,
    }


def _load_code(workload: Workload) -> None:
    """Train a tiny model for a step: what the system loads of libraries then is not the model's."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=256,
        max_position_embeddings=workload.sequence_length,
    )
    running = start(System(SDP), workload, config)
    running.train_step(tokens_of_step(workload.case(System(SDP)), config.vocab_size, 0))
    running.close()


def run(arguments: argparse.Namespace) -> None:
    """Measure every system and write the tables and the picture.

    :raises ConfigError: for a model or a system that does not exist.
    """
    model = load_model_config(arguments.model)
    workload = Workload(arguments.world_size, arguments.sequence_length, arguments.bf16)
    systems = [parse_system(text) for text in arguments.systems]
    results = []
    with counted_network("compare") as network:
        for system in systems:
            prepare = partial(enter_loopback, network)
            call = (system, workload, model, arguments.steps)
            ranks = run_ranks(workload.world_size, measure, *call, prepare=prepare)
            sent = ranks[0]["interface"]
            if network is None:
                sent = sum(rank["collectives"] for rank in ranks) if system.kind == SDP else None
            per_rank = None if sent is None else sent / arguments.steps / workload.world_size
            results.append(
                {
                    "system": str(system),
                    "is_sdp": system.kind == SDP,
                    "ranks": ranks,
                    "sent": per_rank,
                    "closed_form": asdict(closed_form(system, workload, model)),
                }
            )
            print(_compare_page.line(results[-1]), flush=True)
    name = Path(arguments.model).stem
    text = _compare_page.page(results, workload, arguments.steps, network is not None)
    print(f"\n{text}")
    picture = arguments.output.with_suffix(".png")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if _compare_page.draw(results, picture):
        text = f"![memory and traffic]({picture.name})\n\n{text}"
    content = {"model": name, "workload": asdict(workload), "results": results}
    title = f"Memory and traffic of {name}, {workload.world_size} ranks, {workload.dtype}"
    write_results(arguments.output, title, text, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("--model", default="configs/model/llama_60m.json", help="a HF config")
    parser.add_argument("--world_size", type=int, default=4, help="number of gloo ranks")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens per rank and step")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and messages")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are counted")
    parser.add_argument("--systems", nargs="+", default=[*PEERS, *SDP_SYSTEMS], help="to compare")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; a .md and a .png are beside it"
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about starting and stopping
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
