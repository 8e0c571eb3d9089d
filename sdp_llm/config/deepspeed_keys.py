"""What DeepSpeed's JSON knows beyond what `schema.py` declares, read from DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Mapping

from sdp_llm.config.kinds import (
    BETAS,
    BOOLEAN,
    COUNT,
    POSITIVE,
    Kind,
    choice,
    each,
    integer,
    number,
    one_or_each,
)

# Valid in DeepSpeed, an error here. Value: what to use instead, empty where there is nothing.
# Keys are full paths.
_NO_OFFLOAD = "lower sdp.coverage or use a higher zero_optimization.stage to save memory"
_NO_STAGE_3 = "it belongs to ZeRO stage 3; remove it"
UNSUPPORTED: Mapping[str, str] = {
    "activation_checkpointing": "use model.gradient_checkpointing",
    "aio": "",
    "allgather_size": "use zero_optimization.allgather_bucket_size",
    "autotuning": "",
    "bfloat16": "use bf16",
    "checkpoint": "checkpoints of sdp_llm need no options",
    "comet": "use tensorboard, wandb or csv_monitor",
    "comms_logger": "",
    "compile": "",
    "data_efficiency": "",
    "data_types": "use bf16 and communication_data_type",
    "dataloader_drop_last": "",
    "datastates_ckpt": "",
    "disable_allgather": "",
    "disable_python_gc": "",
    "dump_state": "",
    "expert_parallel": "",
    "flops_profiler": "launch/plan.py prints the FLOPs per token",
    "fp16": "use bf16",
    "gradient_allreduce_op": "gradients are averaged over the owners of a block",
    "gradient_predivide_factor": "gradients are averaged over the owners of a block",
    "hybrid_engine": "",
    "log_level": "",
    "managed_gradient_accumulation": "use gradient_accumulation_steps",
    "memory_breakdown": "",
    "pipeline": "",
    "prescale_gradients": "gradients are averaged over the owners of a block",
    "seq_parallel_communication_data_type": "use communication_data_type",
    "sequence_parallel_size": "",
    "tensor_parallel": "",
    "timers": "use wall_clock_breakdown",
    "torch_autocast": "use bf16",
    "use_data_before_expert_parallelism": "",
    "vocabulary_size": "",
    "weight_quantization": "",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "bf16.bf16_master_weights_and_grads": "master weights are fp32",
    "bf16.bf16_optimizer_states": "optimizer states are fp32",
    "bf16.check_grad_overflow": "steps with non-finite gradients are always skipped",
    "bf16.immediate_grad_update": "",
    "optimizer.legacy_fusion": "",
    "zero_optimization.compute_grad_norm": "the gradient norm is always computed",
    "zero_optimization.cpu_offload": _NO_OFFLOAD,
    "zero_optimization.cpu_offload_param": _NO_OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _NO_OFFLOAD,
    "zero_optimization.offload_optimizer": _NO_OFFLOAD,
    "zero_optimization.offload_param": _NO_OFFLOAD,
    "zero_optimization.zenflow": _NO_OFFLOAD,
    "zero_optimization.elastic_checkpoint": "checkpoints resume on any world size",
    "zero_optimization.enable_sanity_checks": "",
    "zero_optimization.ignore_unused_parameters": "unused parameters get zero gradients",
    "zero_optimization.leaf_module": _NO_STAGE_3,
    "zero_optimization.legacy_stage1": "",
    "zero_optimization.load_from_fp32_weights": "",
    "zero_optimization.log_trace_cache_warnings": _NO_STAGE_3,
    "zero_optimization.memory_efficient_linear": _NO_STAGE_3,
    "zero_optimization.override_module_apply": _NO_STAGE_3,
    "zero_optimization.parameter_alignment": "",
    "zero_optimization.pipeline_loading_checkpoint": _NO_STAGE_3,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "",
    "zero_optimization.stage3_allgather_sequential": _NO_STAGE_3,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _NO_STAGE_3,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _NO_STAGE_3,
    "zero_optimization.stage3_max_live_parameters": _NO_STAGE_3,
    "zero_optimization.stage3_max_reuse_distance": _NO_STAGE_3,
    "zero_optimization.stage3_model_persistence_threshold": _NO_STAGE_3,
    "zero_optimization.stage3_module_granularity_threshold": _NO_STAGE_3,
    "zero_optimization.stage3_param_persistence_threshold": _NO_STAGE_3,
    "zero_optimization.stage3_prefetch_bucket_size": _NO_STAGE_3,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _NO_STAGE_3,
    "zero_optimization.sub_group_size": _NO_STAGE_3,
    "zero_optimization.use_multi_rank_bucket_allreduce": "",
    "zero_optimization.zero_hpz_partition_size": _NO_STAGE_3,
    "zero_optimization.zero_quantized_gradients": "use communication_data_type",
    "zero_optimization.zero_quantized_nontrainable_weights": _NO_STAGE_3,
    "zero_optimization.zero_quantized_weights": _NO_STAGE_3,
}

# DeepSpeed itself refuses these by now.
REMOVED: Mapping[str, str] = {
    "amp": "use bf16",
    "compression_training": "",
    "curriculum_learning": "",
    "eigenvalue": "",
    "elasticity": "checkpoints resume on any world size",
    "graph_harvesting": "",
    "nebula": "",
    "progressive_layer_drop": "",
    "quantize_training": "",
    "sparse_attention": "use model.attn_implementation",
    "sparse_gradients": "",
    "zero_optimization.mics_hierarchical_params_gather": "",
    "zero_optimization.mics_shard_size": "",
    "zero_optimization.zeropp_loco_param": "",
}

_LR = number(above=0)
_FLAG = BOOLEAN
_DECAY = number(0)
_EPS = number(0)
_TORCH = {"foreach": _FLAG, "maximize": _FLAG}
_ADAM = {
    "lr": _LR,
    "betas": BETAS,
    "eps": _EPS,
    "weight_decay": _DECAY,
    "amsgrad": _FLAG,
    "fused": _FLAG,
    **_TORCH,
    "torch_adam": _FLAG,
    "adam_w_mode": _FLAG,
}

# By the name under which DeepSpeed or torch.optim builds the optimizer.
OPTIMIZERS: Mapping[str, Mapping[str, Kind]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "SGD": {
        "lr": _LR,
        "momentum": number(0),
        "dampening": number(0),
        "weight_decay": _DECAY,
        "nesterov": _FLAG,
        "fused": _FLAG,
        **_TORCH,
    },
    "Adagrad": {
        "lr": _LR,
        "lr_decay": number(0),
        "weight_decay": _DECAY,
        "initial_accumulator_value": number(0),
        "eps": _EPS,
        "fused": _FLAG,
        **_TORCH,
    },
    "RMSprop": {
        "lr": _LR,
        "alpha": number(0),
        "eps": _EPS,
        "weight_decay": _DECAY,
        "momentum": number(0),
        "centered": _FLAG,
        **_TORCH,
    },
}

# Names a DeepSpeed user may know; those in the first set need whole tensors.
NOT_ELEMENT_WISE = (
    *("Lamb", "OneBitLamb", "OneBitAdam", "ZeroOneAdam", "Muon", "MuAdam", "MuAdamW", "MuSGD"),
    *("LBFGS", "Adafactor", "SparseAdam"),
)
OTHER_OPTIMIZERS = ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")

UNSUPPORTED_OPTIMIZER_PARAMS: Mapping[str, str] = {
    "max_grad_norm": "use gradient_clipping",
    "bias_correction": "",
    "capturable": "",
    "differentiable": "",
    "fp32_optimizer_states": "optimizer states are fp32",
    "set_grad_none": "",
}

_ANY_NUMBER = number()
_RATE = number(0)
_WARMUP = {
    "warmup_num_steps": POSITIVE,
    "warmup_type": choice("log", "linear"),
    "last_batch_iteration": integer(-1),
}
_WARMUP_LR = {"warmup_min_lr": _RATE, "warmup_max_lr": _RATE, **_WARMUP}

# Parameters of DeepSpeed's own schedulers (deepspeed/runtime/lr_schedules.py).
SCHEDULERS: Mapping[str, Mapping[str, Kind]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": _RATE,
        "lr_range_test_step_size": POSITIVE,
        "lr_range_test_step_rate": _ANY_NUMBER,
        "lr_range_test_staircase": _FLAG,
        "last_batch_iteration": integer(-1),
    },
    "OneCycle": {
        "cycle_min_lr": _RATE,
        "cycle_max_lr": _RATE,
        "decay_lr_rate": _ANY_NUMBER,
        "cycle_first_step_size": POSITIVE,
        "cycle_second_step_size": COUNT,
        "cycle_first_stair_count": COUNT,
        "cycle_second_stair_count": COUNT,
        "decay_step_size": COUNT,
        "cycle_momentum": _FLAG,
        "cycle_min_mom": _RATE,
        "cycle_max_mom": _RATE,
        "decay_mom_rate": _ANY_NUMBER,
        "last_batch_iteration": integer(-1),
    },
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {"total_num_steps": POSITIVE, **_WARMUP_LR},
    "WarmupCosineLR": {
        "total_num_steps": POSITIVE,
        "warmup_min_ratio": _RATE,
        "cos_min_ratio": _RATE,
        **_WARMUP,
    },
}
DEFAULT_WARMUP_STEPS = 1000  # of all that warm up
REQUIRED_SCHEDULER_PARAMS: Mapping[str, tuple[str, ...]] = {
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
    # Without it DeepSpeed takes 0.001, whatever the optimizer's lr is.
    "WarmupDecayLR": ("total_num_steps", "warmup_max_lr"),
    "WarmupCosineLR": ("total_num_steps",),
    "StepLR": ("step_size",),
    "MultiStepLR": ("milestones",),
    "ExponentialLR": ("gamma",),
    "CosineAnnealingLR": ("T_max",),
    "CosineAnnealingWarmRestarts": ("T_0",),
    "CyclicLR": ("base_lr", "max_lr"),
    "OneCycleLR": ("max_lr",),
}

# torch's schedulers that need nothing but numbers; what is left out here, such as an upper limit,
# torch checks.
_EACH_RATE = one_or_each(_RATE)
_FACTOR = number(above=0)
_START = {"last_epoch": integer(-1, -1)}  # a checkpoint says where to go on
TORCH_SCHEDULERS: Mapping[str, Mapping[str, Kind]] = {
    "StepLR": {"step_size": POSITIVE, "gamma": _ANY_NUMBER, **_START},
    "MultiStepLR": {"milestones": each(COUNT), "gamma": _ANY_NUMBER, **_START},
    "ConstantLR": {"factor": _RATE, "total_iters": COUNT, **_START},
    "LinearLR": {"start_factor": _RATE, "end_factor": _RATE, "total_iters": COUNT, **_START},
    "ExponentialLR": {"gamma": _ANY_NUMBER, **_START},
    "PolynomialLR": {"total_iters": COUNT, "power": _ANY_NUMBER, **_START},
    "CosineAnnealingLR": {"T_max": POSITIVE, "eta_min": _RATE, **_START},
    "CosineAnnealingWarmRestarts": {
        "T_0": POSITIVE,
        "T_mult": POSITIVE,
        "eta_min": _RATE,
        **_START,
    },
    "CyclicLR": {
        "base_lr": _EACH_RATE,
        "max_lr": _EACH_RATE,
        "step_size_up": POSITIVE,
        "step_size_down": POSITIVE,
        "mode": choice("triangular", "triangular2", "exp_range"),
        "gamma": _ANY_NUMBER,
        "scale_mode": choice("cycle", "iterations"),
        "cycle_momentum": _FLAG,
        "base_momentum": _EACH_RATE,
        "max_momentum": _EACH_RATE,
        **_START,
    },
    "OneCycleLR": {
        "max_lr": _EACH_RATE,
        "total_steps": POSITIVE,
        "epochs": POSITIVE,
        "steps_per_epoch": POSITIVE,
        "pct_start": _RATE,
        "anneal_strategy": choice("cos", "linear"),
        "cycle_momentum": _FLAG,
        "base_momentum": _EACH_RATE,
        "max_momentum": _EACH_RATE,
        "div_factor": _FACTOR,
        "final_div_factor": _FACTOR,
        "three_phase": _FLAG,
        **_START,
    },
}
# These need functions, other schedulers or a metric, which a JSON file cannot give.
UNSUPPORTED_SCHEDULERS = (
    *("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"),
)
