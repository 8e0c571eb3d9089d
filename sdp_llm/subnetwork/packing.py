"""Whether a model keeps the documents of a packed sample apart when their positions restart."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.loss import document_positions
from sdp_llm.subnetwork.cheap import cheap_model

# In others transformers detects packed samples in batches of one sample only, or not at all.
ATTENTIONS = ("sdpa", "eager")
# Documents per sample, in tokens with the end-of-sequence token; of two samples with equal sums,
# because a batch may be treated unlike a single sample.
_DOCUMENTS = ((3, 1, 5, 3), (7, 5))
_TOLERANCE = 1e-3  # of the largest element; a document that is seen changes it by far more


def check_documents_apart(config: PretrainedConfig, attn_implementation: str, eos_id: int) -> None:
    """Check that ``data.document_mask`` does what it says for this model.

    transformers makes a block-diagonal causal mask for samples whose positions restart
    (``masking_utils.find_packed_sequence_indices``). Not every model uses it, and a model may let
    documents meet elsewhere, as state-space models do. So this runs the model itself, its first
    blocks of every kind, on packed samples and on each document alone: the hidden states must be
    equal.

    :raises ConfigError: they differ, the model takes no positions, or the attention is not one of
        ``ATTENTIONS``.
    """
    where = "data.document_mask = true"
    if attn_implementation not in ATTENTIONS:
        raise ConfigError(
            f"{where}: model.attn_implementation = {attn_implementation!r} does not keep the "
            f"documents of packed samples apart; use {' or '.join(map(repr, ATTENTIONS))}"
        )
    model, _ = cheap_model(config, attn_implementation)
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
