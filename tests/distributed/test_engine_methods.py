"""Every public method that the engine inherits works, or raises one clear line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sdp_llm.engine import SDPEngine
from sdp_llm.plan import make_plan
from sdp_llm.unsupported import UNSUPPORTED
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, build, forward_backward, my_slice

LR = 1e-3
NUMEL = 500_000_000


def _names(text: str) -> list[str]:
    return text.split()


# Called without arguments; what they must return on every rank of CASE.
CASE = Case(2, stage=2, accumulation=3, is_bf16=True)
VALUES: dict[str, Any] = {
    "bfloat16_enabled": True,
    "clip_fp32_gradients": None,
    "curriculum_learning_enabled": False,
    "data_efficiency_enabled": False,
    "data_sampling_enabled": False,
    "dataloader_drop_last": False,
    "fp16_auto_cast": False,
    "fp16_enabled": False,
    "get_data_types": (torch.bfloat16, torch.float32),
    "get_lr": [LR, LR],
    "get_mom": [(0.9, 0.999)] * 2,
    "get_type": [0.0, 0.0],
    "get_wall_clock_timers": {},
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "gradient_predivide_factor": 1.0,
    "is_deepcompile_active": False,
    "is_deepcompile_enabled": False,
    "is_first_weights_partition_group": False,
    "is_gradient_accumulation_boundary": False,
    "load_universal_checkpoint": False,
    "managed_gradient_accumulation": True,
    "optimizer_name": "adamw",
    "postscale_gradients": True,
    "random_ltd_enabled": False,
    "scheduler_name": None,
    "scheduler_params": None,
    "steps_per_print": None,  # the run config's is for the trainer's own log
    "super_offload": False,
    "torch_autocast_enabled": False,
    "train_batch_size": 6,
    "train_micro_batch_size_per_gpu": 1,
    "wall_clock_breakdown": False,
    "was_step_applied": True,
    "zero_allgather_bucket_size": NUMEL,
    "zero_cpu_offload": False,
    # What DeepSpeed itself runs with; the stage is what the owner sets do.
    "zero_optimization": False,
    "zero_optimization_partition_gradients": True,
    "zero_optimization_partition_weights": False,
    "zero_optimization_stage": 2,
    "zero_overlap_comm": True,
    "zero_reduce_bucket_size": NUMEL,
}
# Called without arguments; they describe features of DeepSpeed that are off, and return.
DESCRIPTIONS = _names("""
    aio_config autotp_size autotuning_enabled autotuning_end_profile_step autotuning_metric
    autotuning_metric_path autotuning_model_info_path autotuning_profile_model_info
    autotuning_start_profile_step bf16_master_weights_and_gradients bf16_optimizer_states
    checkpoint_serialization_enabled checkpoint_tag_validation_enabled
    checkpoint_tag_validation_fail checkpoint_writer_enabled compile_autosp compile_autotp
    cpuadam_cores_perc curriculum_learning_config data_efficiency_config data_sampling_config
    dump_state dynamic_loss_scale dynamic_loss_scale_args flops_profiler_detailed
    flops_profiler_enabled flops_profiler_module_depth flops_profiler_output_file
    flops_profiler_profile_step flops_profiler_recompute_fwd_factor flops_profiler_top_modules
    fp16_master_weights_and_gradients initial_dynamic_scale is_sanity_checks_enabled log_level
    loss_scale memory_breakdown optimizer_legacy_fusion optimizer_params random_ltd_config
    tensor_parallel_config torch_autocast_dtype torch_autocast_lower_precision_safe_modules
    use_node_local_storage uses_parallelization_pass_only zenflow_config
    zero_allgather_partitions zero_allgather_sequential zero_allow_untested_optimizer
    zero_compute_grad_norm zero_contiguous_gradients zero_elastic_checkpoint
    zero_force_ds_cpu_optimizer zero_gather_16bit_weights_on_model_save zero_hpz_partition_size
    zero_ignore_unused_parameters zero_legacy_stage1 zero_load_from_fp32_weights
    zero_log_trace_cache_warnings zero_max_live_parameters zero_max_reuse_distance
    zero_model_persistence_threshold zero_module_granularity_threshold
    zero_multi_rank_bucket_allreduce zero_nvme_offload_optimizer zero_offload_optimizer
    zero_offload_param zero_param_persistence_threshold zero_parameter_alignment
    zero_partial_offload zero_prefetch_bucket_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights zero_reduce_scatter
    zero_round_robin_gradients zero_save_muon_momentum_buffer_in_memory zero_sub_group_size
    zero_use_cpu_optimizer
""")
# torch.nn.Module's own: the engine's module tree is the subnetwork under ``module``.
MODULE = _names("""
    add_module apply buffers children extra_repr get_buffer get_extra_state get_parameter
    get_submodule modules named_buffers named_children named_modules named_parameters parameters
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook
    set_extra_state set_submodule
""")


def _is(found: Any, expected: Any) -> None:
    assert found == expected, f"{found!r} is not {expected!r}"


def _no_sync(engine: SDPEngine) -> None:
    assert isinstance(engine.no_sync(), AbstractContextManager)


def _mode(engine: SDPEngine, mode: str, is_training: bool) -> None:
    getattr(engine, mode)()
    _is(engine.module.training, is_training)
    engine.train()


def _micro_batch_size(engine: SDPEngine) -> None:
    engine.set_train_micro_batch_size(2)
    _is((engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()), (12, 2))
    engine.set_train_micro_batch_size(1)


def _batch_info(engine: SDPEngine) -> None:
    _is([value() for value in engine.get_batch_info()], [6, 1, 3])


def _save_and_load(engine: SDPEngine, folder: Path) -> None:
    engine.save_checkpoint(folder, tag="here", client_state={"epoch": 3})
    _is(engine.load_checkpoint(folder), (str(folder / "here"), {"epoch": 3}))


def _boundary(engine: SDPEngine) -> None:
    engine.set_gradient_accumulation_boundary(True)
    assert engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(None)


def _batch_size(engine: SDPEngine) -> None:
    engine.set_train_batch_size(12)
    _is(engine.gradient_accumulation_steps(), 6)
    engine.set_train_batch_size(6)


def _zero_grad(engine: SDPEngine) -> None:
    forward_backward(engine, 1)
    engine.zero_grad()
    assert not any(unit.grad.any() for unit in engine.sharded.owned)


def _loader(engine: SDPEngine) -> None:
    _is(len(engine.deepspeed_io(list(my_slice(0)), num_local_io_workers=0)), 2)


# Called with arguments, or for what they do.
ACTIONS: dict[str, Callable[[SDPEngine, Path], Any]] = {
    "allreduce_gradients": lambda e, f: e.allreduce_gradients(),
    "backward": lambda e, f: forward_backward(e, 1),
    "collect_python_gc": lambda e, f: e.collect_python_gc(),
    "deepspeed_io": lambda e, f: _loader(e),
    "eval": lambda e, f: _mode(e, "eval", False),
    "forward": lambda e, f: _is(e.forward(my_slice(0)).logits.shape, (3, 13, 96)),
    "get_batch_info": lambda e, f: _batch_info(e),
    "get_data_parallel_rank": lambda e, f: _is(e.get_data_parallel_rank(), e.global_rank),
    "get_global_grad_norm": lambda e, f: _is(e.get_global_grad_norm() > 0, True),
    "get_optimizer_configuration": lambda e, f: e.get_optimizer_configuration({"lr": 1.0}, True),
    "is_iterable_style_dataset": lambda e, f: _is(e.is_iterable_style_dataset([1]), False),
    "is_map_style_dataset": lambda e, f: _is(e.is_map_style_dataset([1]), True),
    "load_checkpoint": lambda e, f: _save_and_load(e, f / "load"),
    "no_sync": lambda e, f: _no_sync(e),
    # DeepSpeed's constructor calls it on some machines; engine.compile() is what is refused.
    "register_compile_pass": lambda e, f: callable(e.register_compile_pass),
    "save_checkpoint": lambda e, f: _save_and_load(e, f / "save"),
    "set_data_post_process_func": lambda e, f: e.set_data_post_process_func(len),
    "set_gradient_accumulation_boundary": lambda e, f: _boundary(e),
    "set_train_batch_size": lambda e, f: _batch_size(e),
    "set_train_micro_batch_size": lambda e, f: _micro_batch_size(e),
    "step": lambda e, f: (forward_backward(e, 2), e.step()),
    "train": lambda e, f: _mode(e, "train", True),
    "zero_grad": lambda e, f: _zero_grad(e),
    "destroy": lambda e, f: e.destroy(),  # the last one
}


def inherited() -> set[str]:
    """The public callables that DeepSpeedEngine has, and so SDPEngine.

    Without what transformers adds to every torch module once a model was initialised.
    """
    members = {n: getattr(DeepSpeedEngine, n) for n in dir(DeepSpeedEngine) if n[0] != "_"}
    return {
        name
        for name, member in members.items()
        if callable(member) and not member.__module__.startswith("transformers.")
    }


def test_every_inherited_method_is_in_one_list() -> None:
    lists = [set(VALUES), set(DESCRIPTIONS), set(MODULE), set(UNSUPPORTED), set(ACTIONS)]
    listed = set.union(*lists)
    assert inherited() - listed == set(), "say whether they work"
    assert listed - inherited() == set(), "DeepSpeed has them no longer"
    assert sum(map(len, lists)) == len(listed), "in two lists"


def call_all(folder: str, is_changed: bool) -> dict[str, str]:
    """Run on a rank: call everything; what went wrong, by name."""
    engine = build(CASE)
    forward_backward(engine, 0)
    engine.step()
    if is_changed:
        engine.change_plan(make_plan(2, 6, owners_per_block=1), "backward")
    wrong: dict[str, str] = {}
    for name, expected in VALUES.items():
        found = getattr(engine, name)()
        if found != expected:
            wrong[name] = f"{found!r}, not {expected!r}"
    for name in DESCRIPTIONS:
        try:
            getattr(engine, name)()
        except Exception as error:
            wrong[name] = repr(error)
    for name in UNSUPPORTED:
        wrong |= _refusal_error(engine, name)
    wrong |= _refusal_error(engine, "module.save_pretrained")
    for name, action in ACTIONS.items():
        try:
            action(engine, Path(folder))
        except Exception as error:
            wrong[name] = repr(error)
    return wrong


def _refusal_error(engine: SDPEngine, name: str) -> dict[str, str]:
    """Empty when the method raises one line that names it and what to do."""
    for arguments in ((), (1, 2)):
        try:
            attrgetter(name)(engine)(*arguments)
        except NotImplementedError as error:
            text = str(error)
            start = f"SDPEngine.{name}() is not supported; "
            if not text.startswith(start) or len(text) < len(start) + 10 or "\n" in text:
                return {name: text}
        else:
            return {name: "does not raise"}
    return {}


@pytest.mark.parametrize("is_changed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inherited_methods_work_or_raise(
    is_changed: bool, pools: Callable[[int], Pool], tmp_path: Path
) -> None:
    """Also after a change of plan and masking."""
    for wrong in pools(2).run(call_all, str(tmp_path), is_changed):
        assert wrong == {}
