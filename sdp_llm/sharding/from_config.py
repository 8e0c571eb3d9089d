"""From a run config to this rank's part of the model."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.config import RunConfig
from sdp_llm.plan import plan_from_config
from sdp_llm.sharding.groups import check_agreement
from sdp_llm.sharding.materialize import ShardedModel, materialize
from sdp_llm.subnetwork.build import build_subnetwork

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Source: TypeAlias = PretrainedConfig | PreTrainedModel


def shard(source: Source, run: RunConfig, device: torch.device, timeout: timedelta) -> ShardedModel:
    """Plan, build and materialise this rank's subnetwork. Collective over the world.

    :param source: see :func:`sdp_llm.subnetwork.build.build_subnetwork`.
    :raises ConfigError: when the plan is impossible or differs between ranks, or the model has no
        single list of blocks.
    """
    config = source.config if isinstance(source, PreTrainedModel) else source
    depth = config.get_text_config().num_hidden_layers
    plan = plan_from_config(run.sdp, dist.get_world_size(), depth)
    check_agreement("the plan", plan.fingerprint())
    dtype = torch.bfloat16 if run.bf16.enabled else torch.float32
    travelling = run.communication_data_type
    zero = run.zero_optimization
    subnetwork = build_subnetwork(
        source,
        plan,
        dist.get_rank(),
        masking=run.sdp.masking,
        max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        attn_implementation=run.model.attn_implementation if run.model else None,
        gradient_checkpointing=run.model.gradient_checkpointing if run.model else False,
    )
    return materialize(
        subnetwork,
        seed=run.training.seed,
        stage=zero.stage,
        dtype=dtype,
        communication_dtype=DTYPES[travelling] if travelling else dtype,
        device=device,
        timeout=timeout,
    )
