"""One system on up to a few ranks of this machine: its memory and traffic next to closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks._case import tokens_of_step
from benchmarks._network import enter_loopback, loopback_bytes
from benchmarks._ranks import run_ranks
from benchmarks._resident import reset_peak, resident
from benchmarks._start import start
from benchmarks._systems import SDP, System, Workload, closed_form
from benchmarks.storages import MODEL_STATE, live_storages


def measure(
    system: System, workload: Workload, model: PretrainedConfig, steps: int
) -> dict[str, Any]:
    """Run on a rank: build, train ``1 + steps`` steps, and count. All values are bytes.

    ``state`` are the storages of weights, gradients and optimizer after a step, ``live`` all
    storages; ``resident_peak`` is the largest resident set after the first step over the one
    before building, None where the peak cannot be reset. ``interface`` is what all ranks together
    sent in the steps after the first, ``collectives`` this rank as the library counts it (SDP).
    """
    before = resident("VmRSS")
    running = start(system, workload, model)
    case = workload.case(system)
    vocabulary = model.get_text_config().vocab_size
    marks = []
    for step in range(1 + steps):
        running.train_step(tokens_of_step(case, vocabulary, step))
        if step == 0:
            is_reset = reset_peak()
        if step in (0, steps):
            running.wait()
            dist.barrier()
            marks.append((loopback_bytes(), running.sent()))
            dist.barrier()  # nobody goes on before all have read
    peak = resident("VmHWM") - before if is_reset else None
    live = {key: tensor.untyped_storage().nbytes() for key, tensor in live_storages().items()}
    members = running.members()
    kept = {_key(tensor) for name in MODEL_STATE for tensor in members[name]}
    interface, collectives = (end - begin for begin, end in zip(*marks, strict=True))
    result = {
        "state": sum(size for key, size in live.items() if key in kept),
        "live": sum(live.values()),
        "resident_peak": peak,
        "interface": interface,
        "collectives": collectives if system.kind == SDP else None,
    }
    running.close()
    return result


def at_world_size(system: System, world_size: int) -> System | None:
    """The same system with so many ranks; None where they cannot have its coverage.

    One rank can only own everything.
    """
    if system.kind != SDP:
        return system
    coverage = "1" if world_size == 1 else system.coverage
    is_possible = (Fraction(coverage) * world_size).denominator == 1
    return replace(system, coverage=coverage) if is_possible else None


def run_case(
    system: System, workload: Workload, model: PretrainedConfig, steps: int, network: str | None
) -> dict[str, Any]:
    """Measure a system with so many ranks next to its closed forms; bytes per rank, and step.

    Memory is that of the rank that has most, ``sent`` the mean over the ranks.
    """
    n = workload.world_size
    prepare = partial(enter_loopback, network)
    ranks = run_ranks(n, measure, system, workload, model, steps, prepare=prepare)
    cost = closed_form(system, workload, model)
    most = {name: _most(ranks, name) for name in ("state", "live", "resident_peak")}
    collectives = None
    if system.kind == SDP:
        collectives = sum(rank["collectives"] for rank in ranks) / steps / n
    sent = ranks[0]["interface"] / steps / n if network is not None else collectives
    predicted = {
        "state": cost.memory.model_state,
        "total": cost.memory.total,
        "sent": cost.traffic.mean,
    }
    return {
        "system": str(system),
        "world_size": n,
        "measured": most | {"sent": sent, "collectives": collectives},
        "closed_form": predicted,
        "ratios": {
            "state": _ratio(most["state"], predicted["state"]),
            "resident_peak": _ratio(most["resident_peak"], predicted["total"]),
            "sent": _ratio(sent, predicted["sent"]),
        },
    }


def _most(ranks: Sequence[dict[str, Any]], name: str) -> int | None:
    values = [rank[name] for rank in ranks if rank[name] is not None]
    return max(values, default=None)


def _ratio(measured: float | None, predicted: float) -> float | None:
    return measured / predicted if measured is not None and predicted else None


def _key(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
