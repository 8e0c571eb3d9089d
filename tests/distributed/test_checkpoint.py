"""Saving and resuming in a user's loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.checkpoint.save import seal
from sdp_llm.engine import SDPEngine
from sdp_llm.errors import ConfigError
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss
from sdp_llm.optim import group_options
from sdp_llm.training.checkpoints import largest_share
from tests.distributed.compare import assembled, whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import (
    Case,
    build,
    forward_backward,
    llama,
    my_slice,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]

SCHEDULER = {"type": "WarmupCosineLR", "params": {"total_num_steps": 8, "warmup_num_steps": 2}}
BASE = Case(extra=(("scheduler", SCHEDULER),))


def state(engine: SDPEngine) -> dict[str, list[tuple[str, int, int, np.ndarray]]]:
    """This rank's masters and moments: name, range and values of every slice."""
    found: dict[str, list[tuple[str, int, int, np.ndarray]]] = {}
    for piece in (piece for unit in engine.sharded.owned for piece in unit.slices):
        kinds = {"master": piece.tensor.detach()} | engine.basic_optimizer.state[piece.tensor]
        for kind, value in kinds.items():
            flat = value.expand(piece.stop - piece.start).numpy().copy()
            found.setdefault(kind, []).append((piece.name, piece.start, piece.stop, flat))
    return found


def steps(engine: SDPEngine, first: int, count: int) -> list[Any]:
    """Train; loss, norm and learning rate of each step."""
    seen = []
    for step in range(first, first + count):
        loss = forward_backward(engine, step)
        engine.step()
        seen.append((loss, engine.get_global_grad_norm(), engine.get_lr()))
    return seen


def counters(engine: SDPEngine) -> tuple[int, ...]:
    return engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps


def straight_and_resumed(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run on a rank: four steps; and two, a save, a load into a fresh engine, two more."""
    straight = build(case)
    expected: dict[str, Any] = {"seen": steps(straight, 0, 4)[2:]}
    first = build(case)
    steps(first, 0, 2)
    torch.manual_seed(11 + dist.get_rank())
    first.save_checkpoint(folder, client_state={"epoch": 1, "name": "x"})
    expected["random"] = torch.rand(3).tolist()
    resumed = build(case)
    steps(resumed, 5, 1)  # what it holds must not matter
    path, client_state = resumed.load_checkpoint(folder)
    found: dict[str, Any] = {"random": torch.rand(3).tolist(), "seen": steps(resumed, 2, 2)}
    assert path == str(Path(folder) / "global_step2")
    assert client_state == {"epoch": 1, "name": "x"}
    for entry, engine in ((expected, straight), (found, resumed)):
        entry |= {"state": state(engine), "weights": weights(engine), "counters": counters(engine)}
    return found, expected


RESUMED = [
    BASE.with_(stage=0),
    BASE.with_(stage=1, accumulation=3),
    BASE.with_(stage=2, is_bf16=True, is_tied=True),
    BASE.with_(stage=0, is_bf16=True, masking="backward"),
    BASE.with_(stage=2, masking="backward", owners_per_block=3),
    BASE.with_(stage=1, optimizer="RMSprop", bucket=2000),
]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: str(case.with_(extra=())))
def test_resumed_equals_straight(case: Case, pools: Pools, tmp_path: Path) -> None:
    """Bit for bit: losses, norms, learning rates, weights, masters, moments, counters."""
    for found, expected in pools(4).run(straight_and_resumed, case, str(tmp_path)):
        for entry in ("seen", "counters", "random"):
            assert found[entry] == expected[entry]
        assert found["state"].keys() == expected["state"].keys()
        for kind, slices in expected["state"].items():
            for mine, other in zip(found["state"][kind], slices, strict=True):
                assert mine[:3] == other[:3]
                np.testing.assert_array_equal(mine[3], other[3], err_msg=f"{kind} {mine[0]}")
        for name, value in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)


# -- other ranks, other plans ---------------------------------------------------------------------


def save(case: Case, folder: str, count: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Run on a rank: train and save."""
    engine = build(case)
    steps(engine, 0, count)
    engine.save_checkpoint(folder)
    return state(engine), weights(engine)


def load(case: Case, folder: str) -> tuple[Any, dict[str, np.ndarray], tuple[Any, ...]]:
    """Run on a rank: load what other ranks saved, and train on."""
    engine = build(case)
    engine.load_checkpoint(folder)
    loaded = state(engine), weights(engine)
    parts = engine.gradient_accumulation_steps()
    boundaries = [engine.is_gradient_accumulation_boundary()]
    seen = steps(engine, 2, 1)
    assert engine.global_steps == 3
    assert boundaries == [parts == 1]
    return *loaded, (seen, engine.get_lr())


OTHERS = [
    Case(2, stage=2, owners_per_block=1, accumulation=3, extra=BASE.extra),
    Case(2, "backward", stage=0, owners_per_block=2, extra=BASE.extra),
    Case(4, stage=0, owners_per_block=3, bucket=2500, extra=BASE.extra),
    Case(4, "backward", stage=1, owners_per_block=1, extra=BASE.extra),
]


def _assembled_state(parts: list[Any], like: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for kind in parts[0]:
        found[kind], counts = assembled([part[kind] for part in parts], like)
        assert all((count > 0).all() for count in counts.values()), kind
    return found


def test_another_number_of_ranks_plan_and_stage(pools: Pools, tmp_path: Path) -> None:
    """Masters and moments of every tensor are the same bits."""
    saved = pools(4).run(save, BASE.with_(stage=1), str(tmp_path), 2)
    expected_weights = whole([stored for _, stored in saved])
    like = {name: torch.from_numpy(value) for name, value in expected_weights.items()}
    expected = _assembled_state([part for part, _ in saved], like)
    assert expected.keys() == {"master", "exp_avg", "exp_avg_sq", "step"}
    for case in OTHERS:
        results = pools(case.world_size).run(load, case, str(tmp_path))
        found = _assembled_state([part for part, *_ in results], like)
        for kind, tensors in expected.items():
            for name, value in tensors.items():
                np.testing.assert_array_equal(found[kind][name], value, err_msg=f"{case} {name}")
        stored = whole([part for _, part, _ in results])
        for name, value in expected_weights.items():
            np.testing.assert_array_equal(stored[name], value, err_msg=f"{case} {name}")
        assert len({str(lr) for _, _, (_, lr) in results}) == 1


# -- what can go wrong ----------------------------------------------------------------------------


def load_errors(
    case: Case, folders: list[str], options: dict[str, Any], layers: int = 6
) -> list[str]:
    """Run on a rank: the ConfigError of loading each folder, "" where there is none."""
    engine = initialize(llama(case.is_tied, layers), run_config(case))[0]
    errors = []
    for folder in folders:
        try:
            engine.load_checkpoint(folder, **options)
            errors.append("")
        except ConfigError as error:
            errors.append(str(error))
    return errors


def _damage(folder: Path, how: str) -> None:
    shard = folder / "global_step1" / "rank-00001.safetensors"
    if how == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    elif how == "missing file":
        shard.unlink()
    elif how == "cut file":
        shard.write_bytes(shard.read_bytes()[:100])
    elif how == "no manifest":
        (folder / "global_step1" / "manifest.json").unlink()
    elif how == "cut manifest":
        (folder / "global_step1" / "manifest.json").write_text("{")
    elif how == "other version":
        path = folder / "global_step1" / "manifest.json"
        manifest = json.loads(path.read_text()) | {"format_version": 99}
        path.write_text(json.dumps(manifest | {"sha256": seal(manifest)}))
    elif how == "uncovered":
        # A set of files that is consistent but lacks a rank's part.
        path = folder / "global_step1" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["files"][shard.name]
        path.write_text(json.dumps(manifest | {"sha256": seal(manifest)}))
    elif how == "no latest":
        (folder / "latest").unlink()


DAMAGES = {
    "flipped byte": "rank-00001.safetensors: not the file that was saved",
    "missing file": "rank-00001.safetensors: ",
    "cut file": "rank-00001.safetensors: ",
    "no manifest": "manifest.json: not there",
    "cut manifest": "manifest.json: ",
    "other version": "format version 99",
    "uncovered": " are missing",
    "no latest": "latest: not there",
}


def test_damage_is_an_error_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    pools(2).run(save, Case(2), str(sound), 1)
    folders = [tmp_path / how.replace(" ", "-") for how in DAMAGES]
    for how, folder in zip(DAMAGES, folders, strict=True):
        shutil.copytree(sound, folder)
        _damage(folder, how)
    paths = [str(folder) for folder in (*folders, sound)]
    for *messages, without in pools(2).run(load_errors, Case(2), paths, {}):
        for message, expected in zip(messages, DAMAGES.values(), strict=True):
            assert expected in message
            assert "\n" not in message
        assert without == ""


def test_what_does_not_fit_is_an_error_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(save, Case(2), str(tmp_path), 1)
    calls: list[tuple[Case, int, dict[str, Any], str]] = [
        (Case(2), 7, {}, "model.layers.6."),
        (Case(2, is_tied=True), 6, {}, "lm_head.weight is [96, 32] there and absent in this"),
        (Case(2, optimizer="SGD"), 6, {}, "saved with another optimizer than SGD"),
        (Case(2, extra=BASE.extra), 6, {}, "saved without a learning-rate scheduler"),
        (Case(2), 6, {"tag": "nowhere"}, "nowhere/manifest.json: not there"),
    ]
    for case, layers, options, expected in calls:
        for (message,) in pools(2).run(load_errors, case, [str(tmp_path)], options, layers):
            assert expected in message
            assert "\n" not in message
    fine: list[tuple[Case, dict[str, Any]]] = [
        (Case(2, optimizer="SGD"), {"load_optimizer_states": False}),
        (Case(2, extra=BASE.extra), {"load_lr_scheduler_states": False}),
        (Case(2, optimizer="SGD", extra=BASE.extra), {"load_module_only": True}),
        (Case(2), {"tag": "global_step1"}),
    ]
    for case, options in fine:
        assert pools(2).run(load_errors, case, [str(tmp_path)], options) == [[""], [""]]


def around_a_refused_load(case: Case, folder: str) -> tuple[str, Any, Any]:
    """Run on a rank: what loading says, and what the engine holds before and after."""
    engine = build(case)
    steps(engine, 5, 1)

    def held() -> Any:
        options, random = group_options(engine.basic_optimizer), torch.get_rng_state().numpy()
        return state(engine), weights(engine), counters(engine), options, random

    before = held()
    try:
        engine.load_checkpoint(folder)
    except ConfigError as error:
        return str(error), before, held()
    return "", before, held()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(2, optimizer="RMSprop"), "saved with another optimizer than RMSprop"),
        (Case(2, extra=BASE.extra), "saved without a learning-rate scheduler"),
    ],
    ids=["optimizer", "scheduler"],
)
def test_what_does_not_fit_leaves_the_engine_as_it_was(
    case: Case, expected: str, pools: Pools, tmp_path: Path
) -> None:
    """Masters, moments, weights, counters, options and random numbers, bit for bit."""
    pools(2).run(save, Case(2), str(tmp_path), 2)
    for message, before, after in pools(2).run(around_a_refused_load, case, str(tmp_path)):
        assert expected in message
        np.testing.assert_equal(after, before)


def save_error(folder: str, broken_rank: int | None) -> str:
    """Run on a rank: the ConfigError of saving; a ``client_state`` may not be JSON."""
    engine = build(Case(2))
    extra = {"bad": {1, 2}} if broken_rank == dist.get_rank() else {}
    try:
        engine.save_checkpoint(folder, client_state=extra)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_client_state_must_be_json(broken_rank: int, pools: Pools, tmp_path: Path) -> None:
    for message in pools(2).run(save_error, str(tmp_path), broken_rank):
        assert message.startswith(f"rank {broken_rank}: client_state: ")
        assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def save_with_a_tensor_as_rate(folder: str) -> str:
    """Run on a rank: the ConfigError of saving an option that is no JSON."""
    engine = build(Case(2))
    engine.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    try:
        engine.save_checkpoint(folder)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_is_not_json_is_named(pools: Pools, tmp_path: Path) -> None:
    for message in pools(2).run(save_with_a_tensor_as_rate, str(tmp_path)):
        assert message.startswith("rank 0: param_groups: Object of type Tensor is not JSON")


def test_unwritable_folder_is_an_error_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for message in pools(2).run(save_error, str(tmp_path / "file" / "below"), None):
        assert message.startswith("rank 0: cannot read or write: ")
        assert "\n" not in message


def save_and_load_by_tag(folder: str) -> tuple[str, str]:
    """Run on a rank: the ConfigError of saving, and what can be loaded then."""
    return save_error(folder, None), build(Case(2)).load_checkpoint(folder, tag="global_step0")[0]


def test_a_checkpoint_that_only_latest_does_not_name_is_complete(
    pools: Pools, tmp_path: Path
) -> None:
    (tmp_path / "latest").mkdir()  # in the way of the file
    for message, loaded in pools(2).run(save_and_load_by_tag, str(tmp_path)):
        assert message.startswith(f"rank 0: {tmp_path}/latest: cannot be written")
        assert "the checkpoint global_step0, which is complete: " in message
        assert message.endswith('or load with tag="global_step0"')
        assert "\n" not in message
        assert loaded == str(tmp_path / "global_step0")


def save_badly(folder: str) -> list[str]:
    """Run on a rank: the errors of saving where something would be lost, or nothing be found."""
    engine, messages = build(Case(2)), []
    engine.save_checkpoint(folder, tag="best")
    engine.save_pretrained(f"{folder}/model")
    for tag in ("", ".", "..", ".hidden", "latest", "epoch/1", "model"):
        try:
            engine.save_checkpoint(folder, tag=tag)
        except ConfigError as error:
            messages.append(str(error))
    try:
        engine.save_pretrained(f"{folder}/best")
    except ConfigError as error:
        messages.append(str(error))
    engine.load_checkpoint(folder)
    return messages


def test_neither_checkpoint_nor_model_replaces_the_other(pools: Pools, tmp_path: Path) -> None:
    for *tags, model, checkpoint in pools(2).run(save_badly, str(tmp_path)):
        assert len(tags) == 6
        for message in tags:
            assert "expected the name of a folder, other than" in message
        assert model.startswith('rank 0: tag = "model": ')
        assert "no checkpoint, it would be lost" in model
        assert "holds a checkpoint, which must stay" in checkpoint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "model"]
    assert (tmp_path / "model" / "config.json").is_file()


def save_three(folder: str) -> list[str]:
    """Run on a rank: save after each of two steps, then over the second without ``latest``."""
    engine = build(Case(2))
    latest = []
    for step in range(3):
        steps(engine, step, 1)
        tag = None if step == 0 else "chosen"
        engine.save_checkpoint(folder, tag=tag, save_latest=step < 2)
        latest.append((Path(folder) / "latest").read_text())
    return latest


def test_only_safetensors_and_json(pools: Pools, tmp_path: Path) -> None:
    for latest in pools(2).run(save_three, str(tmp_path)):
        assert latest == ["global_step1", "chosen", "chosen"]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    ranks = ("rank-00000.safetensors", "rank-00001.safetensors")
    inside = {*ranks, "manifest.json", "state.json"}
    expected = {f"{tag}/{name}" for tag in ("global_step1", "chosen") for name in inside}
    assert files == expected | {"latest"}
    for tag in ("global_step1", "chosen"):
        manifest = json.loads((tmp_path / tag / "manifest.json").read_text())
        assert set(manifest["files"]) == inside - {"manifest.json"}
    content = json.loads((tmp_path / "chosen" / "state.json").read_text())
    assert content["counters"]["global_steps"] == 3, "the newer one replaced the older"


def saved_client_state(folder: str) -> dict[str, Any]:
    """Run on a rank: change what is saved in the background before it is written."""
    engine, client_state = build(Case(2)), {"loader": {"position": 1}}
    saving = engine.save_checkpoint_in_background(folder, client_state=client_state)
    client_state["loader"]["position"] = 2
    saving.finish()
    return engine.load_checkpoint(folder)[1]


def save_twice_at_once(folder: str) -> tuple[str, str]:
    """Run on a rank: begin a second save while the first is not finished, and after."""
    engine = build(Case(2))
    first = engine.save_checkpoint_in_background(folder, tag="x")
    message = ""
    try:
        engine.save_checkpoint(folder, tag="x")
    except ConfigError as error:
        message = str(error)
    first.finish()
    engine.save_checkpoint_in_background(folder, tag="x").finish()
    return message, engine.load_checkpoint(folder)[0]


def test_a_save_waits_for_the_one_in_the_background(pools: Pools, tmp_path: Path) -> None:
    for message, loaded in pools(2).run(save_twice_at_once, str(tmp_path)):
        assert message.startswith("save_checkpoint: the one in the background is not finished;")
        assert loaded == str(tmp_path / "x")


def test_a_save_in_the_background_has_the_state_of_its_beginning(
    pools: Pools, tmp_path: Path
) -> None:
    for loaded in pools(2).run(saved_client_state, str(tmp_path)):
        assert loaded == {"loader": {"position": 1}}


def micro_batches_after_a_load(folder: str) -> int:
    """Run on a rank: load weights between the micro-batches of a step; how many the next has."""
    case = Case(2, accumulation=3)
    engine = build(case)
    engine.save_checkpoint(folder)
    micro_batches = my_slice(1).split(1)

    def train(samples: Tensor) -> None:
        engine.backward(summed_loss(engine, samples))
        engine.step()

    train(micro_batches[0])
    engine.load_checkpoint(folder, load_module_only=True)
    for count, samples in enumerate(micro_batches, 1):
        train(samples)
        if engine.global_steps:
            return count
    return 0


def test_loading_weights_begins_the_step_anew(pools: Pools, tmp_path: Path) -> None:
    assert pools(2).run(micro_batches_after_a_load, str(tmp_path)) == [3, 3]


def copied_and_predicted(case: Case, folder: str) -> tuple[int, int]:
    """Run on a rank: bytes that a save in the background copies, and those that are predicted."""
    engine = build(case)
    steps(engine, 0, 1)
    for _ in range(2):  # the second one takes no more
        engine.save_checkpoint_in_background(folder).finish()
    subnetwork = engine.sharded.subnetwork
    units = [(subnetwork.owners(unit), unit.numel) for unit in subnetwork.layout.units]
    copied = sum(buffer.nbytes for buffer in engine._snapshot._buffers.values())
    return copied, 12 * largest_share(units, case.world_size)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_copy_of_a_save_in_the_background(stage: int, pools: Pools, tmp_path: Path) -> None:
    results = pools(4).run(copied_and_predicted, Case(stage=stage), str(tmp_path))
    rest = 12_000  # random state, and the step of every slice
    for copied, predicted in results:
        assert copied < predicted + rest
    assert max(copied for copied, _ in results) > 0.97 * results[0][1]
