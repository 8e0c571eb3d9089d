"""What the cost of training depends on besides the plan: the model and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdp_llm.config import OptimizerConfig, RunConfig

FP32_BYTES = 4


@dataclass(frozen=True)
class UnitSize:
    """One unit, in parameters; `block` is None for the shared parameters outside the blocks."""

    block: int | None
    numel: int
    largest_parameter: int


@dataclass(frozen=True)
class BlockSize:
    """What one block computes and keeps.

    Attributes:
        matmul_numel: parameters of its matrices, each of which multiplies every token once.
        activations: bytes that autograd saves in one micro-batch where the block is trained.
        frozen_activations: the same where it runs frozen (backward masking).
    """

    matmul_numel: int
    activations: int = 0
    frozen_activations: int = 0


@dataclass(frozen=True)
class ModelSize:
    """The whole model at one micro-batch size and sequence length; see `subnetwork/measure.py`.

    Attributes:
        units: in forward order, pieces of a split unit next to each other.
        blocks: by global index.
        shared_matmul_numel: parameters of the matrices outside the blocks. Looking up an embedding
            is no product; the head is one, also where it is tied.
        attention_width: heads times head dimension.
        sequence_length: tokens per sample.
        micro_batch: samples per rank and forward pass.
        shared_activations: bytes that autograd saves outside the blocks in one micro-batch.
        recomputed_activations: bytes that come on top while a checkpointed block is recomputed.
        loss_activations: bytes that come on top while the loss and the gradient of the logits are
            computed; all activations are there then.
    """

    units: tuple[UnitSize, ...]
    blocks: tuple[BlockSize, ...]
    shared_matmul_numel: int
    attention_width: int
    sequence_length: int
    micro_batch: int
    shared_activations: int = 0
    recomputed_activations: int = 0
    loss_activations: int = 0

    @property
    def passing_activations(self) -> int:
        """The most bytes that come on top of what autograd saves, at one moment or another."""
        return max(self.recomputed_activations, self.loss_activations)

    @property
    def numel(self) -> int:
        """Parameters of the whole model."""
        return sum(unit.numel for unit in self.units)

    @property
    def block_numel(self) -> tuple[int, ...]:
        """Parameters of each block, by global index."""
        sizes = [0] * len(self.blocks)
        for unit in self.units:
            if unit.block is not None:
                sizes[unit.block] += unit.numel
        return tuple(sizes)


@dataclass(frozen=True)
class CostSetup:
    """How a run trains, as far as it costs something.

    Attributes:
        masking: "forward" or "backward".
        stage: ZeRO stage inside the owner sets, 0 to 2.
        weight_bytes: `w`; at 4 the masters are the weights.
        reduction_bytes: `r`.
        accumulation: `A`.
        gradient_checkpointing: blocks run forward a second time in the backward pass.
        overlap: `overlap_comm`: gradients are collected while others are under way.
        under_way: `sdp.reductions_under_way`: how many reductions may be.
        backend: "gloo" or "nccl": gloo receives as much as it sends, NCCL the reduced shard.
        moment_bytes: optimizer state per parameter without the master: 8 for Adam and AdamW.
    """

    masking: str = "forward"
    stage: int = 0
    weight_bytes: int = 4
    reduction_bytes: int = 4
    accumulation: int = 1
    gradient_checkpointing: bool = False
    overlap: bool = True
    under_way: int = 1
    backend: str = "gloo"
    moment_bytes: int = 8

    @property
    def optimizer_bytes(self) -> int:
        """Bytes per parameter of moments and, where the weights are not fp32, the master."""
        master = 0 if self.weight_bytes == FP32_BYTES else FP32_BYTES
        return master + self.moment_bytes


def setup_from_config(config: RunConfig, accumulation: int, backend: str) -> CostSetup:
    """The settings of a run config.

    :param config: the run config; without an optimizer section AdamW is assumed.
    :param accumulation: micro-batches per step, resolved.
    :param backend: "gloo" or "nccl".
    """
    zero = config.zero_optimization
    weight_bytes = 2 if config.bf16.enabled else FP32_BYTES
    reduction = {"float32": FP32_BYTES, "bfloat16": 2, None: weight_bytes}
    return CostSetup(
        masking=config.sdp.masking,
        stage=zero.stage,
        weight_bytes=weight_bytes,
        reduction_bytes=reduction[config.communication_data_type],
        accumulation=accumulation,
        gradient_checkpointing=config.model is not None and config.model.gradient_checkpointing,
        overlap=zero.overlap_comm,
        under_way=config.sdp.reductions_under_way,
        backend=backend,
        moment_bytes=_moment_bytes(config.optimizer),
    )


def _moment_bytes(optimizer: OptimizerConfig | None) -> int:
    """Bytes of fp32 state per parameter that torch's optimizer keeps."""
    if optimizer is None or optimizer.type in ("Adam", "AdamW"):
        tensors = 3 if optimizer is not None and optimizer.params.get("amsgrad") else 2
    elif optimizer.type == "RMSprop":
        tensors = 1 + sum(bool(optimizer.params.get(key)) for key in ("momentum", "centered"))
    elif optimizer.type == "SGD":
        tensors = 1 if optimizer.params.get("momentum") else 0
    else:
        tensors = 1
    return FP32_BYTES * tensors
