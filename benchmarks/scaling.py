"""Measure what a rank needs as ranks are added, and predict the same for clusters of GPUs.

python benchmarks/scaling.py --model configs/model/llama_60m.json --output docs/results/scaling.json

The measurement has up to 8 gloo ranks on this machine, the prediction up to 1,024 GPUs; the closed
forms of the prediction are compared with the measurement. Bytes are counted as in traffic.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch

from benchmarks._command import run_command
from benchmarks._network import counted_network
from benchmarks._predicted import WORLD_SIZES, Subnetworks, cost_table, predict, time_table
from benchmarks._record import markdown_table, write_results
from benchmarks._scaled import at_world_size, run_case
from benchmarks._scaling_picture import draw
from benchmarks._systems import Workload, parse_system
from benchmarks._time_model import Cluster
from sdp_llm.report.png import require_matplotlib
from sdp_llm.subnetwork.measure import load_model_config, model_size

MIB = 2**20
UNIT_NUMEL = 500_000_000  # the default of reduce_bucket_size
FAST, SLOW, SINGLE = "fast", "slow", "single"


def measured_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per system and world size."""
    rows = []
    for result in results:
        measured, predicted, ratios = (result[k] for k in ("measured", "closed_form", "ratios"))
        sizes = (
            measured["state"],
            predicted["state"],
            measured["live"],
            measured["resident_peak"],
            predicted["total"],
            measured["sent"],
            predicted["sent"],
        )
        cells = ["n/a" if size is None else f"{size / MIB:,.1f}" for size in sizes]
        shares = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios.values()]
        row = [*cells[:2], shares[0], *cells[2:5], shares[1], *cells[5:], shares[2]]
        rows.append([result["system"], str(result["world_size"]), *row])
    header = ["system", "ranks", "state", "closed form", "ratio", "all storages", "resident peak"]
    header += ["closed form's total", "ratio", "sent", "closed form", "ratio"]
    return markdown_table(header, rows)


_ABOUT_MEASURED = """\
## Measured, up to {most} ranks on one machine

MiB of the rank that has most, {dtype}, one sample of {sequence} tokens per rank. State: storages \
of weights, gradients and optimizer after a step; beside it all live storages. Resident peak: the \
largest resident set of the steps after the first over the one before building; the closed form's \
total adds buffers and activations to the state, but not what the process itself, its allocator \
and gloo take. Sent: {method}, per rank and step. The peers' closed forms are the least their \
algorithms need; gloo and DeepSpeed use more (a reduce-scatter of gloo is an all-reduce, ZeRO-3 \
keeps masters beside fp32 weights). At n = 1 SDP has C = 1. Time is not compared: the ranks share \
this machine's cores and have no links."""
_BY_INTERFACE = (
    "the byte counter of the loopback interface of a network namespace, with all headers, in "
    "{steps} steps after the first, by steps and ranks"
)
_ABOUT_PREDICTED = """\
## Predicted, up to 1,024 GPUs

Nothing here was measured. Assumed: {flops:.0f} TFLOP/s sustained per GPU, {overlap:.0%} of a \
pass's compute can hide communication, and these links. *{fast}*: {nodes} GPUs per node, \
{inner:.0f} GB/s per GPU within a node and {outer:.1f} GB/s per GPU between nodes. *{slow}*: the \
same with one link of {link:.2f} GB/s per node. *{single}*: one GPU per node with such a link of \
its own. No latency, no stragglers; a rank has one collective under way, and waits in it for \
owners that are still in another. bf16 with fp32 masters, {micro_batch} samples of {sequence} \
tokens per GPU and step, no checkpointing; SDP masks forward at stage 2. A step is as many tokens \
for all systems, not as much progress.

In a node of several GPUs an owner set uses the links of its members there, as NCCL's rings over \
several rails do; "one link" is the conservative assumption that it uses one. A node's one link \
counts as a share of it for each of its GPUs. C: p grows with n. p = 8: C falls with n, as long as \
there is a free block for each rank. By node: the ranks of a node own the same blocks. Otherwise \
blocks are dealt to ranks without regard to nodes. Then nearly every node has an owner of nearly \
every block, so that as much crosses its border as in plain data parallelism, over fewer links."""


def _about_predicted(arguments: argparse.Namespace) -> str:
    return _ABOUT_PREDICTED.format(
        flops=arguments.flops / 1e12,
        overlap=arguments.overlap,
        fast=FAST,
        slow=SLOW,
        single=SINGLE,
        nodes=arguments.ranks_per_node,
        inner=arguments.inner / 1e9,
        outer=arguments.outer / 1e9,
        link=arguments.slow_link / 1e9,
        micro_batch=arguments.micro_batch,
        sequence=arguments.predicted_sequence_length,
    )


def clusters(arguments: argparse.Namespace) -> dict[str, Cluster]:
    """The clusters of the prediction, by name."""
    nodes, inner, link = arguments.ranks_per_node, arguments.inner, arguments.slow_link
    speeds = (arguments.flops, arguments.overlap)
    return {
        FAST: Cluster(nodes, inner, arguments.outer, *speeds),
        SLOW: Cluster(nodes, inner, link / nodes, *speeds),
        SINGLE: Cluster(1, inner, link, *speeds),
    }


def _predictions(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By the name of the model."""
    kinds = [Subnetworks(coverage=c, by_node=b) for c in arguments.coverages for b in (False, True)]
    kinds += [Subnetworks(owners=p, by_node=b) for p in arguments.owners for b in (False, True)]
    found = {}
    for path in arguments.predict:
        size = model_size(
            load_model_config(path),
            arguments.micro_batch,
            arguments.predicted_sequence_length,
            dtype=torch.bfloat16,
            max_unit_numel=UNIT_NUMEL,
        )
        found[Path(path).stem] = predict(
            size, kinds, clusters(arguments), arguments.predicted_world_sizes
        )
    return found


def _measurements(arguments: argparse.Namespace, network: str | None) -> list[dict[str, Any]]:
    model = load_model_config(arguments.model)
    results = []
    for text in arguments.systems:
        for n in arguments.world_sizes:
            system = at_world_size(parse_system(text), n)
            if system is None:
                print(f"{text}: {n} ranks cannot have this coverage", flush=True)
                continue
            workload = Workload(n, arguments.sequence_length, arguments.bf16)
            result = run_case(system, workload, model, arguments.steps, network)
            # At n = 1 SDP goes by the name that it has with more ranks.
            results.append(result | {"system": str(parse_system(text))})
            print(measured_table(results[-1:]).splitlines()[-1], flush=True)
    return results


def run(arguments: argparse.Namespace) -> None:
    """Measure, predict, and write page and picture."""
    require_matplotlib("scaling")  # before what takes long
    with counted_network("scaling") as network:
        results = _measurements(arguments, network)
    predictions = _predictions(arguments)
    method = _BY_INTERFACE.format(steps=arguments.steps)
    if network is None:
        method = "NOT counted by an interface, SDP where collectives start"
    name = Path(arguments.model).stem
    picture = Path(arguments.output).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(name, results, predictions, (FAST, SLOW, SINGLE), picture)
    about = _ABOUT_MEASURED.format(
        most=max(arguments.world_sizes),
        dtype="bf16" if arguments.bf16 else "fp32",
        sequence=arguments.sequence_length,
        method=method,
    )
    parts = [f"![scaling]({picture.name})", about, measured_table(results)]
    parts.append(_about_predicted(arguments))
    for model, entries in predictions.items():
        parts += [f"### {model}, memory and bytes sent per rank and step", cost_table(entries)]
        for cluster, at in clusters(arguments).items():
            parts.append(f"### {model}, seconds per step, {cluster}")
            parts.append(time_table(entries, cluster, at.ranks_per_node > 1))
    text = "\n\n".join(parts)
    print(f"\n{text}")
    content = {
        "model": name,
        "counted_by": "collectives" if network is None else "interface",
        "measured": results,
        "clusters": {key: asdict(value) for key, value in clusters(arguments).items()},
        "predicted": predictions,
    }
    title = f"Scaling: {name} measured, {', '.join(predictions)} predicted"
    write_results(Path(arguments.output), title, text, content)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scaling", description=__doc__)
    add = parser.add_argument
    systems = ["ddp", "zero2", "zero3", "fsdp2", "sdp:1/2:forward:2", "sdp:1/2:backward:2"]
    models = [f"configs/model/llama_{size}.json" for size in ("1b", "7b")]
    add("--model", default="configs/model/llama_60m.json", help="a HF config, to measure")
    add("--systems", nargs="+", default=systems, help="as sdp:COVERAGE:MASKING:STAGE, or a peer")
    add("--world_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of gloo ranks")
    add("--sequence_length", type=int, default=128, help="tokens per sample, measured")
    add("--bf16", action="store_true", help="measure with bf16 weights")
    add("--steps", type=int, default=2, help="optimizer steps that are counted")
    add("--predict", nargs="*", default=models, help="HF configs to predict")
    add("--predicted_world_sizes", type=int, nargs="+", default=WORLD_SIZES)
    add("--coverages", type=Fraction, nargs="*", default=[Fraction(1, c) for c in (2, 4, 8)])
    add("--owners", type=int, nargs="*", default=[8], help="owners per block, whatever n is")
    add("--micro_batch", type=int, default=4, help="samples per GPU and step, predicted")
    add("--predicted_sequence_length", type=int, default=2048, help="tokens per sample, predicted")
    add("--ranks_per_node", type=int, default=8, help="assumed GPUs of a node")
    add("--inner", type=float, default=300e9, help="assumed bytes/s per GPU within a node")
    add("--outer", type=float, default=25e9, help="assumed bytes/s per GPU between nodes")
    add("--slow_link", type=float, default=1.25e9, help="the same per node, where they are slow")
    add("--flops", type=float, default=400e12, help="assumed sustained FLOP/s per GPU")
    add("--overlap", type=float, default=1.0, help="assumed share of compute that hides traffic")
    add("--output", required=True, help="JSON file; page and picture beside it")
    return parser


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), run)


if __name__ == "__main__":
    sys.exit(main())
