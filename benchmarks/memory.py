"""Measure the memory of every rank and compare it with the closed forms.

python benchmarks/memory.py --model configs/model/llama_60m.json --world_size 4 --coverage 1/2 \
    --output docs/results/memory_60m.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from transformers import PretrainedConfig

from benchmarks._case import Case, tokens_of_step, train_step
from benchmarks._command import run_command
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from benchmarks._resident import resident
from benchmarks.allocations import BACKWARD, STEP, TRANSIENT, AllocationTracker
from benchmarks.storages import MODEL_STATE, engine_members, sort_storages
from sdp_llm.initialization import initialize
from sdp_llm.plan.cost import rank_memory, rank_traffic
from sdp_llm.plan.size import FP32_BYTES
from sdp_llm.subnetwork.measure import load_model_config

MIB = 2**20
CATEGORIES = (*MODEL_STATE, TRANSIENT)
STEPS = 2


def measure(case: Case, model: PretrainedConfig) -> dict[str, Any]:
    """Run on a rank: build, train two steps, and count. All values are bytes.

    Weights, gradients, optimizer and ``other`` are what a walk finds after a step, and
    ``transient`` the most that the reduction of gradients held in the last step;
    ``optimizer_step`` the most that the optimizer held beside its state; ``sent`` what that step
    sent, as the library counts it. ``*_peak`` are the most
    bytes of all storages together in that phase.
    """
    resident_at_start = resident("VmRSS")
    tracker = AllocationTracker()
    with tracker:
        with tracker.phase("state"):
            engine, *_ = initialize(model, case.run_config())
        built, built_peak = tracker.live.total(), tracker.total_peak
        vocabulary = model.get_text_config().vocab_size
        for step in range(STEPS):
            tracker.reset_peaks()
            sent_before = engine.sharded.communicator.bytes_sent
            tokens = tokens_of_step(case, vocabulary, step)
            with tracker.phase(BACKWARD):
                train_step(engine, tokens)
        del tokens
        training_peak, alive = tracker.total_peak, tracker.live.total()
    found = sort_storages(engine_members(engine))
    result = asdict(found) | {
        "total": found.total,
        "others": [list(entry) for entry in found.others[:5]],
        TRANSIENT: tracker.peak[TRANSIENT],
        "activations": tracker.peak[BACKWARD],
        "optimizer_step": tracker.peak[STEP] - tracker.live[STEP],
        "sent": engine.sharded.communicator.bytes_sent - sent_before,
        "alive_after_step": alive,
        "built": built,
        "construction_peak": built_peak,
        "training_peak": training_peak,
        "resident_at_start": resident_at_start,
        "resident_peak": resident("VmHWM"),
    }
    engine.destroy()
    return result


def predict(case: Case, model: PretrainedConfig) -> list[dict[str, int]]:
    """The closed forms of :mod:`sdp_llm.plan.cost`, by rank, in bytes.

    ``construction`` is the bound on the peak of building: what is kept before the first step, the
    moments being allocated in it, and the fp32 values of one unit; ``subnetwork_and_block`` the
    weaker bound of all model state and the fp32 values of one block.
    """
    size, plan, setup = case.closed_form(model)
    largest_unit = max(unit.numel for unit in size.units)
    ranks = []
    for rank in range(case.world_size):
        cost = rank_memory(size, plan, setup, rank)
        # The moments are 8 of these bytes per parameter.
        masters = cost.optimizer * (setup.optimizer_bytes - setup.moment_bytes)
        kept = cost.weights + cost.gradients + masters // setup.optimizer_bytes
        form = {name: getattr(cost, name) for name in (*CATEGORIES, "activations")}
        form |= {"total": cost.total, "construction": kept + FP32_BYTES * largest_unit}
        form["sent"] = round(rank_traffic(size, plan, setup, rank))
        form["subnetwork_and_block"] = cost.model_state + FP32_BYTES * max(size.block_numel)
        ranks.append(form)
    return ranks


def ratios(measured: dict[str, Any], predicted: dict[str, int]) -> dict[str, float]:
    """Measured over predicted by category, and the share of all storages that is in none."""
    found = {name: measured[name] / predicted[name] for name in CATEGORIES}
    found["construction"] = measured["construction_peak"] / predicted["construction"]
    found["subnetwork_and_block"] = (
        measured["construction_peak"] / predicted["subnetwork_and_block"]
    )
    found["uncategorised"] = measured["other"] / measured["total"]
    return found


def _run_case(case: Case, model: PretrainedConfig) -> dict[str, Any]:
    measured = run_ranks(case.world_size, measure, case, model)
    predicted = predict(case, model)
    ranks = [
        {"measured": m, "predicted": p, "ratios": ratios(m, p)}
        for m, p in zip(measured, predicted, strict=True)
    ]
    return {"case": asdict(case), "ranks": ranks}


def _table(results: Sequence[dict[str, Any]]) -> str:
    """One row per case and category: the rank whose ratio is furthest from 1."""
    rows = []
    for result in results:
        label = str(Case(**result["case"]))
        for name in (*CATEGORIES, "construction"):
            worst = max(result["ranks"], key=lambda rank: abs(rank["ratios"][name] - 1))
            key = "construction_peak" if name == "construction" else name
            cells = (worst["measured"][key], worst["predicted"][name])
            rows.append(
                [label, name, *(f"{c / MIB:,.2f}" for c in cells), f"{worst['ratios'][name]:.4f}"]
            )
    return markdown_table(["case", "what", "measured, MiB", "closed form, MiB", "ratio"], rows)


def _process_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per case: what is in no category, and the process as a whole (largest rank)."""
    rows = []
    for result in results:
        ranks = result["ranks"]
        share = max(rank["ratios"]["uncategorised"] for rank in ranks)
        names = ("training_peak", "resident_peak", "resident_at_start")
        sizes = [max(rank["measured"][name] for rank in ranks) for name in names]
        bound = max(rank["predicted"]["total"] for rank in ranks)
        sizes.insert(1, bound)
        building = max(rank["ratios"]["subnetwork_and_block"] for rank in ranks)
        label = str(Case(**result["case"]))
        cells = (f"{size / MIB:,.1f}" for size in sizes)
        rows.append([label, f"{share:.5%}", f"{building:.2f}", *cells])
    header = ["case", "in no category", "building"]
    header += ["peak of storages, MiB", "closed form's total, MiB"]
    header += ["peak resident size, MiB", "of it before building, MiB"]
    return markdown_table(header, rows)


_ABOUT = """\
Weights, gradients and optimizer (masters and moments) are what a walk over all live tensor \
storages of the process finds after an optimizer step. Transient is the largest sum of buffers \
that the reduction of gradients holds in a step, seen operator by operator. Construction is the \
peak of all storages while the subnetwork is built, against the weights, gradients and masters \
that stay plus the fp32 values of one unit, an upper bound. Each row is the rank whose ratio is \
furthest from 1. One sample of {sequence} tokens per rank."""

_ABOUT_PROCESS = """\
Building is the peak of construction over all model state (with the moments, which the first step \
makes) plus one fp32 block. The closed form's total adds transient buffers and saved activations \
to the model state: their peaks need not coincide. The resident size is the whole process, with \
Python, the imported libraries ("before building"), what this measurement needs, and what is \
outside tensors: gloo's all-gather holds a copy of each unit that it gathers."""


def report(results: Sequence[dict[str, Any]]) -> str:
    """Both tables with what they say."""
    about = _ABOUT.format(sequence=results[0]["case"]["sequence_length"])
    return "\n\n".join((about, _table(results), _ABOUT_PROCESS, _process_table(results)))


def run(arguments: argparse.Namespace) -> None:
    """Measure every case and write the tables."""
    model = load_model_config(arguments.model)
    cases = [
        Case(arguments.world_size, arguments.coverage, stage, masking, is_bf16)
        for masking in arguments.masking
        for is_bf16 in ((False, True) if arguments.bf16 else (False,))
        for stage in arguments.stages
    ]
    results = []
    for case in cases:
        results.append(_run_case(case, model))
        print(_table(results[-1:]), flush=True)
    text = report(results)
    print(f"\n{text}")
    name = Path(arguments.model).stem
    title = f"Memory of {name}, {arguments.world_size} ranks, C = {arguments.coverage}"
    write_results(Path(arguments.output), title, text, {"model": name, "results": results})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memory", description=__doc__)
    parser.add_argument("--model", default="configs/model/llama_60m.json", help="a HF config")
    parser.add_argument("--world_size", type=int, default=4, help="number of gloo ranks")
    parser.add_argument("--coverage", default="1/2", help="share of the ranks per free block")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], choices=(0, 1, 2))
    parser.add_argument(
        "--masking", nargs="+", default=["forward", "backward"], choices=("forward", "backward")
    )
    parser.add_argument("--bf16", action="store_true", help="measure bf16 weights too")
    parser.add_argument("--output", required=True, help="JSON file; a .md is written beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
