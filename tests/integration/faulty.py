"""The main job, with one rank that misbehaves as FAULT and FAULTY_RANK say."""

from __future__ import annotations

import os
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Steps that go well before.
FIRST = 4


def stall() -> None:
    """The loader never returns."""
    from sdp_llm.training.batches import StepBatches

    read = StepBatches.__getitem__

    def slow(self: StepBatches, step: int) -> Any:
        time.sleep(0 if step < FIRST else 3600)
        return read(self, step)

    StepBatches.__getitem__ = slow  # type: ignore[method-assign]


def keep_lock() -> None:
    """The loader never returns, and no other Python thread of the process runs meanwhile."""
    from sdp_llm.training.batches import StepBatches

    read = StepBatches.__getitem__

    def slow(self: StepBatches, step: int) -> Any:
        if step >= FIRST:
            re.match("(a+)+$", "a" * 60 + "b")
        return read(self, step)

    StepBatches.__getitem__ = slow  # type: ignore[method-assign]


def fail() -> None:
    """The forward pass raises."""
    from sdp_llm.engine import SDPEngine

    forward, calls = SDPEngine.forward, []

    def failing(self: SDPEngine, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > FIRST:
            raise ArithmeticError("the model broke\nin two lines")
        return forward(self, *arguments, **options)

    SDPEngine.forward = failing  # type: ignore[method-assign]


def exhaust() -> None:
    """The device has no more memory."""
    import torch

    from sdp_llm.engine import SDPEngine

    forward, calls = SDPEngine.forward, []

    def failing(self: SDPEngine, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > FIRST:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of "
                "79.10 GiB of which 1.20 GiB is free. Including non-PyTorch memory, ..."
            )
        return forward(self, *arguments, **options)

    SDPEngine.forward = failing  # type: ignore[method-assign]


def absent() -> None:
    """The rank never comes."""
    time.sleep(3600)


def other_seed() -> None:
    """The rank has another config."""
    sys.argv += ["--set", "training.seed=5"]


def other_packages() -> None:
    """The rank has another release of a package."""
    import sdp_llm.versions

    before = sdp_llm.versions._version
    sdp_llm.versions._version = lambda name: "9.9" if name == "deepspeed" else before(name)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if os.environ["RANK"] in os.environ["FAULTY_RANK"].split(","):
        globals()[os.environ["FAULT"]]()
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
