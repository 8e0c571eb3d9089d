"""The training loss, the same for the engine, the simulation and the evaluation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The summed next-token cross-entropy in nats, fp32.

    The sum is divided by the tokens of a rank's whole slice, not of a micro-batch, so that the
    gradient does not depend on how the slice is cut.

    :param model: a HuggingFace causal language model.
    :param tokens: ids ``[batch, sequence + 1]``, int64; inputs and targets overlap.
    """
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def target_count(tokens: Tensor) -> int:
    """How many tokens :func:`summed_loss` sums over."""
    return tokens[:, 1:].numel()
