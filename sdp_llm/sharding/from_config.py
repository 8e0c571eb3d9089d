"""From a run config to this rank's part of the model."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.agree import check_agreement
from sdp_llm.config import RunConfig
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Schedule, schedule_from_config
from sdp_llm.sharding.materialize import ShardedModel, materialize
from sdp_llm.subnetwork.adapter import empty_model, model_layout
from sdp_llm.subnetwork.build import build_subnetwork
from sdp_llm.subnetwork.pretrained import PretrainedWeights, open_pretrained
from sdp_llm.subnetwork.skippable import check_skippable, skips_blocks
from sdp_llm.subnetwork.stored import named

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Source: TypeAlias = PretrainedConfig | PreTrainedModel


def agreed_schedule(source: Source, run: RunConfig, total_steps: int | None) -> Schedule:
    """The plans of the run, the same on every rank. Collective over the world.

    :raises ConfigError: when one is impossible or they differ between ranks, or there is an
        ``sdp.schedule`` but no ``total_steps``.
    """
    config = source.config if isinstance(source, PreTrainedModel) else source
    depth = config.get_text_config().num_hidden_layers
    schedule = schedule_from_config(run.sdp, dist.get_world_size(), depth, total_steps)
    check_agreement("the plan", lambda: hashlib.sha256(repr(schedule).encode()).hexdigest()[:16])
    return schedule


def shard(
    source: Source, run: RunConfig, schedule: Schedule, device: torch.device, timeout: timedelta
) -> ShardedModel:
    """Build and materialise this rank's subnetwork of the first step. Collective over the world.

    :param source: see :func:`sdp_llm.subnetwork.build.build_subnetwork`.
    :raises ConfigError: when the model has no single list of blocks, or they cannot be skipped
        where a phase does that, ``sdp.residual_scale`` is not exact for it, or ``model.init_from``
        is not a checkpoint of it.
    """
    if any(skips_blocks(phase.plan, phase.masking) for phase in schedule.phases):
        check_skippable(source)
    plan, masking = schedule.at(0)
    dtype = torch.bfloat16 if run.bf16.enabled else torch.float32
    travelling = run.communication_data_type
    zero = run.zero_optimization
    subnetwork = build_subnetwork(
        source,
        plan,
        dist.get_rank(),
        masking=masking,
        max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        attn_implementation=run.model.attn_implementation if run.model else None,
        gradient_checkpointing=run.model.gradient_checkpointing if run.model else False,
        pretrained=_pretrained(source, run),
        residual_scale=run.sdp.residual_scale,
    )
    return materialize(
        subnetwork,
        seed=run.training.seed,
        stage=zero.stage,
        dtype=dtype,
        communication_dtype=DTYPES[travelling] if travelling else dtype,
        device=device,
        owner_sets=schedule.owner_sets,
        timeout=timeout,
    )


def _pretrained(source: Source, run: RunConfig) -> PretrainedWeights | None:
    """The checkpoint to start from, the same on every rank; every rank raises if one cannot."""
    if run.model is None or run.model.init_from is None:
        return None
    if isinstance(source, PreTrainedModel):
        raise ConfigError(
            f"{named(run.model.init_from)}: the model that was passed has weights already; pass "
            "its config, or remove the key"
        )
    opened: list[PretrainedWeights] = []

    def open_it() -> str:
        assert run.model is not None
        assert run.model.init_from is not None
        model = empty_model(source, run.model.attn_implementation)
        opened.append(open_pretrained(run.model.init_from, model))
        # Every rank owns these, so that it reads nothing that it does not own.
        shared = [unit for unit in model_layout(model).units if unit.block is None]
        return opened[0].fingerprint(spec.name for unit in shared for spec in unit.parameters)

    check_agreement(f"the checkpoint of {named(run.model.init_from)}", open_it)
    return opened[0]
