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
    loss: Tensor = _ChunkedLoss.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_gradients: bool
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if with_gradients else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.t()).float()
            target = targets[rows, None]
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, target)).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                # The gradient of the logits: probabilities, less 1 at the target.
                gradient = logits.sub_(normalizer).exp_()
                gradient.scatter_add_(1, target, -torch.ones_like(normalizer))
                gradient = gradient.to(weight.dtype)
                hidden_gradient[rows] = gradient @ weight
                weight_gradient += gradient.t() @ hidden[rows]
        if hidden_gradient is not None and weight_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        return hidden_gradient * scale, weight_gradient * scale, None, None, None
