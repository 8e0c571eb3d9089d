"""How many optimizer steps a budget is, and which phases they are."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from sdp_llm.config import BatchSizes, RunConfig, check_warmup
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Schedule, schedule_from_config
from sdp_llm.plan.cost import steps_for_dense_flops
from sdp_llm.plan.peers import peer_cost
from sdp_llm.plan.schedule_cost import check_memory_limit, mean_flops_per_token, schedule_cost
from sdp_llm.plan.size import CostSetup, ModelSize, setup_from_config
from sdp_llm.subnetwork.measure import model_size
from sdp_llm.training.environment import device_type
from sdp_llm.training.position import Position


def run_size(
    run: RunConfig, model: PretrainedConfig, batch: BatchSizes, backend: str | None = None
) -> tuple[ModelSize, CostSetup]:
    """The model and the settings of a run, as far as they cost something.

    :param backend: "gloo" or "nccl"; None: what this machine uses.
    :raises ConfigError: for a model whose cost cannot be predicted.
    """
    assert run.model is not None
    zero = run.zero_optimization
    size = model_size(
        model,
        batch.micro_batch,
        _sequence_length(run, model),
        gradient_checkpointing=run.model.gradient_checkpointing,
        attn_implementation=run.model.attn_implementation,
        dtype=torch.bfloat16 if run.bf16.enabled else torch.float32,
        max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        document_mask=run.data is not None and run.data.document_mask,
        loss_chunk=run.training.loss_chunk,
    )
    backend = backend or ("nccl" if device_type() == "cuda" else "gloo")
    return size, setup_from_config(run, batch.accumulation, backend)


def run_schedule(
    run: RunConfig, model: PretrainedConfig, batch: BatchSizes, world_size: int
) -> Schedule:
    """The phases of a run, checked against the model and the budget.

    :raises ConfigError: the plan of a phase is impossible, a phase comes to no step, the config has
        a schedule without a budget, samples are longer than the model takes, or the learning rate
        would still warm up when the budget ends.
    """
    check_positions(run, model)
    steps = total_steps(run, model, batch, world_size) if run.training.budgets() else None
    if run.scheduler is not None and steps is not None:
        check_warmup(run.scheduler, steps)
    depth = model.get_text_config().num_hidden_layers
    return schedule_from_config(run.sdp, world_size, depth, steps)


def budget_line(steps: int, batch: int, sequence_length: int, position: Position) -> str:
    """The steps of a run and their tokens, of which those before ``position`` are read."""
    size = f"of {batch} samples" if not position.step else f"(those to come of {batch} samples)"
    tokens = position.tokens + (steps - position.step) * batch * sequence_length
    return f"budget      {steps:,} steps {size}, {tokens:,} tokens"


def check_positions(run: RunConfig, model: PretrainedConfig) -> None:
    """Check that the model takes samples as long as ``data.sequence_length``.

    :raises ConfigError: they are longer.
    """
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if run.data is not None and positions is not None and run.data.sequence_length > positions:
        where = "" if run.model is None else f" in {run.model.config}"
        raise ConfigError(
            f"data.sequence_length = {run.data.sequence_length}: longer than the model's "
            f"max_position_embeddings = {positions}{where}; use at most {positions}"
        )


def total_steps(run: RunConfig, model: PretrainedConfig, batch: BatchSizes, world_size: int) -> int:
    """The optimizer steps of the run's budget, at least 1; a part of a step counts as one."""
    training = run.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return -(-training.tokens // (batch.global_batch * _sequence_length(run, model)))
    assert training.flops_of_dense_steps is not None
    size, setup = run_size(run, model, batch)
    dense = peer_cost(size, world_size, setup, "DDP").compute.mean
    sdp = mean_flops_per_token(size, run.sdp, world_size, setup)
    return steps_for_dense_flops(training.flops_of_dense_steps, sdp, dense)


def steps_from(run: RunConfig, batch: BatchSizes, position: Position, steps: int) -> int:
    """The last step of a run that has come to ``position``, perhaps with another global batch.

    :param steps: of the budget, had all been trained with this batch.
    """
    if run.training.tokens is None or position.step == 0:
        return max(steps, position.step)
    assert run.data is not None
    per_step = batch.global_batch * run.data.sequence_length
    return position.step + max(0, -(-(run.training.tokens - position.tokens) // per_step))


def check_memory(
    run: RunConfig, model: PretrainedConfig, batch: BatchSizes, schedule: Schedule
) -> None:
    """Check that every phase is predicted to fit ``sdp.memory_limit_gib``, where it is given.

    :raises ConfigError: when one does not, or nothing can be predicted.
    """
    limit = run.sdp.memory_limit_gib
    if limit is None:
        return
    try:
        size, setup = run_size(run, model, batch)
    except ConfigError as error:
        raise ConfigError(
            f"sdp.memory_limit_gib = {limit:g}: cannot be checked, set it to null: {error}"
        ) from error
    check_memory_limit(schedule, schedule_cost(size, schedule, setup), limit)


def _sequence_length(run: RunConfig, model: PretrainedConfig) -> int:
    """Tokens per sample; without a data section as many as the model can take."""
    if run.data is not None:
        return run.data.sequence_length
    return int(model.get_text_config().max_position_embeddings)
