"""Measure step time, MFU and peak memory of one rank's subnetwork, on one CPU or one GPU.

python benchmarks/mfu.py --models configs/model/llama_10m.json --coverage 1 1/2 --world_size 4 \
    --output docs/results/mfu.json

One process builds the subnetwork that a rank of a plan for ``--world_size`` ranks trains, and
trains it alone: forward, backward and AdamW, no communication.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch
from torch import Tensor, nn

from benchmarks._command import run_command
from benchmarks._device import Device
from benchmarks._record import markdown_table, write_results
from sdp_llm.errors import ConfigError
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import Plan, make_plan
from sdp_llm.plan.cost import rank_flops_per_token
from sdp_llm.plan.size import CostSetup
from sdp_llm.subnetwork.adapter import find_blocks
from sdp_llm.subnetwork.build import build_subnetwork, initial_values
from sdp_llm.subnetwork.init import bind
from sdp_llm.subnetwork.masking import SkippedBlock
from sdp_llm.subnetwork.measure import load_model_config, model_size

MIB = 2**20
LEARNING_RATE = 1e-4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP = 2


@dataclass(frozen=True)
class Setting:
    """One row: which subnetwork, and how it runs."""

    model: str
    coverage: Fraction
    is_compiled: bool
    is_checkpointed: bool

    def __str__(self) -> str:
        options = [Path(self.model).stem, f"C = {self.coverage}"]
        options += ["compiled"] * self.is_compiled + ["checkpointing"] * self.is_checkpointed
        return ", ".join(options)


class Trainer:
    """The subnetwork of one rank, alone on a device.

    fp32 masters where the weights are bf16, as in SDP.
    """

    def __init__(self, setting: Setting, arguments: argparse.Namespace, device: Device) -> None:
        config = load_model_config(setting.model)
        plan = plan_of(setting, arguments.world_size)
        subnetwork = build_subnetwork(
            config,
            plan,
            arguments.rank,
            masking=arguments.masking,
            gradient_checkpointing=setting.is_checkpointed,
        )
        self.model = subnetwork.model
        dtype = DTYPES[arguments.dtype]
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        masters: dict[str, Tensor] = {}
        for _, values in initial_values(subnetwork, seed=0):
            weights = {name: v.to(device.torch, dtype) for name, v in values.items()}
            bind(self.model, weights, subnetwork.layout.aliases)
            if dtype != torch.float32:
                masters |= {name: v.to(device.torch) for name, v in values.items()}
        self.model.to(device.torch)  # the buffers; every parameter is there already
        self.model.train()
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters = [nn.Parameter(masters[n]) if masters else p for n, p in trained.items()]
        self.weights = list(trained.values())
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)
        if setting.is_compiled:
            torch._dynamo.reset()
            for block in find_blocks(self.model)[1]:
                if not isinstance(block, SkippedBlock):
                    block.compile()
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.micro_batch, arguments.sequence_length + 1)
        vocabulary = config.get_text_config().vocab_size
        self.tokens = torch.randint(0, vocabulary, shape, generator=generator).to(device.torch)

    def step(self) -> None:
        """Forward, backward and update with one micro-batch."""
        loss = summed_loss(self.model, self.tokens) / target_count(self.tokens)
        loss.backward()
        is_mixed = self.masters[0] is not self.weights[0]
        if is_mixed:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if is_mixed:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)


def plan_of(setting: Setting, world_size: int) -> Plan:
    """The plan that the subnetwork is from."""
    depth = load_model_config(setting.model).get_text_config().num_hidden_layers
    return make_plan(world_size, depth, coverage=setting.coverage)


def flops_per_token(setting: Setting, arguments: argparse.Namespace) -> float:
    """Operations of the active parameters, also where checkpointing repeats some."""
    size = model_size(
        load_model_config(setting.model), arguments.micro_batch, arguments.sequence_length
    )
    plan = plan_of(setting, arguments.world_size)
    return rank_flops_per_token(size, plan, CostSetup(arguments.masking), arguments.rank)


def measure(setting: Setting, arguments: argparse.Namespace, device: Device) -> dict[str, Any]:
    """Seconds of each step and the peak of memory, or ``failure``: why there are none."""
    device.start_peak()
    try:
        trainer = Trainer(setting, arguments, device)
        for _ in range(WARM_UP):
            trainer.step()
        has_peak = device.drop_peak()
        seconds = []
        for _ in range(arguments.steps):
            device.synchronize()
            start = time.perf_counter()
            trainer.step()
            device.synchronize()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak": device.peak() if has_peak else None}
    except torch.OutOfMemoryError:
        return {"failure": "out of memory"}
    except Exception as error:
        if not setting.is_compiled:
            raise
        # Compilers and their absence fail in many ways.
        return {"failure": _reason(error)}


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause, fit for a table."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:120]


def summarise(
    setting: Setting,
    repeats: Sequence[dict[str, Any]],
    arguments: argparse.Namespace,
    ceiling: float | None,
) -> dict[str, Any]:
    """The medians over all steps of all repeats."""
    flops = flops_per_token(setting, arguments)
    result = asdict(setting) | {"coverage": str(setting.coverage), "flops_per_token": flops}
    failures = [repeat["failure"] for repeat in repeats if "failure" in repeat]
    if failures:
        return result | {"failure": failures[0]}
    seconds = median(s for repeat in repeats for s in repeat["seconds"])
    tokens = arguments.micro_batch * arguments.sequence_length / seconds
    peaks = [repeat["peak"] for repeat in repeats if repeat["peak"] is not None]
    return result | {
        "seconds": seconds,
        "all_seconds": [repeat["seconds"] for repeat in repeats],
        "tokens_per_second": tokens,
        "mfu": None if ceiling is None else tokens * flops / ceiling,
        "peak": median(peaks) if peaks else None,
    }


def table(settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> str:
    """One row per setting."""
    rows = []
    for setting, result in zip(settings, results, strict=True):
        flops = f"{result['flops_per_token'] / 1e6:,.1f}"
        if "failure" in result:
            rows.append([str(setting), f"n/a: {result['failure']}", "n/a", flops, "n/a", "n/a"])
            continue
        mfu = "n/a" if result["mfu"] is None else f"{result['mfu']:.1%}"
        peak = "n/a" if result["peak"] is None else f"{result['peak'] / MIB:,.0f}"
        speeds = (f"{result['seconds'] * 1e3:,.1f}", f"{result['tokens_per_second']:,.0f}")
        rows.append([str(setting), *speeds, flops, mfu, peak])
    header = ["subnetwork", "step, ms", "tokens/s", "MFLOPs per token", "MFU", "peak, MiB"]
    return markdown_table(header, rows)


_ABOUT = """\
One process on {device} trains the subnetwork of rank {rank} of {world_size} ({masking} masking), \
{dtype}, {micro_batch} x {sequence} tokens per step: forward, backward and AdamW, without \
communication. Medians of {repeats} interleaved repeats of {steps} steps each. MFU: operations of \
the active parameters per token, without those that checkpointing repeats, times tokens per \
second, over the fastest product of square matrices of the same type measured in the same run \
({ceiling}). Peak: {peak}, over what was there before building, after the first steps. Compiled: \
each block by torch.compile."""


def run(arguments: argparse.Namespace) -> None:
    """Measure all settings in turn, several times, and write the table."""
    if not 0 <= arguments.rank < arguments.world_size:
        raise ConfigError(
            f"--rank {arguments.rank}: must be below --world_size {arguments.world_size}"
        )
    device = Device()
    dtype = DTYPES[arguments.dtype]
    switches = [
        {"off": [False], "on": [True], "both": [False, True]}[s]
        for s in (arguments.compile, arguments.checkpointing)
    ]
    settings = [
        Setting(model, coverage, is_compiled, is_checkpointed)
        for model, coverage, is_compiled, is_checkpointed in product(
            arguments.models, arguments.coverage, *switches
        )
    ]
    for setting in settings:
        plan_of(setting, arguments.world_size)  # an error here costs no time
    ceilings = [device.matmul_ceiling(dtype)]
    repeats: list[list[dict[str, Any]]] = [[] for _ in settings]
    for repeat in range(arguments.repeats):
        for found, setting in zip(repeats, settings, strict=True):
            found.append(measure(setting, arguments, device))
            print(f"repeat {repeat + 1}: {setting}", flush=True)
    ceilings.append(device.matmul_ceiling(dtype))
    known = [value for value in ceilings if value is not None]
    ceiling = max(known, default=None)
    results = [
        summarise(setting, found, arguments, ceiling)
        for setting, found in zip(settings, repeats, strict=True)
    ]
    is_gpu = device.torch.type == "cuda"
    about = _ABOUT.format(
        device=device,
        rank=arguments.rank,
        world_size=arguments.world_size,
        masking=arguments.masking,
        dtype=arguments.dtype,
        micro_batch=arguments.micro_batch,
        sequence=arguments.sequence_length,
        repeats=arguments.repeats,
        steps=arguments.steps,
        ceiling="n/a" if ceiling is None else f"{ceiling / 1e9:,.1f} GFLOP/s",
        peak="the GPU allocator's" if is_gpu else "the resident set's",
    )
    text = f"{about}\n\n{table(settings, results)}"
    print(text)
    content = {"device": str(device), "matmul_ceilings": ceilings, "results": results}
    write_results(Path(arguments.output), "MFU of subnetworks on one device", text, content)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mfu", description=__doc__)
    add = parser.add_argument
    switch = ("off", "on", "both")
    add("--models", nargs="+", default=["configs/model/llama_10m.json"], help="HF configs")
    add("--coverage", type=Fraction, nargs="+", default=[Fraction(1), Fraction(1, 2)])
    add("--world_size", type=int, default=4, help="ranks that the plan is made for")
    add("--rank", type=int, default=0, help="whose subnetwork it is")
    add("--masking", default="forward", choices=("forward", "backward"))
    add("--sequence_length", type=int, default=512, help="tokens per sample")
    add("--micro_batch", type=int, default=1, help="samples per step")
    add("--dtype", default="fp32", choices=tuple(DTYPES), help="of weights; masters are fp32")
    add("--compile", default="both", choices=switch, help="torch.compile of each block")
    add("--checkpointing", default="both", choices=switch, help="recompute blocks")
    add("--steps", type=int, default=5, help="timed steps of each repeat")
    add("--repeats", type=int, default=3, help="how often each row is measured, in turn")
    add("--output", required=True, help="JSON file; a .md is written beside it")
    return parser


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), run)


if __name__ == "__main__":
    sys.exit(main())
