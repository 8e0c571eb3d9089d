"""What a run that goes on says about its phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sdp_llm.config import RunConfig, parse_config, resolve_batch, to_dict
from sdp_llm.training.budget import run_schedule
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.position import Position
from sdp_llm.training.resume import Start, _changes, facts_to_compare
from sdp_llm.training.session import _start_lines

COSINE = {"total_num_steps": 100, "warmup_num_steps": 10}
DATA = {"train": "corpus", "sequence_length": 1024}
FINGERPRINTS = {
    "corpus": "100 + 50 bytes",
    "moved/corpus": "100 + 50 bytes",
    "other": "7 + 5 bytes",
}
PHASES: list[dict[str, Any]] = [{"until": 0.5}, {"until": 0.8, "coverage": 1}, {"until": 1}]


def prepared(
    steps: int, phases: list[dict[str, Any]] | None = PHASES, **sections: Any
) -> tuple[RunConfig, Inputs]:
    sections["sdp"] = {"schedule": phases, **sections.get("sdp", {})}
    base = {"train_batch_size": 8, "training": {"steps": steps}, "data": DATA}
    run = parse_config({**base, **sections})
    model, batch = LlamaConfig(num_hidden_layers=4), resolve_batch(run, 4)
    schedule = run_schedule(run, model, batch, 4)
    return run, Inputs(model, schedule, batch, None, None, FINGERPRINTS)  # type: ignore[arg-type]


def said(
    before: tuple[RunConfig, Inputs], now: tuple[RunConfig, Inputs], step: int, **client_state: Any
) -> list[str]:
    """What is said when a run of ``before`` goes on as ``now`` after ``step`` steps."""
    run, inputs = before
    plan, masking = inputs.schedule.at(step)
    state = {
        "client_state": {**facts_to_compare(run, inputs), **client_state},
        "plan": {"world_size": 4, "owners": plan.owner_sets, "masking": masking},
        "config": to_dict(run),
    }
    tokens = step * 8 * 1024  # of the batch before
    return list(_changes(state, *now, Position(step=step, samples=step * 8, tokens=tokens)))


def test_the_same_phases_need_no_word() -> None:
    assert said(prepared(100), prepared(100), 60) == []


@pytest.mark.parametrize(
    ("step", "ending"),
    [
        (20, "phase 1 of 3"),
        (50, "phase 1 of 3, it was in phase 2"),
        (60, "phase 1 of 3, it was in phase 2"),
        (90, "phase 1 of 3, it was in phase 3"),
        (100, "phase 2 of 3, it was in phase 3"),
    ],
)
def test_phases_are_shares_of_the_new_budget(step: int, ending: str) -> None:
    budget, phases = said(prepared(100), prepared(200), step)
    assert budget.startswith("warning: the budget was 100 steps, it is 200 now")
    assert phases == (
        "phases are shares of the budget: they end at steps 100, 160, 200 now; the run goes on in "
        f"{ending}"
    )


def test_other_phases_are_shown() -> None:
    other = [{"until": 0.9}, {"until": 1, "coverage": 1}]
    warning, phases = said(prepared(100), prepared(100, other), 60)
    assert warning.startswith("warning: sdp.schedule = [{'until': '1/2'}, {'until': '4/5', 'cov")
    assert "now: the run goes on in the phase of the new one" in warning
    assert phases.endswith("they end at steps 90, 100 now; the run goes on in phase 1 of 2")
    # And where there were none before, or there are none now.
    assert len(said(prepared(100, None), prepared(100), 60)) == 2
    assert len(said(prepared(100), prepared(100, None), 60)) == 1


def test_another_residual_scale_is_a_warning() -> None:
    assert said(prepared(100), prepared(100, sdp={"residual_scale": "eval"}), 60) == [
        "warning: sdp.residual_scale = none before, eval now: the weights were trained with the "
        "one before"
    ]


def test_other_shares_are_a_warning_where_the_whole_model_hangs_on_them() -> None:
    def changed(scale: str, **now: Any) -> list[str]:
        sdp = {"residual_scale": scale}
        return said(prepared(100, None, sdp=sdp), prepared(100, None, sdp=sdp | now), 60)

    assert changed("eval") == []
    assert changed("none", coverage="3/4") == []
    [warning] = changed("eval", coverage="3/4")
    assert warning.startswith("warning: block 1 runs on 50% of the ranks before, 75% now: with sdp")


@pytest.mark.parametrize(
    ("kind", "key", "effect"),
    [
        ("StepLR", "step_size", "the schedulers of torch keep the checkpoint's"),
        ("WarmupLR", "warmup_num_steps", "the schedule goes on at this step of the new one"),
    ],
)
def test_another_schedule_of_rates_says_what_it_does(kind: str, key: str, effect: str) -> None:
    before, now = (
        prepared(100, scheduler={"type": kind, "params": {key: value}}) for value in (3, 5)
    )
    assert said(before, now, 60) == [f"warning: scheduler.params.{key} = 3 before, 5 now: {effect}"]


@pytest.mark.parametrize(
    ("scheduler", "effect"),
    [
        ({"type": "WarmupCosineLR", "params": COSINE}, "the scheduler goes on"),
        ({"type": "WarmupLR"}, "the scheduler goes on from the new one, a step later"),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}, "the optimizer keeps the"),
        ({"type": "StepLR", "params": {"step_size": 3}}, "the optimizer keeps the checkpoint's"),
        (None, "the optimizer keeps the checkpoint's"),
    ],
)
def test_another_learning_rate_says_what_it_does(
    scheduler: dict[str, Any] | None, effect: str
) -> None:
    before, now = (
        prepared(
            100,
            scheduler=scheduler,
            optimizer={"type": "AdamW", "params": {"lr": rate}},
        )
        for rate in (3e-4, 1e-4)
    )
    [warning] = said(before, now, 60)
    assert warning.startswith("warning: optimizer.params.lr = 0.0003 before, 0.0001 now: " + effect)


def test_other_groups_of_weight_decay_hold_from_now_on() -> None:
    now = prepared(100, training={"steps": 100, "decay_all": True})
    assert said(prepared(100), now, 60) == [
        "warning: training.decay_all = False before, True now: from here on"
    ]


def test_without_a_scheduler_the_rate_stays() -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    lines = said(prepared(100, scheduler=scheduler), prepared(100), 60)
    assert lines == [
        f"warning: scheduler.{key} = {value} before, None now: the optimizer keeps the "
        "checkpoint's learning rate"
        for key, value in (("params.warmup_num_steps", 3), ("type", "WarmupLR"))
    ]


def test_another_batch_of_a_budget_of_steps_ends_where_it_did() -> None:
    [line] = said(prepared(50), prepared(50, train_batch_size=16), 60)
    assert line.startswith("warning: train_batch_size = 8 before, 16 now: ")


@pytest.mark.parametrize(("batch", "last", "total"), [(16, 80, 50), (4, 140, 200)])
def test_another_batch_of_a_budget_of_tokens_says_where_it_ends(
    batch: int, last: int, total: int
) -> None:
    """100 steps of 8 samples of 1024 tokens, of which 60 are over."""
    before, now = (
        prepared(0, None, train_batch_size=size, training={"tokens": 100 * 8 * 1024})
        for size in (8, batch)
    )
    lines = said(before, now, 60)
    assert lines[0].startswith(f"warning: train_batch_size = 8 before, {batch} now: ")
    assert lines[1].startswith(
        f"warning: training.tokens are used up at step {last:,}; phases, and"
    )
    assert f"end at step {total:,}, as if a step had always had as many tokens as now; " in lines[1]
    assert lines[1].endswith(f"training.tokens=null training.steps={last} ends all together")


def test_another_length_of_a_budget_of_tokens_says_where_it_ends() -> None:
    """100 steps of 8 samples of 1024 tokens, of which 60 are over; a step is half as long then."""
    before, now = (
        prepared(0, None, data=DATA | {"sequence_length": length}, training={"tokens": 100 << 13})
        for length in (1024, 512)
    )
    lines = said(before, now, 60)
    assert lines[0].startswith("warning: training.tokens are used up at step 140; phases, and a")
    assert lines[1].startswith("warning: the budget was 100 steps, it is 200 now")
    assert lines[2].startswith("warning: data.sequence_length = 1024 before, 512 now: the data")
    assert len(lines) == 3


def test_how_batches_are_read_does_not_change_the_data() -> None:
    before, now = (prepared(100, None, data=DATA | {"num_workers": n}) for n in (0, 2))
    assert said(before, now, 60) == []


def test_fewer_tokens_are_only_another_budget() -> None:
    before, now = (prepared(0, None, training={"tokens": n << 13}) for n in (100, 50))
    [line] = said(before, now, 60)
    assert line.startswith("warning: the budget was 100 steps, it is 50 now")


THE_DATA_CHANGE = "the data change: samples are counted on, whatever they are"


def test_other_content_is_a_warning_and_another_place_is_none() -> None:
    def changed(train: Any, now: Any) -> list[str]:
        before, after = (prepared(100, None, data=DATA | {"train": t}) for t in (train, now))
        return said(before, after, 60)

    assert changed("corpus", "moved/corpus") == []
    assert changed("corpus", {"moved/corpus": 1.0}) == []
    assert changed("corpus", "other") == [
        "warning: data.train: corpus 1 was 100 + 50 bytes, weight 1, it is 7 + 5 bytes, weight 1 "
        f"now: {THE_DATA_CHANGE}"
    ]
    blend = {"corpus": 0.5, "other": 0.5}
    assert changed(blend, dict(blend)) == []
    [order] = changed(blend, {"other": 0.5, "corpus": 0.5})
    assert order.startswith("warning: data.train: corpus 1 was 100 + 50 bytes, weight 0.5, it is 7")
    [weight] = changed(blend, {"corpus": 0.5, "other": 0.25})
    assert "corpus 2 was 7 + 5 bytes, weight 0.5, it is 7 + 5 bytes, weight 0.25 now" in weight
    [more] = changed("corpus", {"corpus": 1.0, "other": 0.25})
    assert "corpus 2 was none, it is 7 + 5 bytes, weight 0.25 now" in more


def test_other_content_at_the_same_place_is_a_warning() -> None:
    data = [["9 + 9 bytes", 1.0]]
    [line] = said(prepared(100, None), prepared(100, None), 60, data=data)
    assert line.startswith(
        "warning: data.train: corpus 1 was 9 + 9 bytes, weight 1, it is 100 + 50"
    )


def test_a_checkpoint_that_does_not_know_its_data_goes_by_their_path() -> None:
    now = prepared(100, None, data=DATA | {"train": "moved/corpus"})
    [line] = said(prepared(100, None), now, 60, data=None)
    assert line == f"warning: data.train = corpus before, moved/corpus now: {THE_DATA_CHANGE}"


@pytest.mark.parametrize(("steps", "is_warned"), [(100, False), (81, False), (80, True)])
def test_a_last_phase_that_is_never_reached_is_a_warning(steps: int, is_warned: bool) -> None:
    _, inputs = prepared(100)
    start = Start(Position(step=70), Path("step-70"))
    lines = _start_lines(start, inputs.schedule, steps)
    assert lines[0].startswith(f"continuing from step-70: step 70 of {steps}")
    warned = [line for line in lines if line.startswith("warning: the run ends at step 80, before")]
    assert bool(warned) == is_warned
