"""Whether a model keeps the documents of a packed sample apart when their positions restart."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.loss import document_positions
from sdp_llm.subnetwork.adapter import empty_model, find_blocks, model_layout
from sdp_llm.subnetwork.init import bind
from sdp_llm.subnetwork.measure import kinds_of_blocks

# In others transformers detects packed samples in batches of one sample only, or not at all.
ATTENTIONS = ("sdpa", "eager")
# Documents per sample, in tokens with the end-of-sequence token; of two samples with equal sums,
# because a batch may be treated unlike a single sample.
_DOCUMENTS = ((3, 1, 5, 3), (7, 5))
_SHIFT = 16  # elements; kernels want their matrices aligned
_TOLERANCE = 1e-3  # of the largest element; a document that is seen changes it by far more


def check_documents_apart(config: PretrainedConfig, attn_implementation: str, eos_id: int) -> None:
    """Check that ``data.document_mask`` does what it says for this model.

    transformers makes a block-diagonal causal mask for samples whose positions restart
    (``masking_utils.find_packed_sequence_indices``). Not every model uses it, and a model may let
    documents meet elsewhere, as state-space models do. So this runs the model itself, its first
    blocks of every kind, on packed samples and on each document alone: the hidden states must be
    equal.

    The weights are views of a few thousand random numbers each, so that it costs little memory and
    no initialisation whatever the size of the model.

    :raises ConfigError: they differ, the model takes no positions, or the attention is not one of
        ``ATTENTIONS``.
    """
    where = "data.document_mask = true"
    if attn_implementation not in ATTENTIONS:
        raise ConfigError(
            f"{where}: model.attn_implementation = {attn_implementation!r} does not keep the "
            f"documents of packed samples apart; use {' or '.join(map(repr, ATTENTIONS))}"
        )
    config = copy.deepcopy(config)  # building and running a model changes it
    model = empty_model(config, attn_implementation).eval()
    _bind_cheap_values(model)
    fix = "set data.document_mask = false, or use another family of models"
    try:
        distance = _distance(model, eos_id)
    except Exception as error:  # whatever a model's own code raises for arguments it does not take
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where}: {type(model).__name__} cannot be run with position_ids: {reason}; {fix}"
        ) from error
    if not distance <= _TOLERANCE:
        raise ConfigError(
            f"{where}: {type(model).__name__} does not keep the documents of a sample apart (its "
            f"hidden states differ by {distance:.1%} from those of each document alone); {fix}"
        )


def _bind_cheap_values(model: PreTrainedModel) -> None:
    """Cut the model after the first block of its last kind, and give what is left values."""
    layout = model_layout(model)
    _, blocks = find_blocks(model)
    # Not by skipping: some models want more of a block than the residual stream.
    depth = 1 + max(group[0] for group in kinds_of_blocks(model, layout))
    del blocks[depth:]
    model.config.get_text_config().num_hidden_layers = depth
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


@torch.no_grad()
def _distance(model: PreTrainedModel, eos_id: int) -> float:
    """The largest difference between packed and alone, over the largest element."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(2 * sum(_DOCUMENTS[0])).view(2, -1) * 7 % (vocab_size - 1)
    ids += ids >= eos_id
    ends = [torch.tensor(lengths).cumsum(0) for lengths in _DOCUMENTS]
    for row, end in zip(ids, ends, strict=True):
        row[end - 1] = eos_id
    # Without the head: its matrix is the largest, and treats every token by itself.
    positions = document_positions(ids, eos_id)
    packed = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    largest = 0.0
    for row, hidden, lengths in zip(ids, packed, _DOCUMENTS, strict=True):
        for document, found in zip(row.split(lengths), hidden.split(lengths), strict=True):
            alone = model.base_model(input_ids=document[None], use_cache=False)[0][0]
            largest = max(largest, (found - alone).abs().max().item())
    return largest / packed.abs().max().item()
