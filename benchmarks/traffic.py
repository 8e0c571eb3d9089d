"""Measure the bytes that every rank sends per step and compare them with the closed form.

python benchmarks/traffic.py --world_size 4 --coverage 1/2 --output docs/results/traffic.json

The ranks run in a network namespace of their own, so that the byte counter of its loopback
interface counts them alone, with all headers. That takes Linux, root and `ip`; without them the
bytes are counted where collectives are issued, and marked so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks._case import Case, tokens_of_step, train_step
from benchmarks._command import run_command
from benchmarks._network import counted_network, enter_loopback, loopback_bytes
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from sdp_llm.initialization import initialize
from sdp_llm.plan.cost import rank_traffic
from sdp_llm.subnetwork.measure import load_model_config

MIB = 2**20


def measure(case: Case, model: PretrainedConfig, steps: int) -> dict[str, int]:
    """Run on a rank: bytes of ``steps`` optimizer steps, after a first one that connects the ranks.

    ``interface`` are those of the loopback interface, of all ranks together; ``collectives`` are
    those of this rank as the library counts them.
    """
    engine, *_ = initialize(model, case.run_config())
    communicator = engine.sharded.communicator
    vocabulary = model.get_text_config().vocab_size
    marks = []
    for step in range(1 + steps):
        train_step(engine, tokens_of_step(case, vocabulary, step))
        if step in (0, steps):
            engine.wait_for_weights()
            dist.barrier()
            marks.append((loopback_bytes(), communicator.bytes_sent))
            dist.barrier()  # nobody goes on before all have read
    engine.destroy()
    interface, collectives = (end - start for start, end in zip(*marks, strict=True))
    return {"interface": interface, "collectives": collectives}


def _run_case(
    case: Case, model: PretrainedConfig, steps: int, network: str | None
) -> dict[str, Any]:
    """Bytes per rank and step of one case."""
    prepare = partial(enter_loopback, network)
    found = run_ranks(case.world_size, measure, case, model, steps, prepare=prepare)
    size, plan, setup = case.closed_form(model)
    predicted = [rank_traffic(size, plan, setup, rank) for rank in range(case.world_size)]
    mean = sum(predicted) / case.world_size
    collectives = [rank["collectives"] / steps for rank in found]
    sent = sum(collectives) / case.world_size
    if network is not None:
        sent = found[0]["interface"] / steps / case.world_size
    return {
        "case": asdict(case),
        "sent": sent,
        "collectives": collectives,
        "closed_form": predicted,
        "ratio": sent / mean,
        "collectives_ratio": sum(collectives) / sum(predicted),
    }


def _table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        n = result["case"]["world_size"]
        sizes = (result["sent"], *(sum(result[key]) / n for key in ("collectives", "closed_form")))
        cells = (f"{size / MIB:,.2f}" for size in sizes)
        rows.append([str(Case(**result["case"])), *cells, f"{result['ratio']:.4f}"])
    header = ["case", "measured, MiB", "at the collectives, MiB", "closed form, MiB", "ratio"]
    return markdown_table(header, rows)


_ABOUT = (
    "Bytes sent per rank and optimizer step, mean over the ranks. Measured is {method}. "
    "At the collectives is what the library counts itself."
)
_BY_INTERFACE = (
    "the byte counter of the loopback interface of a network namespace in which nothing but the "
    "ranks run, with all headers and acknowledgements, over {steps} steps after the first one, "
    "divided by steps and ranks"
)


def run(arguments: argparse.Namespace) -> None:
    """Measure every case, in a network of its own where there can be one, and write the tables."""
    model = load_model_config(arguments.model)
    dtypes = (False, True) if arguments.bf16 else (False,)
    results = []
    with counted_network("traffic") as network:
        for masking, is_bf16, stage, accumulation in product(
            arguments.masking, dtypes, arguments.stages, arguments.accumulation
        ):
            case = Case(
                arguments.world_size,
                arguments.coverage,
                stage,
                masking,
                is_bf16,
                accumulation,
                sequence_length=16,
            )
            results.append(_run_case(case, model, arguments.steps, network))
            print(_table(results[-1:]).splitlines()[-1], flush=True)
    is_counted = network is not None
    name = Path(arguments.model).stem
    method = _BY_INTERFACE.format(steps=arguments.steps)
    if not is_counted:
        method = "NOT counted by an interface but where collectives start"
    text = f"{_ABOUT.format(method=method)}\n\n{_table(results)}"
    print(f"\n{text}")
    title = f"Traffic of {name}, {arguments.world_size} ranks, C = {arguments.coverage}"
    counted_by = "interface" if is_counted else "collectives"
    content = {"model": name, "counted_by": counted_by, "results": results}
    write_results(Path(arguments.output), title, text, content)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="traffic", description=__doc__)
    parser.add_argument("--model", default="configs/model/llama_60m.json", help="a HF config")
    parser.add_argument("--world_size", type=int, default=4, help="number of gloo ranks")
    parser.add_argument("--coverage", default="1/2", help="share of the ranks per free block")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], choices=(0, 1, 2))
    parser.add_argument(
        "--masking", nargs="+", default=["forward", "backward"], choices=("forward", "backward")
    )
    parser.add_argument(
        "--accumulation", type=int, nargs="+", default=[1], help="micro-batches per step"
    )
    parser.add_argument("--bf16", action="store_true", help="measure bf16 weights too")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are counted")
    parser.add_argument("--output", required=True, help="JSON file; a .md is written beside it")
    return parser


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), run)


if __name__ == "__main__":
    sys.exit(main())
