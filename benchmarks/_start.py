"""Starts a system on this rank, and trains with it; the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks._case import LEARNING_RATE, MAX_NORM
from benchmarks._systems import CHECKPOINTING, SDP, UNSHARDED, System, Workload
from benchmarks.storages import engine_members, state_tensors
from sdp_llm.distributed import init_distributed
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.subnetwork.adapter import find_blocks

Members = dict[str, list[Tensor]]
# DeepSpeed allocates whole buckets, of 500 M elements by default: more than these models have.
ZERO_BUCKET = 25_000_000
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Running:
    """A system that trains on this rank.

    ``forward`` gives a micro-batch's summed loss, ``backward`` takes its share of the step's loss;
    both know whether it is the last of the step, which ends with an update. Gradients live until
    the ``zero_grad`` of the next step. ``members`` are the tensors that hold weights, gradients
    and optimizer state. ``wait`` ends what goes on after a step. ``sent`` are the
    bytes sent so far, as SDP counts them.
    """

    zero_grad: Callable[[], None]
    forward: Callable[[Tensor, bool], Tensor]
    backward: Callable[[Tensor, bool], None]
    members: Callable[[], Members]
    close: Callable[[], None]
    wait: Callable[[], None] = lambda: None
    sent: Callable[[], int] = lambda: 0

    def train_step(self, tokens: Tensor, after_forward: Callable[[], None] | None = None) -> None:
        """One optimizer step.

        :param tokens: ``[accumulation, sequence + 1]``, int64.
        :param after_forward: called between the forward and the backward pass of each micro-batch.
        """
        samples = tokens.split(1)
        self.zero_grad()
        for i, sample in enumerate(samples):
            is_last = i == len(samples) - 1
            loss = self.forward(sample, is_last) / target_count(tokens)
            if after_forward is not None:
                after_forward()
            self.backward(loss, is_last)
            del loss


def start(system: System, workload: Workload, model: PretrainedConfig) -> Running:
    """Build a system. Collective over the world; the same weights on every rank."""
    if system.kind == SDP:
        return _start_sdp(system, workload, model)
    if system.kind in ("DDP", CHECKPOINTING):
        return _start_ddp(system, workload, model)
    if system.kind.startswith("ZeRO"):
        return _start_zero(int(system.kind[-1]), workload, model)
    return _start_fsdp2(system.kind != UNSHARDED, workload, model)


def whole_model(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model with the same fp32 weights on every rank."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    model.train()
    return model


def _start_sdp(system: System, workload: Workload, model: PretrainedConfig) -> Running:
    engine, *_ = initialize(model, workload.case(system).run_config())

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    return Running(
        _nothing,
        lambda sample, _: summed_loss(engine, sample),
        backward,
        partial(engine_members, engine),
        engine.destroy,
        engine.wait_for_weights,
        lambda: engine.sharded.communicator.bytes_sent,
    )


def _start_ddp(system: System, workload: Workload, config: PretrainedConfig) -> Running:
    model = whole_model(config)
    masters = parameters = list(model.parameters())
    if workload.is_bf16:
        masters = [nn.Parameter(p.detach().clone()) for p in parameters]
        model.to(torch.bfloat16)
    if system.kind == CHECKPOINTING:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)

    def backward(loss: Tensor, is_last: bool) -> None:
        loss.backward()
        if not is_last:
            return
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        if workload.is_bf16:
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        optimizer.step()
        if workload.is_bf16:
            optimizer.zero_grad()  # the fp32 copies
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)

    def forward(sample: Tensor, is_last: bool) -> Tensor:
        ddp.require_backward_grad_sync = is_last  # what ddp.no_sync() sets
        return summed_loss(ddp, sample)

    def members() -> Members:
        gradients = [p.grad for p in (*parameters, *masters) if p.grad is not None]
        optimizer_state = [*state_tensors(optimizer), *(masters if workload.is_bf16 else ())]
        return {"weights": [*parameters], "gradients": gradients, "optimizer": optimizer_state}

    return Running(ddp.zero_grad, forward, backward, members, _nothing)


def _start_zero(stage: int, workload: Workload, config: PretrainedConfig) -> Running:
    import deepspeed

    init_distributed(TIMEOUT)  # without compiling what only inference on CPUs uses
    model = whole_model(config)
    hidden = config.hidden_size
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": workload.accumulation,
            "gradient_clipping": MAX_NORM,
            "bf16": {"enabled": workload.is_bf16},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "torch_adam": True, "fused": True},
            },
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "reduce_bucket_size": ZERO_BUCKET,
                "allgather_bucket_size": ZERO_BUCKET,
                # What transformers' integration fills in for "auto".
                "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
                "stage3_param_persistence_threshold": 10 * hidden,
            },
        },
    )

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    def members() -> Members:
        zero = engine.optimizer
        parameters = list(engine.module.parameters())
        weights = [getattr(p, "ds_tensor", p) for p in parameters]
        optimised = [p for group in zero.optimizer.param_groups for p in group["params"]]
        if stage == 3:
            gradients = [zero.grad_partitions_flat_buffer]
            optimised += zero.fp32_partitioned_groups_flat
        else:
            averaged = zero.averaged_gradients.values()
            gradients = [g for group in averaged if group is not None for g in _flat(group)]
            optimised += zero.single_partition_of_fp32_groups
        gradients += [p.grad for p in (*parameters, *optimised) if p.grad is not None]
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": [*optimised, *state_tensors(zero.optimizer)],
        }

    return Running(
        _nothing, lambda sample, _: summed_loss(engine, sample), backward, members, engine.destroy
    )


def _start_fsdp2(is_resharding: bool, workload: Workload, config: PretrainedConfig) -> Running:
    model = whole_model(config)
    mesh = init_device_mesh("cpu", (workload.world_size,))
    policy = MixedPrecisionPolicy()
    if workload.is_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for module in (*find_blocks(model)[1], model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=is_resharding)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def backward(loss: Tensor, is_last: bool) -> None:
        loss.backward()
        if is_last:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

    def members() -> Members:
        return {
            "weights": [_local(p) for p in parameters],
            "gradients": [_local(p.grad) for p in parameters if p.grad is not None],
            "optimizer": [_local(value) for value in state_tensors(optimizer)],
        }

    return Running(
        model.zero_grad, lambda sample, _: summed_loss(model, sample), backward, members, _nothing
    )


def _nothing() -> None:
    """DeepSpeed's engines zero their gradients themselves, and the others close with the ranks."""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tensors: Any) -> Iterable[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else tensors
