"""How many optimizer steps a budget is."""

from __future__ import annotations

import torch

from sdp_llm.config import RunConfig
from sdp_llm.plan.cost import sdp_cost, steps_for_dense_flops
from sdp_llm.plan.peers import peer_cost
from sdp_llm.plan.size import CostSetup, ModelSize, setup_from_config
from sdp_llm.subnetwork.measure import model_size
from sdp_llm.training.environment import device_type
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.position import Position


def run_size(run: RunConfig, inputs: Inputs) -> tuple[ModelSize, CostSetup]:
    """The model and the settings of a run, as far as they cost something."""
    assert run.model is not None
    assert run.data is not None
    zero = run.zero_optimization
    size = model_size(
        inputs.model,
        inputs.batch.micro_batch,
        run.data.sequence_length,
        gradient_checkpointing=run.model.gradient_checkpointing,
        attn_implementation=run.model.attn_implementation,
        dtype=torch.bfloat16 if run.bf16.enabled else torch.float32,
        max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        document_mask=run.data.document_mask,
    )
    backend = "nccl" if device_type() == "cuda" else "gloo"
    return size, setup_from_config(run, inputs.batch.accumulation, backend)


def total_steps(run: RunConfig, inputs: Inputs) -> int:
    """The optimizer steps of the run's budget, at least 1; a part of a step counts as one."""
    training = run.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        assert run.data is not None
        return -(-training.tokens // (inputs.batch.global_batch * run.data.sequence_length))
    assert training.flops_of_dense_steps is not None
    size, setup = run_size(run, inputs)
    dense = peer_cost(size, inputs.plan.world_size, setup, "DDP").compute.mean
    sdp = sdp_cost(size, inputs.plan, setup).compute.mean
    return steps_for_dense_flops(training.flops_of_dense_steps, sdp, dense)


def steps_from(run: RunConfig, inputs: Inputs, position: Position, steps: int) -> int:
    """The last step of a run that has come to ``position``, perhaps with another global batch.

    :param steps: of the budget, had all been trained with this batch.
    """
    if run.training.tokens is None or position.step == 0:
        return max(steps, position.step)
    per_step = inputs.batch.global_batch * inputs.train.sequence_length
    return position.step + max(0, -(-(run.training.tokens - position.tokens) // per_step))
