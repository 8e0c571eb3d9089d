"""SDP's n workers in one process: the oracle of the tests, and a way to train on one device.

Written with plain autograd and a plain torch optimizer on whole tensors, independent of
``sharding/``: for each worker in turn, forward its subnetwork on its part of the batch, backward;
divide each block's gradient by its number of owners and each shared one by n; clip; step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sdp_llm.loss import NextTokenLoss, summed_loss, target_count
from sdp_llm.plan import Plan
from sdp_llm.subnetwork.adapter import empty_model, find_blocks, model_layout
from sdp_llm.subnetwork.init import bind, initialize_unit
from sdp_llm.subnetwork.masking import mask_blocks, restore_blocks
from sdp_llm.subnetwork.pretrained import open_pretrained
from sdp_llm.subnetwork.residual import ResidualScale
from sdp_llm.subnetwork.skippable import check_skippable, skips_blocks


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    ``losses`` has each worker's mean loss (nats per token) on its slice, ``grad_norm`` is the
    global norm before clipping, ``is_skipped`` says that it was not finite.
    """

    losses: tuple[float, ...]
    grad_norm: float
    is_skipped: bool


class Simulation:
    """One whole model that n workers train in turn, each through its own mask.

    :param optimizer: makes a torch optimizer from parameter groups (with and without decay).
    :param init_from: a HuggingFace checkpoint with the initial weights, instead of ``seed``.
    :param dtype: of the weights; masters and gradients are fp32.
    :param max_norm: clip the global gradient norm to this (0: never).
    :param loss: what is minimised.
    :param residual_scale: ``sdp.residual_scale``; :attr:`residual_scale` follows the plan.
    :raises ConfigError: when blocks would be skipped that cannot be.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        masking: str = "forward",
        seed: int = 0,
        init_from: str | None = None,
        max_norm: float = 0.0,
        decay_all: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        loss: NextTokenLoss = summed_loss,
        residual_scale: str = "none",
    ) -> None:
        if skips_blocks(plan, masking):
            check_skippable(config)
        self.plan = plan
        self.loss = loss
        self.masking = masking
        self.max_norm = max_norm
        self.model = empty_model(config, attn_implementation)
        self.model.config.use_cache = False
        self.layout = model_layout(self.model)
        self.residual_scale = ResidualScale(residual_scale, self.model, plan, masking)
        self.masters: dict[str, nn.Parameter] = {}
        pretrained = None if init_from is None else open_pretrained(init_from, self.model)
        folds = self.residual_scale.folds()
        for unit in self.layout.units:
            if pretrained is None:
                values = initialize_unit(self.model, unit.parameters, self.layout.aliases, seed)
            else:
                values = {spec.name: pretrained.read(spec.name) for spec in unit.parameters}
                values |= {n: folds[n].undo(v) for n, v in values.items() if n in folds}
            self.masters |= {name: nn.Parameter(v.to(device)) for name, v in values.items()}
        weights = {name: master.detach().to(dtype) for name, master in self.masters.items()}
        bind(self.model, weights, self.layout.aliases)
        self.model.to(device)
        # Kept apart from the model, whose skipped blocks are out of its reach for a while.
        self._weights = {name: self.model.get_parameter(name) for name in weights}
        self._path, _ = find_blocks(self.model)
        decayed = [m for m in self.masters.values() if decay_all or m.dim() > 1]
        others = [m for m in self.masters.values() if not decay_all and m.dim() <= 1]
        self.optimizer = optimizer([{"params": decayed}, {"params": others, "weight_decay": 0.0}])

    def change_plan(self, plan: Plan, masking: str) -> None:
        """Go on under another plan of as many workers.

        Weights, masters and the state of an element-wise optimizer belong to the blocks: they stay.

        :raises ConfigError: when blocks would be skipped that cannot be.
        """
        if skips_blocks(plan, masking) and not skips_blocks(self.plan, self.masking):
            check_skippable(self.model)
        self.plan = plan
        self.masking = masking
        self.residual_scale.set(plan, masking)

    @contextmanager
    def worker(self, rank: int) -> Iterator[None]:
        """Within, ``self.model`` is the subnetwork of ``rank``."""
        blocks = self.model.get_submodule(self._path)
        assert isinstance(blocks, nn.ModuleList)
        removed = mask_blocks(blocks, self.plan.owned_blocks(rank), self.masking)
        try:
            yield
        finally:
            restore_blocks(blocks, removed)
            blocks.requires_grad_(True)

    def accumulate(self, batch: Tensor, micro_batch: int | None = None) -> list[float]:
        """Forward and backward of every worker; the averaged gradients are in the masters.

        :param batch: token ids ``[global batch, sequence + 1]``; worker r takes the r-th
            contiguous slice.
        :param micro_batch: how many samples go through the model at once (default: the slice).
        :returns: each worker's mean loss in nats per token.
        :raises ValueError: when the samples cannot be shared equally.
        """
        n = self.plan.world_size
        if len(batch) % n:  # chunk would make other slices, or fewer than workers
            raise ValueError(
                f"batch = {len(batch)} samples for {n} workers: each takes as many; give a "
                f"multiple of {n}"
            )
        total = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        losses = []
        try:
            for rank, samples in enumerate(batch.chunk(n)):
                targets = target_count(samples)
                losses.append(0.0)
                with self.worker(rank):
                    for part in samples.split(micro_batch or len(samples)):
                        loss = self.loss(self.model, part) / targets
                        loss.backward()
                        losses[rank] += loss.item()
                        self._collect(total)
        finally:  # the gradients of a pass that failed halfway are of no step
            for weight in self._weights.values():
                weight.grad = None
        for unit in self.layout.units:
            owners = len(self.plan.owners(unit.block))
            for spec in unit.parameters:
                self.masters[spec.name].grad = total[spec.name] / owners
        return losses

    def step(self, batch: Tensor, micro_batch: int | None = None) -> StepResult:
        """One optimizer step on a global batch; parameters as in :meth:`accumulate`."""
        losses = self.accumulate(batch, micro_batch)
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        if not all(map(math.isfinite, (norm, *losses))):
            return StepResult(tuple(losses), math.nan if math.isfinite(norm) else norm, True)
        if self.max_norm > 0 and norm > self.max_norm:
            for gradient in gradients:
                gradient *= self.max_norm / (norm + 1e-6)
        self.optimizer.step()
        self._copy_masters()
        return StepResult(tuple(losses), norm, False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Tensor]) -> float:
        """The whole model's mean loss (nats per token) over ``[batch, sequence + 1]`` tensors.

        :raises ValueError: when there are none.
        """
        if not sum(map(len, batches)):
            raise ValueError("evaluate: batches: there are no samples; give at least one")
        total, targets = 0.0, 0
        self.model.eval()
        with self.residual_scale.whole_model():
            for batch in batches:
                total += self.loss(self.model, batch).item()
                targets += target_count(batch)
        self.model.train()
        return total / targets

    def exported(self) -> dict[str, Tensor]:
        """The whole model's state dict, with the residual scale folded into its weights."""
        state: dict[str, Tensor] = self.model.state_dict()
        for name, fold in self.residual_scale.folds().items():
            state[name] = fold(self.masters[name].detach()).to(state[name].dtype)
        return state

    def _collect(self, total: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            if parameter.grad is not None:
                total[name] += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, master in self.masters.items():
            self._weights[name].copy_(master)
