"""Folders of runs, as training leaves them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdp_llm.plan import Phase, Schedule, make_plan

WORLD_SIZE, BLOCKS, TOKENS_PER_STEP = 4, 6, 100
FLOPS_PER_TOKEN = 2e9


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics; the loss falls with the step."""
    loss = 8 - step / 10
    line = {
        "step": step,
        "total_steps": 40,
        "phase": 1,
        "loss": loss,
        "lowest_loss": loss - 0.25,
        "lowest_rank": 1,
        "highest_loss": loss + 0.5,
        "highest_rank": 3,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "skipped": 0,
        "tokens_per_second": 50.0,
        "memory_now": [2**29, 2**29],
        "memory_peak": [2**29, 2**30],
        "eta": 80.0,
        "tokens": step * TOKENS_PER_STEP,
        "seconds": step * TOKENS_PER_STEP / 50.0,
        "flops": step * TOKENS_PER_STEP * FLOPS_PER_TOKEN,
    }
    return line | changes


def validation_line(step: int, loss: float = 7.0) -> dict[str, Any]:
    return {"step": step, "validation/loss": loss, "validation/bits_per_byte": 2.5}


def gradients_line(step: int) -> dict[str, Any]:
    names = ["embedding", *(f"block {b}" for b in range(BLOCKS)), "head"]
    cosines: dict[str, float | None] = {name: i / 10 for i, name in enumerate(names)}
    cosines["block 2"] = None
    norms = {name: 10.0**i for i, name in enumerate(names)}
    return {"step": step, "gradients/cosine": cosines, "gradients/norm": norms}


MEMORY_LINE = {
    "step": 2,
    "memory/rank": 3,
    "memory/predicted": {"weights": 2**20, "gradients": 2**20, "optimizer": 2**21},
    "memory/measured": {"weights": 2**20, "gradients": 2**20, "optimizer": 3 * 2**20},
}


def two_phases() -> Schedule:
    half = make_plan(WORLD_SIZE, BLOCKS, owners_per_block=2)
    whole = make_plan(WORLD_SIZE, BLOCKS, owners_per_block=4)
    return Schedule((Phase(0, 10, whole, "forward", 0, 0), Phase(10, 40, half, "backward", 5, 0)))


def make_run(
    folder: Path,
    lines: Iterable[Mapping[str, Any]] | None = None,
    *,
    state: str = "finished",
    is_known: bool = True,
    device: str = "cpu",
) -> Path:
    """Write a run folder; 40 steps in two phases where ``lines`` are not given.

    :param is_known: False: one of a model whose cost is not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if lines is None:
        phases = {step: 1 if step <= 10 else 2 for step in range(5, 41, 5)}
        lines = [MEMORY_LINE, *(training_line(s, phase=p) for s, p in phases.items())]
        lines += [validation_line(40, 4.5), gradients_line(40)]
    if not is_known:
        lines = [{**line, "flops": None} if "loss" in line else line for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    phases_of_plan = [phase.as_dict() for phase in two_phases().phases]
    files: dict[str, Any] = {
        "config": {"model": {"config": "configs/tiny.json"}, "sdp": {"coverage": "1/2"}},
        "plan": {"world_size": WORLD_SIZE, "phases": phases_of_plan},
        "environment": {"commit": "0123456789abcdef-dirty"},
        "status": {"state": state},
    }
    if is_known:
        memory = {"weights": 2**30, "gradients": 0, "optimizer": 0, "transient": 0}
        phases_of_cost = [{"memory_bytes": [memory] * WORLD_SIZE}] * 2
        files["prediction"] = {"device": device, "parameters": 3_150_000, "phases": phases_of_cost}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
