"""From a `RunConfig` back to JSON: for the run folder, and for DeepSpeed itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sdp_llm.config.batch import resolve_batch
from sdp_llm.config.deepspeed_keys import DEFAULT_WARMUP_STEPS
from sdp_llm.config.kinds import AUTO, dump_communication_dtype
from sdp_llm.config.parse import walk_keys
from sdp_llm.config.schema import BUDGETS, OptimizerConfig, RunConfig, SchedulerConfig
from sdp_llm.errors import ConfigError

MONITORS = ("tensorboard", "csv_monitor", "wandb")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values; `parse_config` reads it back to an equal config."""
    return _section_dict(config)


def deepspeed_dict(config: RunConfig, world_size: int, total_steps: int | None) -> dict[str, Any]:
    """The config that DeepSpeed's engine gets.

    ZeRO and clipping are off in it, because `sharding/` does both; `steps_per_print` is left out,
    which silences DeepSpeed's own log lines. Its throughput timer would synchronise the device in
    every step, so that no weights could travel during the next forward pass.

    :param config: the run config.
    :param world_size: number of ranks.
    :param total_steps: optimizer steps of the budget, for `total_num_steps: "auto"`.
    :raises ConfigError: the batch sizes contradict each other, or `total_num_steps` is "auto" and
        there is no budget.
    """
    batch = resolve_batch(config, world_size)
    result: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.bf16.enabled},
        "wall_clock_breakdown": config.wall_clock_breakdown,
        "timers": {"throughput": {"enabled": False}},
    }
    if config.communication_data_type is not None:
        result["communication_data_type"] = dump_communication_dtype(config.communication_data_type)
    if config.optimizer is not None:
        result["optimizer"] = optimizer_dict(config.optimizer)
    if config.scheduler is not None:
        result["scheduler"] = scheduler_dict(config.scheduler, total_steps)
    for name in MONITORS:
        monitor = getattr(config, name)
        if monitor is not None:
            result[name] = _section_dict(monitor)
    return result


def require_sections(config: RunConfig, *names: str) -> None:
    """Check that optional sections are there, such as "model", "data", "training", "optimizer".

    :raises ConfigError: names the sections that are missing.
    """
    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)}: missing in the config file, but needed here; "
            "add them as in configs/demo.json"
        )


def require_pretraining(config: RunConfig) -> None:
    """Check that the config says all that a pretraining run needs.

    :raises ConfigError: names what is missing.
    """
    require_sections(config, "model", "data", "optimizer")
    if not config.training.budgets():
        raise ConfigError(
            f"training: exactly one of {', '.join(BUDGETS)} must be given; "
            "add for example training.steps = 1000"
        )
    if config.training.run_dir is None:
        raise ConfigError("training.run_dir: missing; name a folder such as runs/NAME")


def keys_without_effect(config: RunConfig) -> list[str]:
    """Full paths of the given DeepSpeed keys that SDP accepts and ignores."""
    return [
        path
        for path, item in walk_keys()
        if item.metadata.get("no_effect") and _value_at(config, path) is not None
    ]


def _section_dict(section: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if value is None:
            continue
        if "section" in item.metadata:
            result[item.name] = _section_dict(value)
        elif "items" in item.metadata:
            result[item.name] = [_section_dict(entry) for entry in value]
        elif "params" in item.metadata:
            result[item.name] = dict(value)
        else:
            result[item.name] = item.metadata["kind"].dump(value)
    return result


def optimizer_dict(optimizer: OptimizerConfig) -> dict[str, Any]:
    """The optimizer section that DeepSpeed gets."""
    params = dict(optimizer.params)
    if optimizer.type in ("Adam", "AdamW"):
        # Otherwise DeepSpeed compiles its own Adam, which needs a CUDA compiler on the machine.
        params["torch_adam"] = True
        if not {"fused", "foreach"} & params.keys():
            params["fused"] = True  # torch's other paths make copies of the shards
    elif not {"fused", "foreach"} & params.keys():
        params["foreach"] = False  # on GPUs torch would take it, and copy the shards
    return {"type": optimizer.type, "params": params}


def check_warmup(scheduler: SchedulerConfig, total_steps: int) -> None:
    """Check that a scheduler which plans for the whole budget gets beyond its warm-up.

    :raises ConfigError: it would end before its warm-up does.
    """
    warmup, total = (scheduler.params.get(f"{name}_num_steps") for name in ("warmup", "total"))
    total = total_steps if total == AUTO else total
    if total is None:
        return
    origin = " (the default)" if warmup is None else ""
    warmup = DEFAULT_WARMUP_STEPS if warmup is None else warmup
    if warmup > total:
        raise ConfigError(
            f"scheduler.params.warmup_num_steps = {warmup}{origin}: longer than "
            f"total_num_steps = {total}, in which {scheduler.type} warms up and decays; use fewer "
            f"than {total}"
        )


def scheduler_dict(scheduler: SchedulerConfig, total_steps: int | None) -> dict[str, Any]:
    """The scheduler section that DeepSpeed gets, with ``total_num_steps`` resolved.

    :raises ConfigError: it is "auto" and ``total_steps`` is None, or OneCycleLR ends before.
    """
    params = dict(scheduler.params)
    if scheduler.type == "OneCycleLR" and total_steps is not None:
        _check_cycle(params, total_steps)
    if params.get("total_num_steps") == AUTO:
        if total_steps is None:
            raise ConfigError(
                'scheduler.params.total_num_steps = "auto": there is no budget to take it from; '
                "give a number of steps"
            )
        params["total_num_steps"] = total_steps
    return {"type": scheduler.type, "params": params}


def _check_cycle(params: Mapping[str, Any], total_steps: int) -> None:
    key, last = "total_steps", params.get("total_steps")
    if last is None and {"epochs", "steps_per_epoch"} <= params.keys():
        key, last = "epochs * steps_per_epoch", params["epochs"] * params["steps_per_epoch"]
    if last is not None and last < total_steps:
        raise ConfigError(
            f"scheduler.params.{key} = {last}: the budget is {total_steps} steps, and OneCycleLR "
            f"takes none after its last; use at least {total_steps}"
        )


def _value_at(config: RunConfig, path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        if node is None:
            return None
        node = getattr(node, name)
    return node
