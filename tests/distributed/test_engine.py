"""The engine in a user's own loop."""

from __future__ import annotations

import csv
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import lr_schedules
from deepspeed.utils import groups
from transformers import ApertusConfig, LlamaForCausalLM

from sdp_llm import distributed
from sdp_llm.errors import ConfigError
from sdp_llm.initialization import initialize
from sdp_llm.plan import make_plan
from sdp_llm.sharding.collectives import Pending
from sdp_llm.simulation import Simulation
from tests.distributed.compare import whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import (
    SAMPLES_PER_RANK,
    Case,
    batch,
    build,
    forward_backward,
    hf_loss,
    llama,
    masters,
    my_slice,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]


def simulation(case: Case) -> Simulation:
    """The oracle of a case."""
    plan = make_plan(case.world_size, 6, owners_per_block=case.owners_per_block)

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **case.optimizer_params)

    return Simulation(llama(case.is_tied), plan, optimizer, seed=7, max_norm=case.clip)


# -- the loop ---------------------------------------------------------------------------------


def mode_of_a_given_model() -> bool:
    engine = initialize(LlamaForCausalLM(llama()).eval(), run_config(Case(2)))[0]
    return all(module.training for module in engine.module.modules())


def test_a_given_model_is_trained_in_training_mode(pools: Pools) -> None:
    assert pools(2).run(mode_of_a_given_model) == [True, True]


def user_loop(case: Case, steps: int) -> list[dict[str, Any]]:
    """Run on a rank: DeepSpeed's usual loop; what the user sees after every micro-batch."""
    engine = build(case)
    seen = []
    for step in range(steps):
        for part in my_slice(step).chunk(engine.gradient_accumulation_steps()):
            loss = hf_loss(engine, part)
            engine.backward(loss)
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            seen.append(
                {
                    "boundary": (boundary, engine.was_step_applied()),
                    "steps": (engine.micro_steps, engine.global_steps, engine.global_samples),
                    "norm": engine.get_global_grad_norm(),
                    "lr": engine.get_lr(),
                }
            )
    return seen


@pytest.mark.parametrize("stage", [0, 2])
def test_user_loop(stage: int, pools: Pools) -> None:
    case, steps = Case(stage=stage, accumulation=3), 2
    oracle = simulation(case)
    expected = [oracle.step(batch(step, 4)).grad_norm for step in range(steps)]
    for seen in pools(4).run(user_loop, case, steps):
        assert [entry["boundary"] for entry in seen] == [(i % 3 == 2,) * 2 for i in range(6)]
        last = 4 * SAMPLES_PER_RANK
        assert [entry["steps"] for entry in seen[2::3]] == [(3, 1, last), (6, 2, 2 * last)]
        norms = [entry["norm"] for entry in seen[2::3]]
        np.testing.assert_allclose(norms, expected, rtol=1e-6)


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 3, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 6, "warmup_num_steps": 2}),
    ("StepLR", {"step_size": 2, "gamma": 0.5}),
    ("CosineAnnealingLR", {"T_max": 4}),
]


@pytest.mark.parametrize(("name", "params"), SCHEDULERS, ids=[name for name, _ in SCHEDULERS])
def test_schedulers(name: str, params: dict[str, Any], pools: Pools) -> None:
    """All ranks know the learning rates of the same scheduler on a plain optimizer."""
    steps = 4
    extra = (("scheduler", {"type": name, "params": params}),)
    seen = pools(4).run(user_loop, Case(stage=1, owners_per_block=1, extra=extra), steps)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    plain = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=1e-3)
    module = lr_schedules if hasattr(lr_schedules, name) else torch.optim.lr_scheduler
    scheduler = getattr(module, name)(plain, **params)
    expected = []
    for _ in range(steps):
        plain.step()
        scheduler.step()
        expected.append([group["lr"] for group in plain.param_groups])
    assert len({lr[0] for lr in expected}) > 1
    for entries in seen:
        assert [entry["lr"] for entry in entries] == expected


def with_callables() -> tuple[list[Any], list[Any], str, bool]:
    """Run on a rank: two steps with functions instead of the config's sections."""
    case = Case(2, optimizer="RMSprop")
    config = run_config(case)
    del config["optimizer"]
    engine, optimizer, loader, scheduler = initialize(
        llama(),
        config,
        optimizer=lambda groups: torch.optim.RMSprop(groups, **case.optimizer_params),
        lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0),
    )
    assert loader is None
    assert scheduler is engine.lr_scheduler
    plain = build(case)
    for step in range(2):
        for each in (engine, plain):
            forward_backward(each, step)
            each.step()
    kind = type(optimizer.inner).__name__
    is_same = scheduler.last_epoch == 2 and optimizer is engine.optimizer
    return masters(engine.sharded.owned), masters(plain.sharded.owned), kind, is_same


def test_functions_that_make_optimizer_and_scheduler(pools: Pools) -> None:
    for found, expected, kind, is_same in pools(2).run(with_callables):
        assert kind == "RMSprop"
        assert is_same
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a[3], b[3], err_msg=a[0])


def one_group(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups[:1], lr=0.1)


def without_a_tensor_on_rank_1(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if dist.get_rank() == 1:
        groups[0]["params"].pop()
    return torch.optim.SGD(groups, lr=0.1)


def group_each(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)


def other_order(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups[::-1], lr=0.1)


def tensor_rate(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=torch.tensor(0.1))


def no_optimizer(groups: list[dict[str, Any]]) -> None:
    pass


ROTATING = {"sdp": {"owners_per_block": 1, "rotate_every": 2}}
PHASES = {"sdp": {"schedule": [{"until": 0.5}, {"until": 1, "masking": "backward"}]}}


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (one_group, {}, "rank 0: optimizer: the function leaves out "),
        (without_a_tensor_on_rank_1, {}, "rank 1: optimizer: the function leaves out 1 of the "),
        (group_each, ROTATING, "rank 0: optimizer: the function makes 1 parameter groups of other"),
        (other_order, PHASES, "rank 0: optimizer: the function makes 2 parameter groups of other"),
        (tensor_rate, {}, "rank 0: optimizer: lr of a parameter group is a Tensor, which checkp"),
        (no_optimizer, {}, "rank 0: optimizer: the function returned a NoneType; return the tor"),
        (group_each, {}, ""),
        (other_order, {}, ""),
    ],
)
def test_what_an_optimizer_function_makes_is_checked_at_the_start(
    function: Callable[..., Any], changes: dict[str, Any], message: str, pools: Pools
) -> None:
    arguments, config = {"optimizer": function, "total_num_steps": 8}, run_config(Case(2))
    for found in pools(2).run(error_of, arguments, config | changes):
        assert found.startswith(message)
        assert "\n" not in found
        assert bool(found) == bool(message)


def error_of_a_change() -> str:
    """Run on a rank: the error of a change of plan with groups in another order."""
    engine = initialize(llama(), run_config(Case(2)), optimizer=other_order, total_num_steps=8)[0]
    try:
        engine.change_plan(make_plan(2, 6, owners_per_block=2), "forward")
    except ConfigError as error:
        return str(error)
    return ""


def test_what_arrives_needs_the_groups_that_were_given(pools: Pools) -> None:
    for message in pools(2).run(error_of_a_change):
        assert message.startswith("rank 0: change_plan: the optimizer has other parameter groups")


def error_of(arguments: dict[str, Any], config: dict[str, Any]) -> str:
    """Run on a rank: the ConfigError of a wrong call."""
    model = LlamaForCausalLM(llama())
    frozen = arguments.pop("frozen", None)
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    try:
        initialize(model if frozen else llama(), config, **arguments)
    except ConfigError as error:
        return str(error)
    return ""


def after_a_failed_pass(case: Case, folder: str) -> list[dict[str, np.ndarray]]:
    """Run on a rank: two steps, straight and after a backward pass that failed midway."""
    found = []
    for mended_by in (None, "zero_grad", "load_checkpoint"):
        engine = build(case)
        if mended_by is not None:
            engine.save_checkpoint(folder)
            embedding = engine.module.get_parameter("model.embed_tokens.weight")

            def fail(gradient: torch.Tensor) -> None:
                raise ArithmeticError("as if memory had run out")

            hook = embedding.register_hook(fail)
            with pytest.raises(ArithmeticError):
                forward_backward(engine, 5)
            hook.remove()
            with pytest.raises(RuntimeError, match=r"a backward pass outside engine\.backward"):
                engine.module(my_slice(5)).logits.sum().backward()
            with pytest.raises(
                RuntimeError, match=r"left gradients; call engine\.zero_grad\(\) on all"
            ):
                forward_backward(engine, 5)
            engine.zero_grad() if mended_by == "zero_grad" else engine.load_checkpoint(folder)
        for step in range(2):
            forward_backward(engine, step)
            engine.step()
        found.append(weights(engine))
    return found


@pytest.mark.parametrize(
    "case",
    [
        *(Case(2, stage=stage) for stage in (0, 1, 2)),
        Case(2, stage=1, overlap=False),  # nothing is under way when it fails
        Case(2, stage=1, accumulation=3),
    ],
    ids=str,
)
def test_a_failed_backward_pass_leaves_nothing_behind(
    case: Case, pools: Pools, tmp_path: Path
) -> None:
    runs = pools(2).run(after_a_failed_pass, case, str(tmp_path))
    for straight, *after in runs:
        for name, value in straight.items():
            for mended in after:
                np.testing.assert_array_equal(mended[name], value, err_msg=name)


def another_batch_size() -> tuple[list[float], list[float]]:
    """Run on a rank: the norm of a step after the batch size changed, midway and at the start."""
    norms = []
    for micro_batches in (1, 0):
        engine = build(Case(2, accumulation=3))
        parts = my_slice(0).chunk(6)
        for part in parts[:micro_batches]:
            engine.backward(hf_loss(engine, part))
            engine.step()
        engine.set_train_batch_size(2 * 2 * engine.train_micro_batch_size_per_gpu())
        for part in parts[1:3]:
            engine.backward(hf_loss(engine, part))
            engine.step()
        assert engine.global_steps == 1
        norms.append([engine.get_global_grad_norm()])
    return norms[0], norms[1]


def test_a_new_batch_size_begins_the_step_anew(pools: Pools) -> None:
    for midway, fresh in pools(2).run(another_batch_size):
        assert midway == fresh


def evaluation_errors() -> list[str]:
    """Run on a rank: the ValueError of evaluations that are wrong on one rank, or on all."""
    engine, messages = build(Case(2)), []
    two_only_on_rank_0 = 2 if dist.get_rank() == 0 else 0
    for samples, micro_batch in (
        (my_slice(0), two_only_on_rank_0),
        (my_slice(0), -1),
        (my_slice(0)[:0], 2),
        (my_slice(0)[:, :1], 2),
        (torch.empty(0) if dist.get_rank() == 1 else my_slice(0), 2),
    ):
        try:
            engine.evaluate(samples, micro_batch)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_evaluations_that_cannot_be_are_an_error_on_every_rank(pools: Pools) -> None:
    for messages in pools(2).run(evaluation_errors):
        assert messages == [
            "evaluate: micro_batch = 0: must be at least 1 on every rank",
            "evaluate: micro_batch = -1: must be at least 1 on every rank",
            "evaluate: samples: no rank has any; give at least one rank one",
            *(
                f"evaluate: samples of {length} tokens on a rank: they have no target; give "
                "[samples, sequence + 1] tokens"
                for length in (1, 0)
            ),
        ]


def given_twice() -> str:
    model = LlamaForCausalLM(llama())
    initialize(model, run_config(Case(2)))
    try:
        initialize(model, run_config(Case(2)))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_is_given_once(pools: Pools) -> None:
    for message in pools(2).run(given_twice):
        assert message.startswith("model: another engine has taken its values and blocks; make")


def valueless() -> str:
    """Run on a rank: the error of a family whose activation has values that only its code sets."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = ApertusConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    sdp = {"owner_sets": [[0, 1], [1], [1], [0, 1]]}
    try:
        initialize(config, run_config(Case(2)) | {"sdp": sdp})
    except ConfigError as error:
        return str(error)
    return ""


def test_a_parameter_without_an_initial_value_is_an_error_on_every_rank(pools: Pools) -> None:
    for message in pools(2).run(valueless):
        assert "model: ApertusForCausalLM leaves model.layers.0.mlp.act_fn.alpha_" in message
        assert "without an initial value in _init_weights; start from a checkpoint" in message
        assert "\n" not in message


def test_wrong_calls_get_one_line(pools: Pools) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    config = run_config(Case(2))
    cycle = {"max_lr": 1.0}
    bare = {name: value for name, value in config.items() if name != "optimizer"}
    calls: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"optimizer": optimizer}, config, "optimizer: SGD is an instance"),
        ({"lr_scheduler": scheduler}, config, "lr_scheduler: StepLR is an instance"),
        ({}, bare, "optimizer: missing"),
        ({"frozen": "model.norm.weight"}, config, "model: model.norm.weight is frozen"),
        ({}, config | {"train_batch_size": 7}, "train_batch_size"),
        (
            {},
            config | {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}}},
            "optimizer.params: SGD cannot be made with them: Nesterov momentum requires",
        ),
        (
            {"total_num_steps": 8},
            config | {"scheduler": {"type": "OneCycleLR", "params": {**cycle, "total_steps": 7}}},
            "scheduler.params.total_steps = 7: the budget is 8 steps",
        ),
        (
            {},
            config | {"scheduler": {"type": "OneCycleLR", "params": cycle}},
            "scheduler.params: OneCycleLR cannot be made with them: ",
        ),
        (
            {},
            config | {"sdp": {**config["sdp"], "memory_limit_gib": 1e-6}},
            "sdp.memory_limit_gib = 1e-06: memory cannot be predicted",
        ),
    ]
    for arguments, given, start in calls:
        for message in pools(2).run(error_of, arguments, given):
            assert message.startswith(start)
            assert "\n" not in message


# -- where the values come from -----------------------------------------------------------------


def initial(case: Case) -> dict[str, np.ndarray]:
    """Run on a rank: the weights that it starts from."""
    return weights(build(case))


def test_initial_values_depend_on_neither_ranks_nor_plan(pools: Pools) -> None:
    expected = {name: m.detach().numpy() for name, m in simulation(Case()).masters.items()}
    cyclic = ("sdp", {"owners_per_block": 3, "strategy": "cyclic", "pinned_last": 0})
    cases = [
        Case(2, stage=0, owners_per_block=1),
        Case(4, "backward", stage=1),
        Case(4, extra=(cyclic,)),
        Case(4, bucket=1500),
    ]
    for case in cases:
        found = whole(pools(case.world_size).run(initial, case))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{case}: {name}")


def from_own_model(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[int]]:
    """Run on a rank: build a model under this rank's seed, and initialize with it."""
    torch.manual_seed(100 + dist.get_rank())
    model = LlamaForCausalLM(llama())
    own = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    engine, *_ = initialize(model, run_config(case))
    return own, weights(engine), list(engine.plan.owned_blocks(dist.get_rank()))


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_given_model_becomes_the_lowest_ranks(masking: str, pools: Pools) -> None:
    results = pools(4).run(from_own_model, Case(masking=masking, owners_per_block=2))
    found = whole([stored for _, stored, _ in results])
    sources = set()
    for name, value in found.items():
        source = 0
        if masking == "forward" and name.startswith("model.layers."):
            block = int(name.split(".")[2])
            source = min(r for r, (_, _, owned) in enumerate(results) if block in owned)
        sources.add(source)
        np.testing.assert_array_equal(value, results[source][0][name], err_msg=name)
    assert found.keys() == results[0][0].keys()
    assert (len(sources) > 1) == (masking == "forward"), "not rank 0 owns every block"


def storage_report() -> dict[str, Any]:
    """Run on a rank: which parameters have storage, in the model and beside it."""
    engine = build(Case())
    subnetwork, parameters = engine.sharded.subnetwork, list(engine.module.parameters())
    absent = [p for block in subnetwork.absent.values() for p in block.parameters()]
    in_model = {name for name, p in engine.module.named_parameters() if not p.is_meta}
    pointers = {unit.flat.untyped_storage().data_ptr() for unit in engine.sharded.units}
    return {
        "owned": set(engine.plan.owned_blocks(dist.get_rank())),
        "absent": (sorted(subnetwork.absent), len(absent), all(p.is_meta for p in absent)),
        "blocks": {int(n.split(".")[2]) for n in in_model if n.startswith("model.layers.")},
        "any meta": any(p.is_meta for p in parameters),
        "in units": {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        == pointers,
        "views": all(
            piece.tensor.untyped_storage().data_ptr() in pointers
            for unit in engine.sharded.owned
            for piece in unit.slices
        ),
    }


def test_absent_blocks_have_no_storage(pools: Pools) -> None:
    for found in pools(4).run(storage_report):
        absent = sorted(set(range(6)) - found["owned"])
        assert absent
        assert found["absent"] == (absent, 9 * len(absent), True)
        assert found["blocks"] == found["owned"]
        assert not found["any meta"]
        assert found["in units"]
        assert found["views"], "fp32 masters are views of the weights"


def different_plans() -> str:
    """Run on a rank: start with a plan that only this rank has."""
    sets = [[0, 1], [dist.get_rank()], [0, 1], [0, 1], [0, 1], [0, 1]]
    try:
        build(Case(2, extra=(("sdp", {"owner_sets": sets}),)))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_different_plans_stop_at_the_start(pools: Pools) -> None:
    for message in pools(2).run(different_plans):
        assert message.startswith("the plan on ranks [1] differs from rank 0's")


# -- the monitor and the data loader --------------------------------------------------------------


def with_monitor(folder: str) -> None:
    """Run on a rank: three steps with a learning rate that halves."""
    monitor = {"enabled": True, "output_path": folder, "job_name": "job"}
    scheduler = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine = build(Case(2, extra=(("csv_monitor", monitor), ("scheduler", scheduler))))
    for step in range(3):
        forward_backward(engine, step)
        engine.step()


def test_monitor_writes_the_learning_rate(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(with_monitor, str(tmp_path))
    (path,) = tmp_path.rglob("*lr.csv")
    rows = list(csv.reader(path.open()))
    assert [float(lr) for _, lr in rows[1:]] == [5e-4, 2.5e-4, 1.25e-4]
    assert [float(samples) for samples, _ in rows[1:]] == [6, 12, 18]


def with_training_data() -> tuple[int, list[int]]:
    """Run on a rank: how many micro-batches the data loader has, and which samples."""
    data = list(batch(0, 2))
    engine, _, loader, _ = initialize(llama(), run_config(Case(2)), training_data=data)
    # The other one starts worker processes, which a rank of the pool may not.
    seen = torch.cat(list(engine.deepspeed_io(data, num_local_io_workers=0)))
    return len(loader), [int((torch.stack(data) == row).all(1).int().argmax()) for row in seen]


def test_training_data_is_split_between_the_ranks(pools: Pools) -> None:
    first, second = pools(2).run(with_training_data)
    assert sorted(first[1] + second[1]) == list(range(2 * SAMPLES_PER_RANK))
    assert len(first[1]) == len(second[1])
    assert first[0] == second[0] == 1


def most_under_way(case: Case) -> int:
    """How many reductions were started and not waited for at a time in one backward pass."""
    engine = build(case)
    communicator = engine.sharded.communicator
    counts, start = [0], communicator.reduce_scatter

    def counted(*arguments: Any) -> Any:
        summands, pending = start(*arguments)
        counts.append(counts[-1] + 1)

        def wait() -> None:
            counts.append(counts[-1] - 1)
            pending.wait()

        return summands, Pending(wait)

    communicator.reduce_scatter = counted  # type: ignore[method-assign]
    forward_backward(engine, 0)
    assert counts[-1] == 0
    return max(counts)


@pytest.mark.parametrize(
    ("stage", "under_way", "most"), [(1, 1, 1), (1, 3, 3), (2, 3, 3), (0, 3, 1)]
)
def test_reductions_under_way(stage: int, under_way: int, most: int, pools: Pools) -> None:
    case = Case(2, stage=stage, under_way=under_way)
    assert pools(2).run(most_under_way, case) == [most] * 2


def device_and_world(_: None) -> tuple[list[int], bool]:
    """Run on a rank: the devices taken at the start, and whether DeepSpeed's world is torch's."""
    taken: list[int] = []
    accelerator = distributed.get_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "set_device", taken.append)
        distributed.init_distributed(timedelta(minutes=1))
    build(Case(2))
    return taken, groups._get_data_parallel_group() is dist.group.WORLD


def test_each_rank_takes_its_own_device(pools: Pools) -> None:
    assert pools(2).run(device_and_world, None) == [([0], True), ([1], True)]
