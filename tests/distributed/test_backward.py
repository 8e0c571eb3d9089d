"""Backward passes beside the usual loop: held back, repeated, broken, incomplete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sdp_llm.engine import SDPEngine
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from tests.distributed.compare import assembled, whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import (
    Case,
    build,
    forward_backward,
    gradients,
    hf_loss,
    llama,
    my_slice,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]
Slices = list[tuple[str, int, int, np.ndarray]]


def assert_close(found: Slices, expected: Slices) -> None:
    """Equal up to the order of fp32 sums."""
    assert [piece[:3] for piece in found] == [piece[:3] for piece in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[3], b[3], rtol=1e-5, atol=1e-7, err_msg=a[0])
    assert max(np.abs(piece[3]).max() for piece in expected) > 1e-3


# -- a gradient that is not finite ----------------------------------------------------------------


def _lr_and_moments(engine: SDPEngine) -> tuple[list[float], list[Tensor]]:
    states = engine.basic_optimizer.state.values()
    return engine.get_lr(), [value.clone() for state in states for value in state.values()]


@contextmanager
def _broken_gradient(engine: SDPEngine) -> Iterator[None]:
    """Within, one gradient of rank 1 is infinite, of a block that not all ranks own."""
    if dist.get_rank() != 1:
        yield
        return
    block = next(b for b in engine.plan.free_blocks if engine.plan.owns(1, b))
    norm = engine.module.get_parameter(f"model.layers.{block}.input_layernorm.weight")
    hook = norm.register_hook(lambda gradient: gradient * float("inf"))
    yield
    hook.remove()


def with_a_broken_step(case: Case, is_broken: bool) -> dict[str, Any]:
    """Run on a rank: step 0, perhaps a step that is not finite on rank 1 only, step 1."""
    engine = build(case)
    forward_backward(engine, 0)
    engine.step()
    found: dict[str, Any] = {}
    if is_broken:
        before, state = weights(engine), _lr_and_moments(engine)
        with _broken_gradient(engine):
            engine.backward(hf_loss(engine, my_slice(5)))
        engine.step()
        after, state_after = weights(engine), _lr_and_moments(engine)
        found["applied"] = engine.was_step_applied()
        found["norm"] = engine.get_global_grad_norm()
        found["same lr"] = state[0] == state_after[0]
        found["same moments"] = all(map(torch.equal, state[1], state_after[1]))
        found["same weights"] = all(np.array_equal(before[n], after[n]) for n in before)
    forward_backward(engine, 1)
    engine.step()
    found["applied at last"] = engine.was_step_applied()
    found["counts"] = (engine.skipped_steps, engine.global_steps)
    found["weights"], found["lr"] = weights(engine), engine.get_lr()
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=0, owners_per_block=1),
        Case(stage=1, is_bf16=True),
        Case(stage=2),
        Case(masking="backward"),
    ],
    ids=str,
)
def test_all_ranks_skip_together(case: Case, pools: Pools) -> None:
    """A rank that does not own the block learns of it by the norm alone."""
    scheduler = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    case = case.with_(extra=(("scheduler", scheduler),))
    broken = pools(4).run(with_a_broken_step, case, True)
    sound = pools(4).run(with_a_broken_step, case, False)
    for found, expected in zip(broken, sound, strict=True):
        assert not found["applied"]
        assert not np.isfinite(found["norm"])
        assert found["same lr"]
        assert found["same moments"]
        assert found["same weights"]
        assert found["counts"] == (1, 3)
        assert expected["counts"] == (0, 2)
        assert found["applied at last"]
        assert found["lr"] == expected["lr"]
        for name, value in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)


# -- several passes in one step ------------------------------------------------------------------


def held_back(case: Case, how: str) -> tuple[Slices, Slices]:
    """Run on a rank: three passes without accumulation steps, and the engine's own three."""
    engine = build(case)
    losses = (summed_loss(engine, p) / target_count(my_slice(0)) for p in my_slice(0).chunk(3))
    if how == "joined":
        losses = iter([sum(losses, torch.zeros(()))])
    for i, loss in enumerate(losses):
        if how == "no_sync" and i < 2:
            with engine.no_sync():
                engine.backward(loss)
            continue
        if how == "boundary":
            engine.set_gradient_accumulation_boundary(i == 2)
        engine.backward(loss)
    usual = build(case.with_(accumulation=3))
    forward_backward(usual, 0)
    return gradients(engine.sharded.owned), gradients(usual.sharded.owned)


# Stage 2 refuses no_sync, see below.
WAYS = [
    (how, stage) for how in ("no_sync", "boundary", "repeated", "joined") for stage in (0, 1, 2)
]


@pytest.mark.parametrize(("how", "stage"), [way for way in WAYS if way != ("no_sync", 2)])
def test_passes_of_one_step_add_up(how: str, stage: int, pools: Pools) -> None:
    for found, expected in pools(4).run(held_back, Case(stage=stage, owners_per_block=3), how):
        assert_close(found, expected)


def no_sync_misused() -> list[str]:
    """Run on a rank: what is forbidden."""
    errors = []
    for stage in (1, 2):
        engine = build(Case(2, stage=stage))
        try:
            with engine.no_sync():
                engine.step()
        except AssertionError as error:
            errors.append(str(error))
    return errors


def test_no_sync_says_what_it_forbids(pools: Pools) -> None:
    for step, partitioned in pools(2).run(no_sync_misused):
        assert "step() inside no_sync" in step
        assert "ZeRO stage 2" in partitioned
        assert "\n" not in step + partitioned


def other_batch_sizes() -> tuple[list[bool], list[int]]:
    """Run on a rank: 3, then 2, then 4 micro-batches per step."""
    engine = build(Case(2, stage=1, accumulation=3))
    micro, boundaries, accumulation = engine.train_micro_batch_size_per_gpu(), [], []
    parts = torch.cat([my_slice(0), my_slice(1)]).split(micro)
    for count in (3, 2, 4):
        engine.set_train_batch_size(count * micro * 2)
        accumulation.append(engine.gradient_accumulation_steps())
        for part in parts[:count]:
            engine.backward(hf_loss(engine, part))
            boundaries.append(engine.is_gradient_accumulation_boundary())
            engine.step()
    assert engine.global_steps == 3
    return boundaries, accumulation


def test_another_train_batch_size(pools: Pools) -> None:
    for boundaries, accumulation in pools(2).run(other_batch_sizes):
        assert accumulation == [3, 2, 4]
        assert boundaries == [i + 1 == count for count in (3, 2, 4) for i in range(count)]


def norms_of_the_models_own_losses() -> list[float | None]:
    """Run on a rank: the gradient norm of three passes, averaged and summed."""
    norms = []
    for is_averaged in (True, False):
        engine = build(Case(2, stage=1, accumulation=3, clip=0.0))
        for part in my_slice(0).split(engine.train_micro_batch_size_per_gpu()):
            engine.backward(hf_loss(engine, part), scale_wrt_gas=is_averaged)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    return norms


def test_a_loss_is_not_divided_where_that_was_not_asked_for(pools: Pools) -> None:
    for averaged, summed in pools(2).run(norms_of_the_models_own_losses):
        assert summed == pytest.approx(3 * averaged, rel=1e-5)


# -- passes that the engine does not know ---------------------------------------------------------


def backward_elsewhere() -> tuple[list[str], Slices, Slices]:
    """Run on a rank: loss.backward() of the engine's and of the module's loss; then a step."""
    engine, sound = build(Case(2)), build(Case(2))
    errors = []
    for model in (engine, engine.module):
        try:
            hf_loss(model, my_slice(3)).backward()
        except RuntimeError as error:
            errors.append(str(error))
    forward_backward(engine, 0)
    forward_backward(sound, 0)
    return errors, gradients(engine.sharded.owned), gradients(sound.sharded.owned)


def test_backward_outside_the_engine(pools: Pools) -> None:
    for errors, found, expected in pools(2).run(backward_elsewhere):
        direct, module = errors
        assert "engine.backward(loss)" in direct
        assert "lm_head.weight: a backward pass outside engine.backward(loss)" in module
        assert "\n" not in direct + module
        assert_close(found, expected)


# -- gradients that never come --------------------------------------------------------------------


def incomplete(case: Case) -> tuple[Slices, Slices, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run on a rank: a parameter that no forward uses, and one frozen after the start."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(llama())
    model.register_parameter("unused", nn.Parameter(torch.ones(5, 3)))
    plain = LlamaForCausalLM(llama())
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if n != "unused"})
    engine = initialize(model, run_config(case))[0]
    engine.module.get_parameter("model.norm.weight").requires_grad_(False)
    sound = initialize(plain, run_config(case))[0]
    start = weights(engine)
    for each in (engine, sound):
        forward_backward(each, 0)
    found = gradients(engine.sharded.owned), gradients(sound.sharded.owned)
    engine.step()
    return *found, start, weights(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_missing_gradients_count_as_zero(stage: int, pools: Pools) -> None:
    results = pools(4).run(incomplete, Case(stage=stage, clip=0.0))
    start = whole([result[2] for result in results])
    like = {name: torch.from_numpy(value) for name, value in start.items()}
    found, _ = assembled([result[0] for result in results], like)
    expected, _ = assembled([result[1] for result in results], like)
    for name, value in found.items():
        is_missing = name in ("unused", "model.norm.weight")
        assert value.any() != is_missing, name
        if not is_missing:
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    end = whole([result[3] for result in results])
    np.testing.assert_array_equal(end["model.norm.weight"], start["model.norm.weight"])
    np.testing.assert_allclose(end["unused"], start["unused"] * (1 - 1e-3 * 0.1), rtol=1e-6)
