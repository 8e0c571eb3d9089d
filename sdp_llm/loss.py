"""The training loss, the same for the engine, the simulation and the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdp_llm.chunked_head import chunked_loss
from sdp_llm.errors import ConfigError


@dataclass(frozen=True)
class NextTokenLoss:
    """The summed next-token cross-entropy in nats, fp32.

    The sum is divided by the tokens of a rank's whole slice, not of a micro-batch, so that the
    gradient does not depend on how the slice is cut.

    Every target counts. Where documents are kept apart, this includes the first token of a
    document, which is predicted from the document before it: that is how the model learns what
    documents start with.

    Attributes:
        eos_id: the id that ends every document. With it, the documents of a sample do not see each
            other (``data.document_mask``); see
            :func:`sdp_llm.subnetwork.packing.check_documents_apart` for the models this works with.
        chunk: how many tokens have logits at a time (``training.loss_chunk``); None: all. Only the
            order of summation differs.
    """

    eos_id: int | None = None
    chunk: int | None = None

    def __call__(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """The loss of a batch.

        :param model: a HuggingFace causal language model, perhaps in an engine.
        :param tokens: ids ``[batch, sequence + 1]``, int64; inputs and targets overlap.
        :raises ConfigError: with ``chunk``, for a model whose loss cannot be computed in pieces.
        """
        targets = tokens[:, 1:].flatten()
        if self.chunk is None:
            logits = self._logits(model, tokens[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
        head, hidden = self._before_head(model, tokens[:, :-1])
        return chunked_loss(hidden.flatten(0, 1), head.weight, targets, self.chunk)

    def check(self, model: nn.Module) -> None:
        """Try on a token whether the loss of the model can be computed in pieces.

        :raises ConfigError: it cannot.
        """
        self._before_head(model, torch.zeros(1, 1, dtype=torch.int64))

    def _before_head(self, model: nn.Module, inputs: Tensor) -> tuple[nn.Linear, Tensor]:
        """The head and what it would be given, ``[batch, sequence, width]``."""
        whole: Any = getattr(model, "module", model)
        head = whole.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise self._unfit(f"the model's head is a {type(head).__name__}")
        if head.bias is not None:
            raise self._unfit("the model's head has a bias")
        with _passing(head) as passed:
            output = self._logits(model, inputs)
        if output is not passed[-1]:
            raise self._unfit("the model changes what its head returns")
        return head, output

    def _unfit(self, why: str) -> ConfigError:
        key = f"training.loss_chunk = {self.chunk}"
        return ConfigError(
            f"{key}: {why}, so its loss cannot be computed in pieces; set it to null"
        )

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        # transformers makes the block-diagonal mask from positions that restart, but only where
        # there is neither a mask nor a cache.
        apart: dict[str, Any] = {}
        if self.eos_id is not None:
            positions = document_positions(inputs, self.eos_id)
            apart = {"position_ids": positions, "use_cache": False}
        logits: Tensor = model(input_ids=inputs, **apart).logits
        return logits


summed_loss = NextTokenLoss()


@contextmanager
def _passing(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the head returns what it is given, and the list has it."""
    passed: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        passed.append(hidden)
        return hidden

    head.forward = forward
    try:
        yield passed
    finally:
        del head.forward


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
