"""The simulation under a schedule: what a change of plan keeps, and when it comes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sdp_llm.config import parse_config, resolve_batch
from sdp_llm.plan import Plan, make_plan
from sdp_llm.simulation import Simulation
from sdp_llm.training.backends import SimulationBackend
from sdp_llm.training.budget import run_schedule
from sdp_llm.training.inputs import Inputs

WORLD_SIZE, BLOCKS, VOCABULARY, SEQUENCE, BATCH, STEPS = 4, 6, 64, 8, 8, 6
MODEL = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=BLOCKS,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=SEQUENCE,
)
HALF = make_plan(WORLD_SIZE, BLOCKS, owners_per_block=2)
QUARTER = make_plan(WORLD_SIZE, BLOCKS, owners_per_block=1, strategy="random", seed=3)


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)


def simulation(plan: Plan, masking: str = "forward") -> Simulation:
    return Simulation(copy.deepcopy(MODEL), plan, adam, masking=masking, seed=7, max_norm=1.0)


def backend(**sdp: Any) -> SimulationBackend:
    """The simulation as the commands train it, with a budget of ``STEPS``."""
    run = parse_config(
        {
            "train_batch_size": BATCH,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-6}},
            "sdp": sdp,
            "model": {"config": "unused.json"},
            "training": {"steps": STEPS, "seed": 7},
        }
    )
    model, sizes = copy.deepcopy(MODEL), resolve_batch(run, WORLD_SIZE)
    schedule = run_schedule(run, model, sizes, WORLD_SIZE)
    inputs = Inputs(model, schedule, sizes, None, None, {})  # type: ignore[arg-type]
    return SimulationBackend(run, inputs, torch.device("cpu"))


def trained(**sdp: Any) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The losses of all workers at every step, and the weights after the last."""
    made = backend(**sdp)
    losses = [made.step(batch(step)).losses.tolist() for step in range(STEPS)]
    return losses, {n: m.detach() for n, m in made._simulation.masters.items()}


def assert_equal(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


def test_a_model_leaves_the_config_that_it_is_made_from() -> None:
    config = copy.deepcopy(MODEL)
    simulated = Simulation(config, HALF, adam)
    assert simulated.model.config.use_cache is False
    assert config.to_dict() == MODEL.to_dict()


@pytest.mark.parametrize("samples", [3, 6, 9])
def test_workers_share_a_batch_equally(samples: int) -> None:
    tokens = torch.zeros(samples, SEQUENCE + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^batch = {samples} samples for {WORLD_SIZE} workers: "):
        simulation(HALF).accumulate(tokens)


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_an_error_leaves_the_whole_model(masking: str) -> None:
    simulated = simulation(HALF, masking)
    before = dict(simulated.model.named_parameters())
    with pytest.raises(ArithmeticError), simulated.worker(0):
        raise ArithmeticError
    after = dict(simulated.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in after.items())
    assert all(parameter.requires_grad for parameter in after.values())


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 9, dtype=torch.int64)]])
def test_an_evaluation_needs_samples(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: batches: there are no samples; "):
        simulation(HALF).evaluate(batches)


class Broken(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        raise ArithmeticError


def test_a_pass_that_fails_leaves_no_gradients() -> None:
    """What the blocks behind the failure, and workers before it, have got belongs to no step."""
    simulated, expected = simulation(HALF), simulation(HALF)
    first = simulated.model.get_submodule("model.layers.0")
    hook = first.register_forward_hook(lambda block, inputs, hidden: Broken.apply(hidden))
    with pytest.raises(ArithmeticError):
        simulated.step(batch(0))
    hook.remove()
    assert all(parameter.grad is None for parameter in simulated.model.parameters())
    assert simulated.step(batch(1)) == expected.step(batch(1))


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_schedule_of_one_phase_equals_none(masking: str) -> None:
    alone = trained(masking=masking, coverage="1/2")
    # The section's own values do not count where the phase has others.
    phase = {"until": 1, "masking": masking, "coverage": "1/2", "seed": 0}
    assert_equal(alone, trained(coverage="1/4", seed=5, schedule=[phase]))
    assert alone[0] != trained(masking=masking, coverage="1/4")[0]


def test_a_rotating_schedule_at_full_coverage_is_plain_training() -> None:
    phases = [{"until": 0.5, "rotate_every": 1}, {"until": 1, "masking": "backward", "seed": 2}]
    losses, weights = trained(coverage=1, rotate_every=2, schedule=phases)
    assert_equal((losses, weights), trained(coverage=1))
    start = simulation(HALF).masters
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODEL))
    model.load_state_dict({name: master.detach() for name, master in start.items()})
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        eps=1e-6,
    )
    for step in range(STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        assert loss.item() == pytest.approx(sum(losses[step]) / WORLD_SIZE, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_change_of_plan_keeps_weights_and_optimizer_state() -> None:
    changed = simulation(HALF)
    for step in range(3):
        changed.step(batch(step))
    before = copy.deepcopy(changed.optimizer.state_dict())
    weights = {name: master.detach().clone() for name, master in changed.masters.items()}
    changed.change_plan(QUARTER, "backward")
    assert (changed.plan, changed.masking) == (QUARTER, "backward")
    for name, master in changed.masters.items():
        assert torch.equal(master, weights[name])

    # One that never knew another plan, from the same weights and the same moments.
    direct = simulation(QUARTER, "backward")
    with torch.no_grad():
        for name, master in direct.masters.items():
            master.copy_(weights[name])
        direct._copy_masters()
    direct.optimizer.load_state_dict(before)
    losses = [changed.step(batch(3)).losses, direct.step(batch(3)).losses]
    assert losses[0] == losses[1]
    for name, master in changed.masters.items():
        assert torch.equal(master, direct.masters[name]), name
    for state in changed.optimizer.state.values():
        assert state["step"].item() == 4


def test_the_backend_follows_the_schedule_step_by_step() -> None:
    phases = [{"until": "1/2", "rotate_every": 2}, {"until": 1, "coverage": 1}]
    made = backend(coverage="1/4", schedule=phases)
    by_hand = backend(coverage="1/4")._simulation
    seen = []
    for step in range(STEPS):
        plan, masking = made._schedule.at(step)
        assert (made._simulation.plan, made._simulation.masking) == (plan, masking)
        seen.append(plan)
        by_hand.change_plan(plan, masking)
        expected = by_hand.step(batch(step), BATCH // WORLD_SIZE).losses
        assert made.step(batch(step)).losses.tolist() == list(expected)
    assert seen[0] == seen[1] != seen[2] != seen[3]
    assert seen[3].coverage == 1
    assert len(set(seen)) == 3


def test_a_skipped_step_counts_in_the_schedule() -> None:
    made = backend(schedule=[{"until": 0.5}, {"until": 1, "masking": "backward"}])
    made._simulation.step = lambda *_: replace(  # type: ignore[method-assign]
        Simulation.step(made._simulation, batch(0)), is_skipped=True
    )
    maskings = []
    for step in range(STEPS):
        maskings.append(made._simulation.masking)
        assert made.step(batch(step)).is_skipped
    assert maskings == ["forward"] * 3 + ["backward"] * 3
