"""Measure what computing the loss in pieces (`training.loss_chunk`) saves, and what it takes.

python benchmarks/loss_chunk.py --model configs/model/llama_134m.json \
    --output docs/results/loss_chunk_134m.json

One block of the model, its embedding and head; forward and backward pass. Bytes are those of every
storage that torch makes meanwhile, weights not counted, beside the closed form that a run is
predicted with. Seconds are of fp32 passes in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks._command import run_command
from benchmarks._record import markdown_table, write_results
from benchmarks.allocations import AllocationTracker
from sdp_llm.loss import NextTokenLoss
from sdp_llm.subnetwork.measure import load_model_config, model_size

MIB = 2**20


def peak_bytes(
    config: PretrainedConfig, dtype: torch.dtype, chunk: int | None, samples: int, length: int
) -> tuple[int, int]:
    """What a forward and a backward pass allocate at their peak, and the closed form of it."""
    model = _model(config, dtype)
    with AllocationTracker() as tracker:
        NextTokenLoss(chunk=chunk)(model, _tokens(samples, length)).backward()
    size = model_size(config, samples, length, dtype=dtype, loss_chunk=chunk)
    saved = size.shared_activations + sum(block.activations for block in size.blocks)
    return tracker.total_peak, saved + size.passing_activations


def seconds(
    config: PretrainedConfig, chunks: list[int | None], samples: int, length: int, rounds: int
) -> list[list[float]]:
    """The seconds of each round's passes, by chunk; the first round only warms up."""
    model, tokens = _model(config, torch.float32), _tokens(samples, length)
    found: list[list[float]] = [[] for _ in chunks]
    for _ in range(1 + rounds):
        for chunk, times in zip(chunks, found, strict=True):
            begin = time.perf_counter()
            NextTokenLoss(chunk=chunk)(model, tokens).backward()
            times.append(time.perf_counter() - begin)
            model.zero_grad()
    return [times[1:] for times in found]


def _model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def _tokens(samples: int, length: int) -> torch.Tensor:
    return torch.randint(0, 100, (samples, length + 1))


_ABOUT = """\
One block of {model} with embedding and head, {samples} samples of {length} tokens, forward and \
backward pass. Peak: the most bytes of all storages that torch made, weights not counted; closed \
form: what `launch/plan.py` calls activations. Seconds: fp32, over those of the loss at once, \
median of {rounds} rounds in which all take turns."""


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write the table."""
    config = load_model_config(arguments.model)
    config.num_hidden_layers = 1
    config.use_cache = False
    shape = (arguments.samples, arguments.sequence_length)
    chunks = [None, *arguments.chunks]
    times = seconds(config, chunks, *shape, arguments.rounds)
    rows, results = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for chunk, taken in zip(chunks, times, strict=True):
            peak, predicted = peak_bytes(config, dtype, chunk, *shape)
            ratio = median(own / base for own, base in zip(taken, times[0], strict=True))
            name = str(dtype).removeprefix("torch.")
            result = {"dtype": name, "chunk": chunk, "peak": peak, "predicted": predicted}
            results.append(result | {"seconds": taken if dtype == torch.float32 else None})
            pieces = "at once" if chunk is None else f"{chunk:,} tokens"
            shown = f"{ratio:.2f}" if dtype == torch.float32 else "-"
            sizes = [f"{peak / MIB:,.0f}", f"{predicted / MIB:,.0f}", f"{peak / predicted:.3f}"]
            rows.append([name, pieces, *sizes, shown])
    about = _ABOUT.format(
        model=Path(arguments.model).stem, samples=shape[0], length=shape[1], rounds=arguments.rounds
    )
    header = ["weights", "loss", "peak, MiB", "closed form, MiB", "ratio", "seconds"]
    text = f"{about}\n\n{markdown_table(header, rows)}"
    print(text)
    write_results(arguments.output, "The loss in pieces", text, {"results": results})


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="loss_chunk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a HuggingFace config")
    parser.add_argument("--samples", type=int, default=2, help="in a micro-batch")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens per sample")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 256, 64], help="to compare")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the page is beside it")
    return run_command(parser, run)


if __name__ == "__main__":
    sys.exit(main())
