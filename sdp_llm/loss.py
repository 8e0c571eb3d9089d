"""The training loss, the same for the engine, the simulation and the evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def summed_loss(model: nn.Module, tokens: Tensor, eos_id: int | None = None) -> Tensor:
    """The summed next-token cross-entropy in nats, fp32.

    The sum is divided by the tokens of a rank's whole slice, not of a micro-batch, so that the
    gradient does not depend on how the slice is cut.

    Every target counts. Where documents are kept apart, this includes the first token of a
    document, which is predicted from the document before it: that is how the model learns what
    documents start with.

    :param model: a HuggingFace causal language model.
    :param tokens: ids ``[batch, sequence + 1]``, int64; inputs and targets overlap.
    :param eos_id: the id that ends every document. With it, the documents of a sample do not see
        each other (``data.document_mask``); see
        :func:`sdp_llm.subnetwork.packing.check_documents_apart` for the models this works with.
    """
    inputs = tokens[:, :-1]
    if eos_id is None:
        logits = model(input_ids=inputs).logits
    else:
        # transformers makes the block-diagonal mask from positions that restart, but only where
        # there is neither a mask nor a cache.
        positions = document_positions(inputs, eos_id)
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def document_positions(input_ids: Tensor, eos_id: int) -> Tensor:
    """The position of each token in its document, int64 of the shape ``[batch, sequence]``.

    A document ends with ``eos_id``, which belongs to it. A sample that starts inside a document
    starts at position 0.
    """
    steps = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    after_eos = F.pad(input_ids[:, :-1] == eos_id, (1, 0))
    return steps - torch.where(after_eos, steps, 0).cummax(1).values


def target_count(tokens: Tensor) -> int:
    """How many tokens :func:`summed_loss` sums over."""
    return tokens[:, 1:].numel()
