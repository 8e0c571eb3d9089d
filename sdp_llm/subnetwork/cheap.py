"""A model that runs but costs hardly any memory and no initialisation, to try out its code."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.subnetwork.adapter import ModelLayout, empty_model, find_blocks, model_layout
from sdp_llm.subnetwork.init import bind
from sdp_llm.subnetwork.measure import kinds_of_blocks

_SHIFT = 16  # elements; kernels want their matrices aligned


def cheap_model(
    config: PretrainedConfig, attn_implementation: str
) -> tuple[PreTrainedModel, list[list[int]]]:
    """The model of ``config`` up to the first block of its last kind, for evaluation on the CPU.

    Its weights are views of a few thousand random numbers each, whatever the size of the model.

    :returns: the model, and the blocks of the whole one by kind.
    """
    model = empty_model(config, attn_implementation).eval()
    layout = model_layout(model)
    _, blocks = find_blocks(model)
    kinds = kinds_of_blocks(model, layout)
    # Not by skipping: some models want more of a block than the residual stream.
    depth = 1 + max(kind[0] for kind in kinds)
    del blocks[depth:]
    model.config.get_text_config().num_hidden_layers = depth
    bind_cheap(model, layout, depth)
    return model, kinds


def bind_cheap(model: PreTrainedModel, layout: ModelLayout, depth: int) -> None:
    """Give values to all but the blocks from number ``depth`` on."""
    generator = torch.Generator().manual_seed(0)
    values = {
        spec.name: _cheap(spec.shape, generator)
        for unit in layout.units
        for spec in unit.parameters
        if unit.block is None or unit.block < depth
    }
    bind(model, values, layout.aliases)


def _cheap(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for a vector; a matrix has one number in memory for each antidiagonal.

    Of a stack of matrices, each is the one before, shifted by a few elements.
    """
    if len(shape) < 2:
        return torch.ones(()).expand(shape)
    *stack, _, columns = shape
    strides = (1, 1) if not stack else (*[_SHIFT] * len(stack), columns, 1)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    numbers = torch.randn(size, generator=generator) / columns**0.5
    return numbers.as_strided(shape, strides)
