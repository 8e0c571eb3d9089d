"""Every kind of wrong config once, with the words that its error must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError
from tests.unit.test_config import BASE, changed


def message_of(mapping: Mapping[str, Any], overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(mapping, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    # unknown keys
    ({"sdp.coverge": 0.5}, ["sdp.coverge: unknown key", "did you mean sdp.coverage?"]),
    ({"grandient_accumulation_steps": 2}, ["did you mean gradient_accumulation_steps?"]),
    ({"coverage": 0.5}, ["coverage: unknown key", "did you mean sdp.coverage?"]),
    ({"training.Steps": 3}, ["did you mean training.steps?"]),
    ({"training.optimizer": {}}, ["training.optimizer: unknown key", "did you mean optimizer?"]),
    ({"training.qqq": 3}, ["training.qqq: unknown key; known keys here are run_dir, steps"]),
    ({"tensorboard.output_pth": "x"}, ["did you mean tensorboard.output_path?"]),
    ({"optimizer.params.weight_decy": 0.1}, ["did you mean optimizer.params.weight_decay?"]),
    ({"scheduler.params.warmup_steps": 3}, ["scheduler.params.warmup_steps: unknown key"]),
    # valid in DeepSpeed, not here
    ({"zero_optimization.stage": 3}, ["zero_optimization.stage = 3", "valid in DeepSpeed", "2"]),
    ({"fp16": {"enabled": True}}, ["fp16: valid in DeepSpeed", "not supported", "use bf16"]),
    ({"activation_checkpointing": {}}, ["use model.gradient_checkpointing"]),
    ({"zero_optimization.offload_optimizer": {}}, ["offload_optimizer: valid in DeepSpeed"]),
    ({"zero_optimization.zero_hpz_partition_size": 2}, ["not supported together with SDP"]),
    ({"zero_optimization.prefetch_bucket_size": 2}, ["not supported together with SDP"]),
    ({"bf16.check_grad_overflow": True}, ["bf16.check_grad_overflow: valid in DeepSpeed"]),
    ({"amp": {}}, ["amp: removed from DeepSpeed", "use bf16"]),
    ({"communication_data_type": "fp16"}, ["communication_data_type", "not supported", "bf16"]),
    ({"optimizer.params.max_grad_norm": 1.0}, ["use gradient_clipping"]),
    (
        {"optimizer.params": {"foreach": True, "fused": True}},
        ["optimizer.params.fused = true: cannot go with foreach = true"],
    ),
    # types and ranges
    ({"train_batch_size": True}, ["train_batch_size = true: expected a positive integer"]),
    ({"train_batch_size": 0}, ["train_batch_size = 0: expected a positive integer"]),
    ({"training.steps": "10"}, ['training.steps = "10": expected a positive integer']),
    ({"training.steps": 1.5}, ["training.steps = 1.5"]),
    ({"training.eval_interval": -1}, ["training.eval_interval = -1: expected an integer ≥ 0"]),
    ({"gradient_clipping": -1}, ["gradient_clipping = -1: expected a number ≥ 0"]),
    ({"gradient_clipping": float("inf")}, ["gradient_clipping = Infinity"]),
    ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown = 1: expected true or false"]),
    ({"model.config": 3}, ["model.config = 3: expected a string"]),
    ({"model.config": ""}, ["model.config", "not empty"]),
    ({"wandb.project": "", "tensorboard.job_name": 3}, ["tensorboard.job_name = 3"]),
    ({"data": []}, ["data = []: expected an object {...}"]),
    ({"optimizer.params": 3}, ["optimizer.params = 3: expected an object {...}"]),
    ({"zero_optimization.stage": True}, ["zero_optimization.stage = true: expected 0, 1 or 2"]),
    ({"zero_optimization.stage": 4}, ["zero_optimization.stage = 4: expected 0, 1 or 2"]),
    ({"communication_data_type": "int8"}, ['expected "fp32" or "bf16"']),
    ({"sdp.masking": "forwards"}, ['sdp.masking = "forwards"', 'did you mean "forward"?']),
    ({"sdp.strategy": 1}, ["sdp.strategy = 1: expected"]),
    (
        {"sdp.masking": "backward", "sdp.residual_scale": "eval"},
        ['sdp.residual_scale = "eval"', 'use "none"'],
    ),
    (
        {"sdp.schedule": [{"until": 1, "masking": "backward"}], "sdp.residual_scale": "eval"},
        ['sdp.residual_scale = "eval"', 'use "none"'],
    ),
    ({"sdp.coverage": 0}, ["sdp.coverage = 0: expected a number > 0"]),
    ({"sdp.coverage": 1e-9}, ["sdp.coverage = 1e-09"]),
    ({"sdp.coverage": "3/2"}, ['sdp.coverage = "3/2"']),
    ({"sdp.coverage": "1/0"}, ['sdp.coverage = "1/0"']),
    ({"sdp.coverage": "half"}, ['sdp.coverage = "half"']),
    ({"sdp.coverage": True}, ["sdp.coverage = true"]),
    ({"sdp.owners_per_block": 2}, ["sdp.coverage and sdp.owners_per_block", "at most one"]),
    ({"sdp.owner_sets": []}, ["sdp.owner_sets = []"]),
    ({"sdp.owner_sets": [[0], []]}, ["sdp.owner_sets[1] = []"]),
    ({"sdp.owner_sets": [[0], [-1]]}, ["sdp.owner_sets[1][0] = -1"]),
    ({"sdp.owner_sets": [[0, 0]]}, ["sdp.owner_sets[0]", "named twice"]),
    # phases
    ({"sdp.schedule": []}, ["sdp.schedule = []: expected a list [{...}, ...]"]),
    ({"sdp.schedule": {"until": 1}}, ["sdp.schedule = {", "expected a list [{...}, ...]"]),
    ({"sdp.schedule": [3]}, ["sdp.schedule[0] = 3: expected an object"]),
    (
        {"sdp.schedule": [{"until": 0.5}, {"until": 1, "covarage": 1}]},
        ["sdp.schedule[1].covarage: unknown key", "did you mean sdp.schedule[1].coverage?"],
    ),
    ({"sdp.schedule": [{"untl": 1}]}, ["sdp.schedule[0].untl", "sdp.schedule[0].until?"]),
    ({"sdp.schedule": [{"coverage": 1}]}, ["sdp.schedule[0].until: missing"]),
    (
        {"sdp.schedule": [{"until": 1, "memory_limit_gib": 1}]},
        ["sdp.schedule[0].memory_limit_gib: unknown key", "did you mean sdp.memory_limit_gib?"],
    ),
    ({"sdp.schedule": [{"until": 1.5}]}, ["sdp.schedule[0].until = 1.5", "> 0 and ≤ 1"]),
    ({"sdp.schedule": [{"until": "auto"}]}, ["sdp.schedule[0].until", "can be auto"]),
    (
        {"sdp.schedule": [{"until": 0.5}, {"until": 0.4}]},
        ["sdp.schedule[1].until = 0.4: expected more than 0.5", "in the order of the run"],
    ),
    (
        {"sdp.schedule": [{"until": 0.5}, {"until": 0.9}]},
        ["sdp.schedule[1].until = 0.9: the last phase must end with the run", "set it to 1"],
    ),
    (
        {"sdp.schedule": [{"until": 1, "coverage": 1, "owners_per_block": 2}]},
        ["sdp.schedule[0].coverage and sdp.schedule[0].owners_per_block", "at most one"],
    ),
    ({"sdp.schedule": [{"until": 1, "masking": "both"}]}, ["sdp.schedule[0].masking"]),
    ({"sdp.rotate_every": -1}, ["sdp.rotate_every = -1: expected an integer ≥ 0"]),
    ({"sdp.memory_limit_gib": 0}, ["sdp.memory_limit_gib = 0: expected a number > 0"]),
    ({"training.tokens": 5}, ["training.steps and training.tokens", "exactly one", "null"]),
    ({"data.train": 3}, ["data.train = 3: expected a path, or an object of paths and weights"]),
    ({"data.train": {}}, ["data.train = {}: expected a path, or an object"]),
    ({"data.train": ["a"]}, ['data.train = ["a"]: expected a path, or an object']),
    ({"data.train": {"a": 1, "b": 0}}, ['data.train["b"] = 0: expected a weight > 0', "remove"]),
    ({"data.train": {"a": True}}, ['data.train["a"] = true: expected a weight > 0']),
    ({"data.train": {"a": float("inf")}}, ['data.train["a"] = Infinity: expected a weight > 0']),
    ({"data.train": {"": 1}}, ['data.train[""] = 1: the path is empty']),
    ({"data.validation": {"a": 1}}, ['data.validation = {"a": 1}: expected a string']),
    ({"data.sequence_length": None}, ["data.sequence_length: missing"]),
    # auto
    ({"gradient_clipping": "auto"}, ['gradient_clipping = "auto"', "can be auto"]),
    ({"optimizer.params.lr": "auto"}, ['optimizer.params.lr = "auto"', "can be auto"]),
    ({"scheduler.params.warmup_num_steps": "auto"}, ["warmup_num_steps", "can be auto"]),
    ({"bf16.enabled": "auto"}, ["bf16.enabled", "can be auto"]),
    (
        {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": "auto"}}},
        ["scheduler.params.T_max", "can be auto"],
    ),
    # optimizer and scheduler
    ({"optimizer.type": "Lamb"}, ["only element-wise optimizers work on shards"]),
    ({"optimizer.type": "onebitadam"}, ["only element-wise optimizers work on shards"]),
    ({"optimizer.type": "RAdam"}, ["not supported together with SDP"]),
    ({"optimizer.type": "AdmaW"}, ["unknown optimizer", 'did you mean "AdamW"?']),
    ({"optimizer.type": 3}, ["optimizer.type = 3", "use one of Adam"]),
    ({"optimizer.type": None}, ["optimizer.type: missing"]),
    ({"optimizer.params.lr": 0}, ["optimizer.params.lr = 0: expected a number > 0"]),
    ({"optimizer.params.betas": [0.9]}, ["optimizer.params.betas = [0.9]: expected a pair"]),
    ({"optimizer.params.betas": [0.9, 1]}, ["optimizer.params.betas = [0.9, 1]"]),
    ({"optimizer.params.momentum": 0.9}, ["optimizer.params.momentum: unknown key"]),
    ({"scheduler.type": "WarmupCosinLR"}, ['did you mean "WarmupCosineLR"?']),
    ({"scheduler.type": "LambdaLR"}, ["cannot be built from numbers in a file"]),
    ({"scheduler.type": ["x"]}, ["scheduler.type", "unknown scheduler; use one of"]),
    ({"scheduler.params.total_num_steps": None}, ["total_num_steps: missing", '"auto"']),
    ({"scheduler": {"type": "OneCycle"}}, ["scheduler.params.cycle_min_lr: missing"]),
    ({"scheduler.params.warmup_type": "cosine"}, ['expected "log" or "linear"']),
    *(
        ({"scheduler": {"type": kind, "params": params}}, words)
        for kind, params, words in (
            ("StepLR", {"step_sise": 3}, ["params.step_sise: unknown key", "params.step_size?"]),
            ("StepLR", {}, ["scheduler.params.step_size: missing, StepLR needs it"]),
            ("StepLR", {"step_size": "3"}, ['step_size = "3": expected', "without quotes"]),
            ("StepLR", {"step_size": 0}, ["scheduler.params.step_size = 0: expected a positive"]),
            ("StepLR", {"step_size": 3, "last_epoch": 4}, ["last_epoch = 4", "at most -1"]),
            ("MultiStepLR", {}, ["milestones: missing", "give a list of numbers"]),
            ("MultiStepLR", {"milestones": 3}, ["milestones = 3: expected a list, each entry an"]),
            ("MultiStepLR", {"milestones": [1, "2"]}, ['params.milestones[1] = "2": expected']),
            ("CosineAnnealingLR", {"T_max": 0}, ["scheduler.params.T_max = 0: expected a posit"]),
            ("ExponentialLR", {"gamma": "0.9"}, ['gamma = "0.9": expected', "without quotes"]),
            ("CyclicLR", {"base_lr": 0.1, "max_lr": [1, "1"]}, ['max_lr[1] = "1": expected']),
            ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "step_size_up": 0}, ["step_size_up = 0"]),
            ("OneCycleLR", {"max_lr": 1, "total_steps": 0}, ["total_steps = 0: expected a pos"]),
            ("OneCycleLR", {"max_lr": 1, "div_factor": 0}, ["div_factor = 0: expected a number"]),
        )
    ),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_values_name_key_value_and_fix(changes: dict[str, Any], words: list[str]) -> None:
    message = message_of(changed(changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainin.steps=5", ["trainin: unknown key", "did you mean training?"]),
        ("training.stesp=null", ["training.stesp", "did you mean training.steps?"]),
        ("optimizer.params.lrr=null", ["optimizer.params.lrr: unknown key", "lr?"]),
        ("optimizer.params.lrr=1", ["optimizer.params.lrr: unknown key", "lr?"]),
        ("fp16.enabled=true", ["fp16: valid in DeepSpeed"]),
        ("train_batch_size.x=1", ["train_batch_size.x", "has no keys below it"]),
        ("sdp.schedule[0].covrage=1", ["sdp.schedule[0].covrage", "sdp.schedule[0].coverage?"]),
        (
            "sdp.schedule[1].until=1",
            ["sdp.schedule[1]: no such object, there are 0", "sdp.schedule=[...]"],
        ),
        ("sdp.schedule[0]=1", ["sdp.schedule is a list; give all of it", "sdp.schedule[0].until"]),
        ("sdp.schedule.until=1", ["sdp.schedule is a list; give all of it"]),
        ("sdp.coverage[0]=1", ["sdp.coverage[0]: unknown key; sdp.coverage is not a list"]),
        ("sdp[0].coverage=1", ["sdp[0].coverage: unknown key; sdp is not a list"]),
        ("training.steps", ["--set training.steps", "expected KEY=VALUE"]),
        ("=3", ["expected KEY=VALUE"]),
        ("training.steps=NaN", ['training.steps = "NaN"']),
        ("training=5", ["training = 5: expected an object"]),
        ("training.steps=ten", ['training.steps = "ten": expected a positive integer']),
    ],
)
def test_wrong_overrides(override: str, words: list[str]) -> None:
    message = message_of(BASE, (override,))
    for word in words:
        assert word in message


def test_override_below_a_value_that_is_no_object() -> None:
    assert "sdp = 3: expected an object" in message_of({"sdp": 3}, ("sdp.coverage=1",))
