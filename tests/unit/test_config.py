"""The run config: what it accepts, what becomes of it, and the configs in the repository."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from benchmarks._study_cases import KINDS
from benchmarks._study_plan import PRESETS
from sdp_llm.config import (
    PhaseConfig,
    RunConfig,
    SDPConfig,
    deepspeed_dict,
    describe_keys,
    keys_without_effect,
    load_config,
    markdown_table,
    parse_config,
    require_pretraining,
    require_sections,
    resolve_batch,
    to_dict,
)
from sdp_llm.errors import ConfigError
from sdp_llm.plan import plan_from_config
from sdp_llm.plan.cost import dense_flops_per_token, steps_for_dense_flops
from sdp_llm.plan.size import CostSetup
from sdp_llm.subnetwork.measure import load_model_config, model_size

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"

BASE: Mapping[str, Any] = {
    "train_batch_size": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 10},
    },
    "sdp": {"coverage": "1/2"},
    "model": {"config": "model.json"},
    "data": {"train": "data/train", "sequence_length": 128},
    "training": {"steps": 10, "run_dir": "runs/test"},
}


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """BASE with values put at dotted paths."""
    tree = copy.deepcopy(dict(BASE))
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def test_defaults() -> None:
    config = parse_config({})
    assert config == RunConfig()
    assert config.sdp == SDPConfig(coverage=Fraction(1, 2))
    assert (config.model, config.data, config.optimizer) == (None,) * 3
    assert config.zero_optimization.stage == 0
    assert config.zero_optimization.overlap_comm
    assert config.gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("value", "coverage"),
    [
        (0.5, Fraction(1, 2)),
        (1, Fraction(1)),
        ("1/3", Fraction(1, 3)),
        ("0.25", Fraction(1, 4)),
        (0.333, Fraction(333, 1000)),
        ("2/6", Fraction(1, 3)),
    ],
)
def test_coverage(value: Any, coverage: Fraction) -> None:
    assert parse_config({"sdp": {"coverage": value}}).sdp.coverage == coverage


def test_other_ways_to_give_owners_leave_coverage_open() -> None:
    assert parse_config({"sdp": {"owners_per_block": 2}}).sdp.coverage is None
    sdp = parse_config({"sdp": {"owner_sets": [[1, 0], [1]]}}).sdp
    assert (sdp.coverage, sdp.owner_sets) == (None, ((0, 1), (1,)))


def test_values_are_normalised() -> None:
    config = parse_config(
        {
            "train_batch_size": "auto",
            "optimizer": {"type": "rmsPROP", "params": {"lr": 1, "foreach": None}},
            "zero_optimization": {"reduce_bucket_size": 5e8, "reduce_scatter": False},
            "communication_data_type": "bfp16",
            "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 5}},
        }
    )
    assert config.train_batch_size is None
    assert config.optimizer is not None
    assert (config.optimizer.type, config.optimizer.params) == ("RMSprop", {"lr": 1})
    assert type(config.zero_optimization.reduce_bucket_size) is int
    assert config.communication_data_type == "bfloat16"
    assert keys_without_effect(config) == ["zero_optimization.reduce_scatter"]
    assert keys_without_effect(parse_config(BASE)) == []


def test_what_is_off_may_stand_in_the_file() -> None:
    off = {
        "fp16": {"enabled": False, "loss_scale": 0},
        "flops_profiler": {"enabled": False},
        "prescale_gradients": False,
        "zero_optimization.offload_optimizer": {"device": "none"},
    }
    assert parse_config(changed(off)) == parse_config(BASE)
    with pytest.raises(ConfigError, match="fp16: valid in DeepSpeed but not supported"):
        parse_config(changed({"fp16": {"enabled": "auto"}}))


ROUND_TRIPS: list[dict[str, Any]] = [
    {},
    {"sdp": {"owner_sets": [[0, 1], [1], [0, 1]], "masking": "backward"}},
    {"sdp.schedule": [{"until": "1/3", "rotate_every": 5}, {"until": 1, "coverage": 1}]},
    {"sdp.schedule": [{"until": 0.3333333333}, {"until": 1 / 1.5}, {"until": 1, "coverage": 1}]},
    {"sdp": {"owners_per_block": 3}, "communication_data_type": "fp32"},
    {"sdp.coverage": 0.333, "zero_optimization.round_robin_gradients": True, "bf16.enabled": True},
    {"tensorboard": {"enabled": True}, "wandb": {"team": "t"}, "csv_monitor.output_path": ""},
    {"scheduler": {"type": "StepLR", "params": {"step_size": 3}}, "train_batch_size": "auto"},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS, ids=str)
def test_round_trip(changes: dict[str, Any]) -> None:
    config = parse_config(changed(changes))
    assert parse_config(json.loads(json.dumps(to_dict(config)))) == config


def test_a_phase_replaces_whichever_way_the_section_gives_owners() -> None:
    raw = {"owner_sets": [[0], [0, 1]], "schedule": [{"until": 0.5, "coverage": 1}, {"until": 1}]}
    (until, first), (_, second) = parse_config({"sdp": raw}).sdp.phases()
    assert until == Fraction(1, 2)
    assert (first.coverage, first.owner_sets, first.schedule) == (1, None, None)
    assert (second.coverage, second.owner_sets) == (None, ((0,), (0, 1)))


def test_a_residual_scale_has_no_effect_in_a_phase_with_backward_masking() -> None:
    raw = {
        "residual_scale": "eval",
        "schedule": [{"until": 0.5}, {"until": 1, "masking": "backward"}],
    }
    (_, forward), (_, backward) = parse_config({"sdp": raw}).sdp.phases()
    assert (forward.residual_scale, backward.residual_scale) == ("eval", "none")
    # Nor where the phase has the section's masking.
    raw = {**raw, "masking": "backward", "schedule": [{"until": 0.5, "masking": "forward"}]}
    raw["schedule"] += [{"until": 1}]
    (_, forward), (_, backward) = parse_config({"sdp": raw}).sdp.phases()
    assert (forward.residual_scale, backward.residual_scale) == ("eval", "none")


def test_a_section_without_a_schedule_is_one_phase() -> None:
    sdp = SDPConfig(masking="backward")
    assert sdp.phases() == ((Fraction(1), sdp),)


def test_a_schedule_can_be_set_on_the_command_line() -> None:
    config = parse_config(BASE, ['sdp.schedule=[{"until": 1, "coverage": "1/4"}]'])
    assert config.sdp.schedule is not None
    assert config.sdp.schedule[0].coverage == Fraction(1, 4)
    one_key = parse_config(to_dict(config), ["sdp.schedule[0].coverage=3/4"]).sdp.schedule
    assert one_key == (PhaseConfig(until=Fraction(1), coverage=Fraction(3, 4)),)
    inherited = parse_config(to_dict(config), ["sdp.schedule[0].coverage=null"]).sdp.schedule
    assert inherited == (PhaseConfig(until=Fraction(1)),)
    assert parse_config(to_dict(config), ["sdp.schedule=null"]).sdp.schedule is None


def test_overrides() -> None:
    config = parse_config(
        BASE,
        [
            "training.steps=null",
            "training.tokens=1e6",
            "training.run_dir=123",
            "sdp.coverage=1/4",
            "zero_optimization.stage=2",
            "optimizer.params.betas=[0.8, 0.9]",
            "optimizer.params.eps=1e-6",
            "scheduler=null",
            "bf16.enabled=true",
            "tensorboard.enabled=null",
            "data.tokenizer=a=b",
        ],
    )
    assert (config.training.steps, config.training.tokens) == (None, 10**6)
    assert config.training.run_dir == "123"
    assert config.sdp.coverage == Fraction(1, 4)
    assert config.zero_optimization.stage == 2
    assert config.optimizer is not None
    assert config.optimizer.params == {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6}
    assert (config.scheduler, config.tensorboard) == (None, None)
    assert config.bf16.enabled
    assert config.data is not None
    assert config.data.tokenizer == "a=b"
    assert parse_config(BASE).training != config.training, "overrides must not change the input"


def test_a_blend_is_kept_as_it_is_given() -> None:
    weights = {"data/a": 3, "data/b": 0.5}
    config = parse_config(BASE, [f"data.train={json.dumps(weights)}"])
    assert config.data is not None
    assert config.data.train == weights
    assert to_dict(config)["data"]["train"] == weights
    assert parse_config(to_dict(config)) == config
    for text in ("123", "data/a"):
        config = parse_config(BASE, [f"data.train={text}"])
        assert config.data is not None
        assert config.data.train == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((32, None, None), (32, 8, 1)),
        ((32, 4, None), (32, 4, 2)),
        ((32, None, 2), (32, 4, 2)),
        ((None, 4, None), (16, 4, 1)),
        ((None, 4, 3), (48, 4, 3)),
        ((32, 4, 2), (32, 4, 2)),
    ],
)
def test_batch_sizes(given: tuple[int | None, ...], expected: tuple[int, ...]) -> None:
    sizes = resolve_batch(_with_batch(given), 4)
    assert (sizes.global_batch, sizes.micro_batch, sizes.accumulation) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, None, None), ["train_batch_size", "give at least one"]),
        ((None, None, 2), ["give at least one"]),
        ((33, None, None), ["train_batch_size = 33", "world size 4", "such as 32 or 36"]),
        ((32, 3, None), ["per_gpu 3 x", "multiple of 12, such as 24 or 36"]),
        ((2, 4, None), ["train_batch_size = 2", "such as 16"]),
        ((32, 4, 3), ["per_gpu 4 x gradient_accumulation_steps 3 x world size 4", "= 48"]),
    ],
)
def test_contradictory_batch_sizes(given: tuple[int | None, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch(_with_batch(given), 4)
    for word in words:
        assert word in str(caught.value)


def _with_batch(sizes: tuple[int | None, ...]) -> RunConfig:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return parse_config(dict(zip(names, sizes, strict=True)))


def test_deepspeed_gets_no_key_of_ours() -> None:
    config = parse_config(changed({"zero_optimization.stage": 2, "gradient_clipping": 1.0}))
    result = deepspeed_dict(config, 4, 200)
    assert not {"sdp", "model", "data", "training", "steps_per_print"} & result.keys()
    assert result["zero_optimization"] == {"stage": 0}
    assert result["gradient_clipping"] == 0.0
    assert result["scheduler"]["params"]["total_num_steps"] == 200
    assert result["optimizer"]["params"]["torch_adam"] is True
    assert (result["train_batch_size"], result["train_micro_batch_size_per_gpu"]) == (32, 8)
    with pytest.raises(ConfigError, match="total_num_steps"):
        deepspeed_dict(config, 4, None)


def test_require_sections() -> None:
    require_pretraining(parse_config(BASE))
    with pytest.raises(ConfigError, match="model and optimizer: missing"):
        require_sections(parse_config({}), "model", "optimizer")
    with pytest.raises(ConfigError, match="exactly one of steps, tokens, flops_of_dense_steps"):
        require_pretraining(parse_config(changed({"training.steps": None})))
    with pytest.raises(ConfigError, match=r"training\.run_dir: missing"):
        require_pretraining(parse_config(changed({"training.run_dir": None})))


def test_table_of_keys_covers_the_schema() -> None:
    rows = {path: rest for path, *rest in describe_keys()}
    assert rows["sdp.coverage"][1] == "1/2"
    assert rows["data.train"][1] == "required"
    assert all(text for *_, text in rows.values())
    for line in markdown_table().splitlines():
        assert line.count("|") == 5


def test_imports_no_framework() -> None:
    code = (
        "import sys, sdp_llm.config;"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    require_pretraining(config)
    assert parse_config(to_dict(config)) == config
    for world_size in (4, 8):
        deepspeed_dict(config, world_size, 100)
    assert config.model is not None
    model = json.loads((CONFIGS.parent / config.model.config).read_text())
    assert config.data is not None
    assert config.data.sequence_length <= model["max_position_embeddings"]
    assert config.training.run_dir == f"runs/{path.stem}"


def test_shipped_configs_are_there() -> None:
    twins = [f"llama_{size}_{kind}" for size in ("134m", "1b") for kind in ("sdp", "dense")]
    assert {path.stem for path in CONFIGS.glob("*.json")} >= {"demo", *twins}


@pytest.mark.parametrize("size", ["134m", "1b"])
def test_twins_differ_in_coverage_scale_and_run_folder_only(size: str) -> None:
    sdp, dense = (
        json.loads((CONFIGS / f"llama_{size}_{kind}.json").read_text()) for kind in ("sdp", "dense")
    )
    assert (sdp["sdp"].pop("coverage"), dense["sdp"].pop("coverage")) == ("1/2", 1)
    assert sdp["sdp"].pop("residual_scale") == "eval"
    assert sdp["training"].pop("run_dir") != dense["training"].pop("run_dir")
    assert sdp == dense


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_budget_of_the_dense_twin_and_a_schedule_of_the_study(name: str) -> None:
    preset, dense = (
        json.loads((CONFIGS / f"llama_134m_{kind}.json").read_text()) for kind in (name, "dense")
    )
    sdp = {"masking": "forward", **KINDS[PRESETS[name]]}
    assert load_config(CONFIGS / f"llama_134m_{name}.json").sdp == parse_config({"sdp": sdp}).sdp
    tokens = dense["train_batch_size"] * dense["data"]["sequence_length"]
    steps = preset["training"].pop("flops_of_dense_steps")
    assert steps * tokens == dense["training"].pop("tokens")
    for config in (preset, dense):
        del config["sdp"], config["training"]["run_dir"]
    assert preset == dense


def test_the_smaller_dense_model_has_the_depth_of_balanced_and_the_same_flops() -> None:
    smaller, dense = (
        json.loads((CONFIGS / f"llama_134m_{kind}.json").read_text())
        for kind in ("smaller", "dense")
    )
    paths = [ROOT / config["model"].pop("config") for config in (smaller, dense)]
    models = [load_model_config(path) for path in paths]
    plan = plan_from_config(load_config(CONFIGS / "llama_134m_balanced.json").sdp, 8, 12)
    assert models[0].num_hidden_layers == len(plan.owned_blocks(0)) == 7
    fewer, all_blocks = (
        dense_flops_per_token(model_size(model, 1, 1024), CostSetup()) for model in models
    )
    tokens = dense["train_batch_size"] * dense["data"]["sequence_length"]
    steps = dense["training"].pop("tokens") // tokens
    expected = steps_for_dense_flops(steps, fewer, all_blocks)
    assert smaller["training"].pop("steps") == expected
    for config in (smaller, dense):
        del config["training"]["run_dir"]
    assert smaller == dense
    few, all_layers = (json.loads(path.read_text()) for path in paths)
    assert few == all_layers | {"num_hidden_layers": 7}
