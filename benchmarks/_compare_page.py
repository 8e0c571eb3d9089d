"""The tables and the picture of :mod:`benchmarks.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._record import markdown_table
from benchmarks._systems import Workload

MIB = 2**20
STATE = ("weights", "gradients", "optimizer", "other")
STATE_GOAL, PROCESS_GOAL, TRAFFIC_GOAL = 1.03, 1.10, 1.02

_MEMORY = """\
MiB on the rank with the largest peak. Weights, gradients, optimizer and other are the tensor \
storages that live between steps; activations what the forward pass adds; transient what comes on \
top of both at the peak of the step, by the record of torch's allocator. Resident is the peak \
resident size of the process in a step above that before building (but after a step of a tiny \
model, which loads the code). State ratio: weights, \
gradients, optimizer and other over the closed form; process ratio: resident without activations \
over the closed form of state and transient buffers. The peers' closed forms leave out what \
their implementations buffer."""
_TRAFFIC = """\
MiB sent per rank and optimizer step, mean over the ranks. Measured is {method}. gloo reduces by \
all-reduce where peers ask for a reduce-scatter, and DeepSpeed's ZeRO-1 and 2 do so themselves: \
that sends twice as much as their closed forms, which are the least possible."""
_BY_INTERFACE = """\
the byte counter of the loopback interface of a network namespace in which nothing but the ranks \
run, with all headers and acknowledgements, over {steps} steps"""
_AT_COLLECTIVES = "NOT counted by an interface but where SDP's collectives start"


def _rank(result: dict[str, Any]) -> dict[str, Any]:
    """The rank with the largest peak."""
    rank: dict[str, Any] = max(result["ranks"], key=lambda rank: rank["peak"])
    return rank


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Measured over closed form of the model state, the process and the traffic."""
    rank, form = _rank(result), result["closed_form"]
    memory = form["memory"]
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    found: dict[str, float | None] = {
        "state": sum(rank["state"].values()) / state,
        "process": None,
        "traffic": None,
    }
    if rank["resident"] is not None:
        process = rank["resident"] - rank["activations"]
        found["process"] = process / (state + memory["transient"])
    if result["sent"] is not None and form["traffic"]["mean"]:
        found["traffic"] = result["sent"] / form["traffic"]["mean"]
    return found


def line(result: dict[str, Any]) -> str:
    """One line for the terminal, while the next system runs."""
    found = {k: f"{v:.3f}" if v is not None else "n/a" for k, v in ratios(result).items()}
    over = ", ".join(f"{name} {ratio}" for name, ratio in found.items())
    return f"{result['system']}: peak {_rank(result)['peak'] / MIB:,.0f} MiB; ratios: {over}"


def page(
    results: Sequence[dict[str, Any]], workload: Workload, steps: int, is_counted: bool
) -> str:
    """Both tables, and whether SDP reaches its goals."""
    about = (
        f"{workload.world_size} ranks, one sample of {workload.sequence_length} tokens each, "
        f"AdamW, {workload.dtype} weights and messages."
    )
    method = (_BY_INTERFACE if is_counted else _AT_COLLECTIVES).format(steps=steps)
    return "\n\n".join(
        (
            about,
            "## Memory",
            _MEMORY,
            _memory_table(results),
            "## Traffic",
            _TRAFFIC.format(method=method),
            _traffic_table(results),
            "## Goals",
            "\n".join(_verdicts(results)),
        )
    )


def _memory_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        rank, found = _rank(result), ratios(result)
        live = sum(rank["state"].values())
        transient = rank["peak"] - live - rank["activations"]
        sizes = [*(rank["state"][name] for name in STATE), rank["activations"], transient]
        form = result["closed_form"]["memory"]
        closed = form["weights"] + form["gradients"] + form["optimizer"]
        resident = rank["resident"]
        cells = [f"{size / MIB:,.1f}" for size in (*sizes, rank["peak"])]
        cells.append("n/a" if resident is None else f"{resident / MIB:,.1f}")
        cells += [f"{closed / MIB:,.1f}", _ratio(found["state"]), _ratio(found["process"])]
        rows.append([result["system"], *cells])
    header = ["system", *STATE, "activations", "transient", "peak of storages", "resident"]
    return markdown_table([*header, "closed form of state", "state ratio", "process ratio"], rows)


def _traffic_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        sent, form = result["sent"], result["closed_form"]["traffic"]["mean"]
        cells = ["n/a" if sent is None else f"{sent / MIB:,.2f}", f"{form / MIB:,.2f}"]
        rows.append([result["system"], *cells, _ratio(ratios(result)["traffic"])])
    return markdown_table(["system", "measured", "closed form", "ratio"], rows)


def _verdicts(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line per goal: the worst system of SDP, and whether it is reached."""
    goals = (
        ("state", STATE_GOAL, "model state over its closed form"),
        ("process", PROCESS_GOAL, "peak of the process without activations over the closed form"),
        ("traffic", TRAFFIC_GOAL, "bytes sent over the closed form"),
    )
    lines = []
    for key, goal, text in goals:
        found = [(ratio, r["system"]) for r in results if r["is_sdp"] and (ratio := ratios(r)[key])]
        if not found:
            lines.append(f"- {text}: not measured.")
            continue
        worst, system = max(found)
        verdict = "reached" if worst <= goal else "MISSED"
        lines.append(f"- {text}: at most {worst:.3f} ({system}); goal {goal:.2f}: {verdict}.")
    return lines


def _ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw memory and traffic of every system; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [result["system"] for result in results][::-1]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(names)), layout="constrained")
    memory, traffic = figure.subplots(1, 2, sharey=True)
    left = [0.0] * len(names)
    for part in (*STATE, "activations", "transient"):
        sizes = []
        for result in results:
            rank = _rank(result)
            sizes_of = dict(rank["state"]) | {"activations": rank["activations"]}
            sizes_of["transient"] = rank["peak"] - sum(sizes_of.values())
            sizes.append(max(0, sizes_of[part]) / MIB)
        sizes.reverse()
        memory.barh(names, sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    memory.set_xlabel("peak of tensor storages per rank, MiB")
    memory.legend(fontsize="small")
    sent = [(result["sent"] or 0) / MIB for result in results][::-1]
    form = [result["closed_form"]["traffic"]["mean"] / MIB for result in results][::-1]
    traffic.barh(names, sent, color="tab:gray", label="measured")
    traffic.plot(form, names, "k|", markersize=12, label="closed form")
    traffic.set_xlabel("sent per rank and step, MiB")
    traffic.legend(fontsize="small")
    for axes in (memory, traffic):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)
    return True
