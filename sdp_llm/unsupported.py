"""What DeepSpeed's engine offers and SDP's refuses, each with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_EXPORT = "call engine.save_pretrained(folder)"
_SAVE = "call engine.save_checkpoint(folder)"
_LOAD = "call engine.load_checkpoint(folder)"
_COMPILE = "train without it"
_REDUCE = "engine.backward(loss) averages each gradient over its owners"
_DATA_PARALLEL = "every rank is data-parallel: use torch.distributed.get_rank()"
_CAST = "its parameters are views into the units: set bf16 in the config, the launcher the device"
_FREEZE = "the plan says what each rank trains: set sdp.masking and sdp.coverage"

UNSUPPORTED = {
    # No rank has the whole model.
    "save_16bit_model": _EXPORT,
    "save_fp16_model": _EXPORT,
    "module_state_dict": _EXPORT,
    "state_dict": _SAVE,
    "load_state_dict": _LOAD,
    "load_module_state_dict": "pass a model with values to initialize()",
    "load_moe_state_dict": _LOAD,
    # Gradients are averaged over owner sets, not over all ranks.
    "allreduce_and_copy": _REDUCE,
    "allreduce_bucket": _REDUCE,
    "allreduce_no_retain": _REDUCE,
    "all_gather_scalar": _REDUCE,
    "buffered_allreduce_fallback": _REDUCE,
    "sparse_all_gather": _REDUCE,
    "sparse_allreduce": _REDUCE,
    "sparse_allreduce_bucket": _REDUCE,
    "sparse_allreduce_no_retain": _REDUCE,
    "coalesce_grad_reduction": "use gradient_accumulation_steps",
    "scale": "call engine.backward(loss)",
    # Parameters live in units.
    **dict.fromkeys(("to", "to_empty", "type", "cpu", "cuda", "xpu", "ipu", "mtia"), _CAST),
    **dict.fromkeys(("float", "double", "half", "bfloat16", "share_memory"), _CAST),
    "requires_grad_": _FREEZE,
    "offload_states": "lower sdp.coverage for less memory",
    "reload_states": "there is nothing offloaded",
    "empty_partition_cache": "it is for ZeRO stage 3",
    # Other features of DeepSpeed.
    "compile": _COMPILE,
    "compile_zero_optimization_stage": _COMPILE,
    "get_autosp_backend": _COMPILE,
    "get_autotp_backend": _COMPILE,
    "get_compile_time": _COMPILE,
    "get_deepcompile_backend": _COMPILE,
    "get_deepspeed_compile_backend": _COMPILE,
    "get_model_parallel_rank": _DATA_PARALLEL,
    "get_sequence_parallel_group": _DATA_PARALLEL,
    "get_tensor_parallel_rank": _DATA_PARALLEL,
    "print_forward_breakdown": "it is for mixtures of experts: set wall_clock_breakdown",
    "random_ltd_initialize": "remove data_efficiency from the config",
    "set_custom_curriculum_learning_schedule": "order the samples in your own dataset",
    "swap_tensor_config": "lower sdp.coverage for less memory",
}


def unsupported(what: str, instead: str) -> NoReturn:
    """Raise the one line that names what is refused and the alternative."""
    raise NotImplementedError(f"SDPEngine.{what} is not supported; {instead}")


def _refusal(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported(f"{name}()", UNSUPPORTED[name])

    method.__name__ = method.__qualname__ = name
    return method


def refuse_on_module(module: Any) -> None:
    """Let a rank's subnetwork raise where transformers would take it for the whole model."""

    def save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
        unsupported("module.save_pretrained()", _EXPORT)

    module.save_pretrained = module.push_to_hub = save_pretrained


def refuse_unsupported(cls: type) -> type:
    """Give a subclass of DeepSpeedEngine a method that raises for each of :data:`UNSUPPORTED`."""
    for name in UNSUPPORTED:
        setattr(cls, name, _refusal(name))
    return cls
