"""DeepSpeed's rule for batch sizes: global batch = micro-batch x accumulation x world size."""

from __future__ import annotations

from dataclasses import dataclass

from sdp_llm.config.schema import RunConfig
from sdp_llm.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Sizes in samples that fit together.

    Attributes:
        global_batch: samples per optimizer step over all ranks.
        micro_batch: samples per rank and forward pass.
        accumulation: micro-batches per rank and optimizer step.
    """

    global_batch: int
    micro_batch: int
    accumulation: int


def resolve_batch(config: RunConfig, world_size: int) -> BatchSizes:
    """Fill in the batch sizes that the config leaves open.

    Where only one size is given, accumulation is 1.

    :raises ConfigError: no size is given, or the given ones do not fit `world_size`.
    """
    total = config.train_batch_size
    micro = config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    if total is None and micro is None:
        raise ConfigError(
            "train_batch_size: neither it nor train_micro_batch_size_per_gpu is given; "
            "give at least one of them"
        )
    if total is None:
        assert micro is not None
        steps = steps or 1
        return BatchSizes(micro * steps * world_size, micro, steps)
    if micro is None:
        steps = steps or 1
        micro = total // (steps * world_size)
    elif steps is None:
        steps = total // (micro * world_size)
    if micro * steps * world_size != total:
        raise _contradiction(config, world_size)
    return BatchSizes(total, micro, steps)


def _contradiction(config: RunConfig, world_size: int) -> ConfigError:
    """Every factor as the file gives it, and the nearest global batch that would fit."""
    total = config.train_batch_size or 0
    micro = config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    factors = (
        f"train_micro_batch_size_per_gpu {micro or 'auto'} x "
        f"gradient_accumulation_steps {steps or 'auto'} x world size {world_size}"
    )
    unit = (micro or 1) * (steps or 1) * world_size
    if micro and steps:
        fix = f"use train_batch_size = {unit} or set one of the three to auto"
    else:
        lower = total // unit * unit
        near = f"{lower} or {lower + unit}" if lower else f"{unit}"
        fix = f"use a multiple of {unit}, such as {near}"
    return ConfigError(f"train_batch_size = {total}: must be {factors}; {fix}")
