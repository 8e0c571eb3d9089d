"""How many steps a budget is."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from sdp_llm.config import BatchSizes, RunConfig, parse_config, resolve_batch
from sdp_llm.errors import ConfigError
from sdp_llm.training import inputs
from sdp_llm.training.budget import (
    budget_line,
    check_memory,
    run_schedule,
    steps_from,
    total_steps,
)
from sdp_llm.training.position import Position

BLOCKS, HIDDEN, INTERMEDIATE, VOCABULARY, SEQUENCE, BATCH = 8, 32, 48, 96, 16, 8


def prepared(
    budget: dict[str, int], world_size: int = 4, **sdp: Any
) -> tuple[RunConfig, LlamaConfig, BatchSizes]:
    run: RunConfig = parse_config(
        {
            "train_batch_size": BATCH,
            "sdp": sdp,
            "model": {"config": "unused.json"},
            "data": {"train": "unused", "sequence_length": SEQUENCE},
            "training": budget,
        }
    )
    model = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE,
    )
    return run, model, resolve_batch(run, world_size)


def steps(budget: dict[str, int], world_size: int = 4, **sdp: Any) -> int:
    return total_steps(*prepared(budget, world_size, **sdp), world_size)


def test_steps_are_steps() -> None:
    assert steps({"steps": 17}) == 17


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (127, 1), (128, 1), (129, 2), (1280, 10), (1281, 11)]
)
def test_tokens_are_steps_rounded_up(tokens: int, expected: int) -> None:
    assert BATCH * SEQUENCE == 128
    assert steps({"tokens": tokens}) == expected
    # However many ranks share the batch.
    assert steps({"tokens": tokens}, world_size=2) == expected


def flops(owned: float) -> float:
    """Per token, forward and backward: 6 per matrix weight, and attention over the sequence."""
    block = 6 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) + 12 * HIDDEN * SEQUENCE
    return 6 * HIDDEN * VOCABULARY + owned * block


@pytest.mark.parametrize(
    ("sdp", "owned"),
    [
        ({"coverage": 1}, 8),
        ({"coverage": "1/2"}, 5),  # 2 pinned, half of 6 free ones
        ({"coverage": "1/4"}, 3.5),
        ({"coverage": "1/2", "pinned_first": 0, "pinned_last": 0}, 4),
    ],
)
def test_flops_of_dense_steps(sdp: dict[str, Any], owned: float) -> None:
    expected = round(1000 * flops(BLOCKS) / flops(owned))
    assert steps({"flops_of_dense_steps": 1000}, **sdp) == expected
    assert (expected == 1000) == (owned == BLOCKS)


def test_backward_masking_saves_less() -> None:
    # Every block runs forward, and backward for the activations: 4 of 6 for what is not owned.
    frozen = 3 * 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    expected = round(1000 * flops(BLOCKS) / (flops(BLOCKS) - frozen))
    sdp = {"coverage": "1/2", "masking": "backward"}
    assert steps({"flops_of_dense_steps": 1000}, **sdp) == expected


# -- phases ---------------------------------------------------------------------------------------

TWO_PHASES = [{"until": 0.75, "coverage": "1/4"}, {"until": 1, "coverage": 1}]


def test_each_phase_counts_by_its_share_of_the_steps() -> None:
    expected = round(1000 * flops(BLOCKS) / (0.75 * flops(3.5) + 0.25 * flops(BLOCKS)))
    budget = {"flops_of_dense_steps": 1000}
    assert steps(budget, schedule=TWO_PHASES) == expected
    # Which is not what the section's own coverage or either phase alone would give.
    for other in ({"coverage": "1/2"}, {"coverage": "1/4"}, {"coverage": 1}):
        assert steps(budget, **other) != expected
    # What the steps of the phases cost together is what was to be spent.
    schedule = run_schedule(*prepared(budget, schedule=TWO_PHASES), 4)
    assert schedule.total_steps == expected
    first, second = (phase.stop - phase.start for phase in schedule.phases)
    spent = first * flops(3.5) + second * flops(BLOCKS)
    assert spent / flops(BLOCKS) == pytest.approx(1000, abs=1)


def test_masking_of_a_phase_counts_in_the_budget() -> None:
    phases = [{"until": 0.5}, {"until": 1, "masking": "backward"}]
    frozen = 3 * 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    mean = (flops(5) + flops(BLOCKS) - frozen) / 2
    expected = round(1000 * flops(BLOCKS) / mean)
    assert steps({"flops_of_dense_steps": 1000}, schedule=phases) == expected


def test_one_phase_is_the_section() -> None:
    budget = {"flops_of_dense_steps": 1000}
    assert steps(budget, schedule=[{"until": 1}], coverage="1/2") == steps(budget, coverage="1/2")


@pytest.mark.parametrize("budget", [{"steps": 40}, {"tokens": 40 * BATCH * SEQUENCE}])
def test_phases_are_shares_of_any_budget(budget: dict[str, int]) -> None:
    schedule = run_schedule(*prepared(budget, schedule=TWO_PHASES), 4)
    assert [(phase.start, phase.stop) for phase in schedule.phases] == [(0, 30), (30, 40)]


def test_a_schedule_without_a_budget_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"sdp\.schedule: phases end at shares of the budget, but"
    ):
        run_schedule(*prepared({}, schedule=TWO_PHASES), 4)
    assert len(run_schedule(*prepared({}, rotate_every=5), 4).phases) == 1


def test_another_batch_moves_the_end() -> None:
    run, _, batch = prepared({"tokens": 40 * BATCH * SEQUENCE})
    assert steps_from(run, batch, Position(), 40) == 40
    # Half of the tokens are read, in twice the steps that this batch would have taken.
    half = Position(step=40, samples=160, tokens=160 * SEQUENCE)
    assert steps_from(run, batch, half, 40) == 60


def limited(limit: float | None, **sdp: Any) -> str:
    """The error of the check of memory, or nothing."""
    run, model, batch = prepared({"steps": 40}, memory_limit_gib=limit, **sdp)
    schedule = run_schedule(run, model, batch, 4)
    try:
        check_memory(run, model, batch, schedule)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_phase_that_does_not_fit_is_refused() -> None:
    message = limited(1e-6, schedule=TWO_PHASES)
    assert message.startswith("sdp.memory_limit_gib = 1e-06: phase 2 of 2 (coverage 1, forward ")
    assert "steps 31 to 40) is predicted to need 0.0" in message
    assert "lower the coverage" in message
    need = float(message.split("to need ")[1].split(" GiB")[0])
    # The limit lies between what the phases need: alone, the first would fit.
    between = 0.999 * need
    assert limited(between, schedule=TWO_PHASES).startswith(f"sdp.memory_limit_gib = {between:g}")
    assert limited(between, coverage="1/4") == ""
    assert limited(1.001 * need, schedule=TWO_PHASES) == ""
    assert limited(None, schedule=TWO_PHASES) == ""


def test_a_run_without_phases_that_does_not_fit_is_refused() -> None:
    message = limited(1e-6, coverage="1/2")
    assert message.startswith("sdp.memory_limit_gib = 1e-06: the run (coverage 1/2, forward mask")


def test_a_limit_that_cannot_be_checked_is_refused() -> None:
    run, _, batch = prepared({"steps": 40}, memory_limit_gib=1)
    experts = MixtralConfig(num_hidden_layers=BLOCKS, hidden_size=HIDDEN, num_attention_heads=4)
    schedule = run_schedule(run, experts, batch, 4)
    with pytest.raises(
        ConfigError, match=r"sdp\.memory_limit_gib = 1: cannot be checked, set it to"
    ):
        check_memory(run, experts, batch, schedule)


def test_a_monitor_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    run = parse_config(
        {
            "model": {"config": "unused.json"},
            "data": {"train": "unused", "sequence_length": 8},
            "optimizer": {"type": "SGD"},
            "training": {"steps": 1, "run_dir": "unused"},
            "tensorboard": {"enabled": True},
        }
    )
    with pytest.raises(ConfigError, match="the package tensorboard is not installed"):
        inputs.load_inputs(run, 2)


def test_the_budget_counts_what_was_read_with_another_batch() -> None:
    assert budget_line(25, 8, 64, Position()) == "budget      25 steps of 8 samples, 12,800 tokens"
    read = Position(step=15, samples=120, tokens=7680)
    assert budget_line(25, 4, 64, read) == (
        "budget      25 steps (those to come of 4 samples), 10,240 tokens"
    )
