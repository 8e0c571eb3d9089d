"""Whether the blocks of a model can be skipped, found by running the first one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan
from sdp_llm.subnetwork.adapter import empty_model, find_blocks, model_layout
from sdp_llm.subnetwork.cheap import bind_cheap


class _Returned(Exception):
    """Ends a forward pass with what the first block has returned."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def skips_blocks(plan: Plan, masking: str) -> bool:
    """Whether a rank passes by a block under this plan and masking."""
    return masking == "forward" and any(len(o) < plan.world_size for o in plan.owner_sets)


def check_skippable(source: PretrainedConfig | PreTrainedModel) -> None:
    """Check that blocks return the residual stream and nothing else.

    Those of some families return a tuple: the model takes it apart, and would take apart the stream
    that :class:`~sdp_llm.subnetwork.masking.SkippedBlock` passes on, with an error or without. The
    first block is run to see, on cheap weights, and nothing behind it.

    :raises ConfigError: on every rank alike, when a block cannot be skipped.
    """
    config = source.config if isinstance(source, PreTrainedModel) else source
    try:
        output = _first_output(source)
    except Exception:  # whatever a model's own code raises
        # One that is not made of its config alone, or needs a GPU's kernels, is not judged here:
        # should it be wrong, its first forward pass says so.
        return
    if not isinstance(output, Tensor):
        raise ConfigError(
            f'sdp.masking = "forward": blocks of model type {config.model_type!r} cannot be '
            f"skipped: they return a {type(output).__name__}, not the residual stream alone; use "
            '"backward", or another family of models'
        )


def _first_output(source: PretrainedConfig | PreTrainedModel) -> Any:
    """What the first block returns."""
    if isinstance(source, PreTrainedModel):
        config, make = source.config, type(source)._from_config
    else:
        config, make = source, AutoModelForCausalLM.from_config
    # The attention does not matter, and that of the run may need a GPU.
    model = empty_model(config, "eager", make).eval()
    bind_cheap(model, model_layout(model), depth=1)
    _, blocks = find_blocks(model)
    blocks[0].register_forward_hook(_end)
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except _Returned as end:
        return end.output
    raise RuntimeError("the model does not run its first block")


def _end(block: nn.Module, inputs: Any, output: Any) -> NoReturn:
    raise _Returned(output)
