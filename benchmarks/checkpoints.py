"""Time saving and loading a checkpoint, beside DeepSpeed ZeRO-2 and torch.distributed.checkpoint.

python benchmarks/checkpoints.py --model configs/model/llama_134m.json --world_size 4 \
    --output docs/results/checkpoints_134m.json

Each round starts each system anew, one after the other, so that a busy machine hits all alike.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks._case import Case, tokens_of_step, train_step
from benchmarks._command import run_command
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.subnetwork.measure import load_model_config

_SAVE, _LOAD = "save", "load"
_BASE = "sdp_llm, C = 1"


def _timed(action: Callable[[], Any]) -> float:
    """Seconds of a collective action, from all ready to all done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def sdp(model: PretrainedConfig, world_size: int, folder: str, coverage: str) -> dict[str, float]:
    """Run on a rank: this project's checkpoint, checksums and flushing to the disk included."""
    case = Case(world_size, coverage, stage=2, masking="forward")
    engine, *_ = initialize(model, case.run_config())
    train_step(engine, tokens_of_step(case, model.vocab_size, 0))
    times = {
        _SAVE: _timed(lambda: engine.save_checkpoint(folder)),
        _LOAD: _timed(lambda: engine.load_checkpoint(folder)),
    }
    engine.destroy()
    return times


def zero2(model: PretrainedConfig, world_size: int, folder: str) -> dict[str, float]:
    """Run on a rank: DeepSpeed's own ZeRO-2 checkpoint."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    whole = _whole_model(model)
    engine, *_ = deepspeed.initialize(
        model=whole, model_parameters=whole.parameters(), config=config
    )
    tokens = tokens_of_step(Case(world_size, "1", 2, "forward"), model.vocab_size, 0)
    engine.backward(summed_loss(engine, tokens) / target_count(tokens))
    engine.step()
    times = {
        _SAVE: _timed(lambda: engine.save_checkpoint(folder, tag="0")),
        _LOAD: _timed(lambda: engine.load_checkpoint(folder, tag="0")),
    }
    engine.destroy()
    return times


def fsdp2(model: PretrainedConfig, world_size: int, folder: str) -> dict[str, float]:
    """Run on a rank: FSDP2 with torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = _whole_model(model)
    mesh = init_device_mesh("cpu", (world_size,))
    for block in whole.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4)
    for parameter in whole.parameters():  # what makes the moments; no communication is needed
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(whole, optimizer)
        return {"model": weights, "optimizer": moments}

    def load() -> None:
        into = state()
        dcp.load(into, checkpoint_id=folder)
        set_state_dict(
            whole, optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"]
        )

    return {
        _SAVE: _timed(lambda: dcp.save(state(), checkpoint_id=folder)),
        _LOAD: _timed(load),
    }


def _whole_model(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model


SYSTEMS: dict[str, tuple[Callable[..., dict[str, float]], tuple[Any, ...]]] = {
    _BASE: (sdp, ("1",)),
    "sdp_llm, C = 1/2": (sdp, ("1/2",)),
    "DeepSpeed ZeRO-2": (zero2, ()),
    "FSDP2, torch.distributed.checkpoint": (fsdp2, ()),
}


def measure(arguments: argparse.Namespace, model: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """The times of every round, and the bytes on the disk, by system."""
    found: dict[str, dict[str, Any]] = {name: {_SAVE: [], _LOAD: []} for name in SYSTEMS}
    for number in range(arguments.rounds):
        for name, (function, more) in SYSTEMS.items():
            folder = Path(tempfile.mkdtemp(dir=arguments.folder))
            try:
                os.sync()  # what one system left to be written must not slow the next
                ranks = run_ranks(
                    arguments.world_size, function, model, arguments.world_size, str(folder), *more
                )
                files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            finally:
                shutil.rmtree(folder)
            for action in (_SAVE, _LOAD):
                found[name][action].append(max(times[action] for times in ranks))
            found[name]["bytes"], found[name]["files"] = sum(files), len(files)
            last = ", ".join(f"{a} {found[name][a][-1]:.2f} s" for a in (_SAVE, _LOAD))
            print(f"round {number + 1}, {name}: {last}, {sum(files) / 1e9:.2f} GB", flush=True)
    return found


_ABOUT = """\
The same model and AdamW moments in fp32 on {world_size} gloo ranks; seconds from all ranks ready \
to all done, medians of {rounds} interleaved rounds; the ratio is to {base}, the median of the \
ratios of each round. Only `sdp_llm` computes and checks SHA-256 sums, and waits until its files \
are on the disk (fsync); the others leave this to the operating system. What is loaded was just \
written, so that it comes from the page cache."""


def report(arguments: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    """The table, and what it says."""
    rows = []
    for name, values in found.items():
        cells = [f"{values['bytes'] / 1e9:.3f}", f"{values['files']}"]
        for action in (_SAVE, _LOAD):
            base = found[_BASE][action]
            ratio = median(t / b for t, b in zip(values[action], base, strict=True))
            cells += [f"{median(values[action]):.2f}", f"{ratio:.2f}"]
        rows.append([name, *cells])
    header = ["system", "GB on the disk", "files", "save, s", "ratio", "load, s", "ratio"]
    about = _ABOUT.format(base=_BASE, world_size=arguments.world_size, rounds=arguments.rounds)
    return f"{about}\n\n{markdown_table(header, rows)}"


def run(arguments: argparse.Namespace) -> None:
    """Measure all systems and write the table."""
    model = load_model_config(arguments.model)
    found = measure(arguments, model)
    text = report(arguments, found)
    print(text)
    title = f"Checkpoints of {Path(arguments.model).stem}"
    write_results(arguments.output, title, text, {"systems": found})


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="checkpoints", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument("--model", required=True, help="path of a HuggingFace config.json")
    parser.add_argument("--world_size", type=int, default=4, help="ranks (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats (default 5)")
    parser.add_argument("--folder", help="where checkpoints are written (default: temporary)")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the page is beside it")
    return run_command(parser, run)


if __name__ == "__main__":
    sys.exit(main())
