"""Subnetwork Data Parallelism for DeepSpeed and transformers.

Every rank trains the shared parameters and a part of the transformer blocks. ``initialize`` is to
a training loop what ``deepspeed.initialize`` is; ``launch/pretrain.py`` is a loop ready to use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdp_llm.errors import ConfigError, TrainingStopped

if TYPE_CHECKING:
    from sdp_llm.engine import SDPEngine
    from sdp_llm.initialization import initialize

__all__ = ["ConfigError", "SDPEngine", "TrainingStopped", "initialize"]


def __getattr__(name: str) -> Any:
    # The engine imports torch and DeepSpeed; checking a config must not wait for them.
    if name in ("SDPEngine", "initialize"):
        from sdp_llm import initialization

        return getattr(initialization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
