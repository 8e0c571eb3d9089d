"""Head and cross-entropy in pieces, so that the logits of a micro-batch never exist as a whole.

They are often a rank's largest tensor: 2 GB in fp32 for 16 samples of 1,024 tokens at 32,000 ids,
and as much again for their gradient. Here the forward pass computes the gradients of each piece
with its logits, so that nothing is computed twice and nothing of the size of the logits is kept.

``torch.nn.functional.linear_cross_entropy`` does the same, but returns the loss in the type of the
weights: in bf16 that is right to three digits at best, which is too little to compare runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The summed cross-entropy of ``hidden @ weight.T`` against ``targets``, in nats, fp32.

    :param hidden: ``[tokens, width]``.
    :param weight: ``[ids, width]``, of the same type.
    :param targets: ids ``[tokens]``, int64.
    :param chunk: how many tokens have logits at a time.
    """
    if torch.is_grad_enabled():
        loss: Tensor = _ChunkedLoss.apply(hidden, weight, targets, chunk)
        return loss
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total += _piece(rows, weight, target)[0]
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            loss, gradient = _piece(hidden[rows], weight, targets[rows])
            total += loss
            hidden_gradient[rows] = gradient @ weight
            weight_gradient += gradient.t() @ hidden[rows]
            del gradient  # before the next one is made
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        return hidden_gradient * scale, weight_gradient * scale, None, None


def _piece(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a few tokens, and its gradient with respect to their logits.

    All in place: the fp32 logits become their exponentials, then the probabilities.
    """
    targets = targets[:, None]
    logits = (hidden @ weight.t()).float()
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, targets)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    loss = (total.log() + largest - chosen).sum()
    gradient = logits.div_(total).scatter_add_(1, targets, -torch.ones_like(total))
    return loss, gradient.to(weight.dtype)
