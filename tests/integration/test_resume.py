"""Runs that go on from their folder: exactly, elsewhere, and past what is damaged."""

from __future__ import annotations

import io
import json
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sdp_llm.checkpoint import save
from sdp_llm.config import load_config
from sdp_llm.data.sampler import samples_at
from sdp_llm.errors import ConfigError, TrainingStopped
from sdp_llm.evaluation import Evaluation
from sdp_llm.training import session
from sdp_llm.training.backends import EngineBackend, Step
from sdp_llm.training.inputs import load_inputs
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.session import train
from tests.distributed.compare import assembled, whole
from tests.distributed.pool import Pool
from tests.distributed.test_checkpoint import state
from tests.distributed.tiny import weights
from tests.integration.conftest import STEPS, Tiny

IN_EVALUATION = -1

Pools = Callable[[int], Pool]


@dataclass(frozen=True)
class Outcome:
    """What one rank did: what it printed, the batches it read, its losses, what it holds."""

    error: str
    said: str
    batches: list[torch.Tensor]
    losses: list[float]
    lrs: list[float]
    state: Any
    weights: dict[str, np.ndarray]
    random: list[float]


def limit_files(size: int) -> None:
    """Let no file of this process grow larger (bytes): writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Watched(EngineBackend):
    """Takes notes.

    After ``stop_after`` steps, or in the first evaluation, rank 1 (or the only one) is asked to
    stop; after the first of
    ``full_disk`` steps it can write small files only, until after the second.
    """

    def __init__(
        self,
        run: Any,
        inputs: Any,
        stop_after: int | None,
        full_disk: tuple[int, int] | None,
    ) -> None:
        super().__init__(run, inputs, self._asked)
        self._stop_after = stop_after
        self._in_evaluation = False
        self._full_disk = full_disk
        self.batches: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.lrs: list[float] = []
        self.loaded: Any = None

    def _asked(self) -> bool:
        is_mine = self.rank == min(1, self.world_size - 1)
        if self._stop_after == IN_EVALUATION:
            return is_mine and self._in_evaluation
        return is_mine and self._stop_after is not None and len(self.batches) >= self._stop_after

    def evaluate(self, samples: torch.Tensor, micro_batch: int) -> Evaluation:
        self._in_evaluation = True
        return super().evaluate(samples, micro_batch)

    def step(self, tokens: torch.Tensor) -> Step:
        self.batches.append(tokens)
        self.lrs.append(self.lr)
        result = super().step(tokens)
        self.losses.append(result.losses.item())
        if self._full_disk is not None and self.rank == 1:
            first, last = self._full_disk
            limit_files(20_000 if first <= len(self.batches) < last else resource.RLIM_INFINITY)
        return result

    def load(self, path: Path) -> dict[str, Any]:
        result = super().load(path)
        self.loaded = state(self.engine), weights(self.engine)
        return result


def job(
    config: str,
    overrides: list[str],
    *,
    resume: str = "auto",
    stop_after: int | None = None,
    full_disk: tuple[int, int] | None = None,
    keep_loaded: bool = False,
    slow_disk: float = 0,
) -> Outcome:
    """Run on a rank: what ``launch/pretrain.py`` does, and what came of it."""
    run = load_config(config, ["training.export=false", *overrides])
    inputs = load_inputs(run, dist.get_world_size())
    error, backend, said = "", None, io.StringIO()
    write = save.write_tensors

    def write_slowly(*arguments: Any) -> Any:
        time.sleep(slow_disk)
        return write(*arguments)

    save.write_tensors = write_slowly
    try:
        with redirect_stdout(said):
            folder = RunFolder(run, inputs.schedule, dist.get_rank() == 0, resume)
            backend = Watched(run, inputs, stop_after, full_disk)
            train(run, inputs, backend, folder, resume)
    except (ConfigError, TrainingStopped) as caught:
        error = str(caught)
    limit_files(resource.RLIM_INFINITY)
    save.write_tensors = write
    if backend is None:
        return Outcome(error, said.getvalue(), [], [], [], None, {}, [])
    held = (state(backend.engine), weights(backend.engine))
    if keep_loaded:
        held = backend.loaded
    random = torch.rand(2).tolist()
    notes = (backend.batches, backend.losses, backend.lrs)
    return Outcome(error, said.getvalue(), *notes, *held, random)


def run_on(pool: Pool, tiny: Tiny, *overrides: str, **options: Any) -> list[Outcome]:
    """The outcomes of all ranks, which fail the test where one has an error."""
    outcomes = pool.run(job, str(tiny.config), list(overrides), **options)
    assert [outcome.error for outcome in outcomes] == [""] * len(outcomes)
    return outcomes


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def same_state(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for kind, slices in expected.items():
        for mine, other in zip(found[kind], slices, strict=True):
            assert mine[:3] == other[:3]
            np.testing.assert_array_equal(mine[3], other[3], err_msg=f"{kind} {mine[0]}")


EXACT = {
    "fp32": ["zero_optimization.stage=2"],
    "bf16": ["bf16.enabled=true", "zero_optimization.stage=1"],
    # The step at which it stops is the one after which the phase changes.
    "phases": [
        'sdp.schedule=[{"until": 0.5, "rotate_every": 1}, {"until": 1, "masking": "backward"}]',
        "zero_optimization.stage=1",
    ],
    "backward": ["bf16.enabled=true", "sdp.masking=backward", "zero_optimization.stage=0"],
}


@pytest.mark.parametrize("name", EXACT)
def test_stopped_and_continued_equals_straight(
    name: str, tiny: Tiny, pools: Pools, tmp_path: Path
) -> None:
    """Bit for bit: data, losses, learning rates, weights, optimizer state, random numbers."""
    folders = [f"training.run_dir={tmp_path / part}" for part in ("straight", "parts")]
    whole_run = run_on(pools(2), tiny, folders[0], *EXACT[name])
    first = run_on(pools(2), tiny, folders[1], *EXACT[name], stop_after=3)
    assert status(tmp_path / "parts")["state"] == "preempted"
    assert status(tmp_path / "parts")["checkpoint"] == "checkpoints/step-3"
    second = run_on(pools(2), tiny, folders[1], *EXACT[name])
    for straight, before, after in zip(whole_run, first, second, strict=True):
        assert len(before.batches) == 3
        batches = torch.stack(before.batches + after.batches)
        assert torch.equal(batches, torch.stack(straight.batches))
        assert before.losses + after.losses == straight.losses
        assert before.lrs + after.lrs == straight.lrs
        assert after.random == straight.random
        same_state(after.state, straight.state)
        for weight, value in straight.weights.items():
            np.testing.assert_array_equal(after.weights[weight], value, err_msg=weight)
    measured = ["step", "loss", "validation/loss", "grad_norm"]
    measured += ["samples", "tokens", "flops", "skipped"]
    histories = []
    for part in ("straight", "parts"):
        lines = [{k: e[k] for k in measured if k in e} for e in metrics(tmp_path / part)]
        # A validation that was put off by the stop comes after that step's line.
        histories.append(
            sorted((x for x in lines if len(x) > 1), key=lambda x: (x["step"], len(x)))
        )
        assert status(tmp_path / part)["state"] == "finished"
    assert histories[0] == histories[1]


def test_a_stop_in_an_evaluation(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    """It is left at once on all ranks, and made up for after the restart."""
    where = f"training.run_dir={tmp_path / 'run'}"
    one_by_one = "training.eval_micro_batch_size=1"
    run_on(pools(2), tiny, where, one_by_one, stop_after=IN_EVALUATION)
    assert status(tmp_path / "run")["checkpoint"] == "checkpoints/step-3"
    assert not [e for e in metrics(tmp_path / "run") if "validation/loss" in e]
    run_on(pools(2), tiny, where, one_by_one)
    assert [e["step"] for e in metrics(tmp_path / "run") if "validation/loss" in e] == [3, 6]


OTHERS = {
    4: ["sdp.coverage=1/4", "zero_optimization.stage=1", "gradient_accumulation_steps=1"],
    1: ["sdp.coverage=1", "zero_optimization.stage=0", "bf16.enabled=true"],
    2: ["sdp.masking=backward", "sdp.strategy=random", "train_micro_batch_size_per_gpu=1",
        "gradient_accumulation_steps=auto"],
}  # fmt: skip


def test_the_same_folder_goes_on_elsewhere(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    """Other ranks, plan, masks, stage, dtype, micro-batch: the same bits, the next samples."""
    where = f"training.run_dir={tmp_path / 'run'}"
    before = run_on(pools(2), tiny, where, stop_after=2)
    like = {n: torch.from_numpy(v) for n, v in whole([o.weights for o in before]).items()}
    expected = {
        kind: assembled([o.state[kind] for o in before], like)[0] for kind in before[0].state
    }
    run = load_config(tiny.config)
    dataset = load_inputs(run, 2).train
    for steps_before, (world_size, changes) in enumerate(OTHERS.items(), 2):
        options = {"stop_after": 1, "keep_loaded": True}
        after = run_on(pools(world_size), tiny, where, *changes, **options)
        found = {k: assembled([o.state[k] for o in after], like)[0] for k in after[0].state}
        if steps_before == 2:  # what was trained in between is other state
            assert found.keys() == expected.keys()
            for kind, tensors in expected.items():
                for name, value in tensors.items():
                    np.testing.assert_array_equal(found[kind][name], value, err_msg=name)
        order = samples_at(run.training.seed, steps_before * 8, 8, len(dataset))
        read = torch.cat([outcome.batches[0] for outcome in after]).numpy()
        np.testing.assert_array_equal(read, dataset.batch(order))
    assert [e["step"] for e in metrics(tmp_path / "run") if "loss" in e] == [1, 2, 3, 4, 5]


def test_what_changes_is_said(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where = f"training.run_dir={tmp_path / 'run'}"
    run_on(pools(2), tiny, where, stop_after=2)
    changes = ["train_batch_size=16", "training.seed=5", "optimizer.params.lr=1e-4"]
    first, second = run_on(pools(2), tiny, where, *changes, stop_after=1)
    said = first.said
    assert second.said == ""
    assert "warning: train_batch_size = 8 before, 16 now: the data go on" in said
    assert "warning: training.seed = 1234 before, 5 now: the order of samples changes" in said
    assert "warning: optimizer.params.lr = 0.003 before, 0.0001 now" in said
    assert said.count("warning: ") == 3
    assert f"continuing from {tmp_path / 'run'}/checkpoints/step-2: step 2 of {STEPS}, 16" in said
    entry = [e for e in metrics(tmp_path / "run") if "loss" in e][-1]
    assert (entry["step"], entry["samples"]) == (3, 16 + 16)
    data = load_inputs(load_config(tiny.config), 2).train
    read = torch.cat([first.batches[0], second.batches[0]]).numpy()
    np.testing.assert_array_equal(read, data.read(5, 16, 16))


def test_phases_follow_a_new_budget(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    """Raised from 6 to 12 steps after 3, it goes back from the second phase to the first."""
    where = f"training.run_dir={tmp_path / 'run'}"
    phases = 'sdp.schedule=[{"until": 0.5}, {"until": 1}]'
    [before, _] = run_on(pools(2), tiny, where, phases, stop_after=3)
    assert "phase 1 of 2, steps 1 to 3: coverage 1/2, forward masking" in before.said
    [after, _] = run_on(pools(2), tiny, where, phases, "training.steps=12", stop_after=4)
    assert "they end at steps 6, 12 now; the run goes on in phase 1 of 2, it was in" in after.said
    announced = [line for line in after.said.splitlines() if " of 2, steps " in line]
    assert [line.split(":")[0] for line in announced] == [
        "phase 1 of 2, steps 1 to 6",
        "phase 2 of 2, steps 7 to 12",
    ]
    logged = [(e["step"], e["phase"]) for e in metrics(tmp_path / "run") if "loss" in e]
    assert logged == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 2)]


# -- where it starts ------------------------------------------------------------------------------


def errors(pool: Pool, tiny: Tiny, *overrides: str, **options: Any) -> list[str]:
    outcomes = pool.run(job, str(tiny.config), list(overrides), **options)
    return [outcome.error for outcome in outcomes]


def test_resume_none_and_paths(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    here, there = f"training.run_dir={first}", f"training.run_dir={other}"
    run_on(pools(2), tiny, here, "training.save_interval=1", "training.keep_last=9")
    # The end of a run is not the start of another one by accident.
    for error in errors(pools(2), tiny, here, resume="none"):
        assert f'training.run_dir = "{first}": holds a run already; choose another' in error
    [outcome, _] = run_on(pools(2), tiny, here)
    assert "finished already: raise the budget" in outcome.said
    assert outcome.batches == []
    # A checkpoint by its name, then the folder it was continued in.
    step_4 = str(first / "checkpoints" / "step-4")
    [outcome, _] = run_on(pools(2), tiny, there, resume=step_4, stop_after=1)
    assert f"continuing from {step_4}: step 4" in outcome.said
    assert "the same command without --resume goes on from here" in outcome.said
    assert status(other)["checkpoint"] == "checkpoints/step-5"
    assert status(other)["began_from"] == str(Path(step_4).resolve())
    for error in errors(pools(2), tiny, there, resume=step_4):
        assert "holds a run already" in error
        assert "without --resume it is continued" in error
    [outcome, _] = run_on(pools(2), tiny, there)
    assert len(outcome.batches) == 1
    # Back to an earlier one of the same folder: what came after it is out of the way.
    step_2 = str(first / "checkpoints" / "step-2")
    [outcome, _] = run_on(pools(2), tiny, here, resume=step_2, stop_after=1)
    assert "metrics.jsonl: " in outcome.said
    assert [e["step"] for e in metrics(first) if "loss" in e] == [1, 2, 3]
    names = {path.name for path in (first / "checkpoints").iterdir()}
    aside = {f"step-{n}.set-aside" for n in (3, 4, 5, 6)}
    assert names == {"step-2", "step-3", "latest"} | aside
    for name in ("fresh", "other"):
        where = f"training.run_dir={tmp_path / name}"
        for error in errors(pools(2), tiny, where, resume=str(tmp_path / "nowhere")):
            assert f"--resume {tmp_path / 'nowhere'}: no checkpoint there" in error


def job_with_an_older_view(config: str, overrides: list[str]) -> Outcome:
    """Run on a rank: a job whose last rank sees no status yet."""
    read = session.read_status
    if dist.get_rank() == dist.get_world_size() - 1:
        session.read_status = lambda _: {}
    try:
        return job(config, overrides)
    finally:
        session.read_status = read


def test_all_ranks_agree_that_a_run_has_finished(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where = f"training.run_dir={tmp_path / 'run'}"
    run_on(pools(2), tiny, where)
    outcomes = pools(2).run(job_with_an_older_view, str(tiny.config), [where])
    assert "finished already: raise the budget" in outcomes[0].said
    for outcome in outcomes:
        assert outcome.error == ""
        assert outcome.batches == []
    assert status(tmp_path / "run")["state"] == "finished"


def test_another_model_is_an_error(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where = f"training.run_dir={tmp_path / 'run'}"
    run_on(pools(2), tiny, where, stop_after=1)
    before = (tmp_path / "run" / "config.json").read_bytes()
    content = json.loads(tiny.model.read_text())
    # The same shapes, but another function of them.
    (tmp_path / "other.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-3}))
    for error in errors(pools(2), tiny, where, f"model.config={tmp_path / 'other.json'}"):
        assert "the model has rms_norm_eps = 1e-06 there and 0.001 here" in error
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_without_a_checkpoint_starts_again(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where = f"training.run_dir={tmp_path / 'run'}"
    never = ["training.save_interval=0"]
    run_on(pools(2), tiny, where, *never, stop_after=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_on(pools(2), tiny, where, *never)
    assert [e["step"] for e in metrics(tmp_path / "run") if "loss" in e] == [*range(1, STEPS + 1)]
    assert not (tmp_path / "run" / "checkpoints").exists()
    for error in errors(pools(2), tiny, where, *never):  # it has finished
        assert "holds a run already" in error


def test_a_run_that_saved_nothing_starts_again_where_it_was_begun(
    tiny: Tiny, pools: Pools, tmp_path: Path
) -> None:
    """And not from new weights, which would look like a run that goes on."""
    run_on(pools(2), tiny, f"training.run_dir={tmp_path / 'base'}", stop_after=2)
    fork, where = tmp_path / "fork", f"training.run_dir={tmp_path / 'fork'}"
    for resume in ("auto", str(tmp_path / "base")):
        run_on(pools(2), tiny, where, resume=str(tmp_path / "base"), stop_after=1)
        shutil.rmtree(fork / "checkpoints")
        [outcome, _] = run_on(pools(2), tiny, where, resume=resume, stop_after=1)
        base = (tmp_path / "base" / "checkpoints" / "step-2").resolve()
        assert f"continuing from {base}: step 2 of" in outcome.said
        shutil.rmtree(fork)
    # What the folder has of another run is not the history of this one.
    run_on(pools(2), tiny, where, "training.save_interval=0", stop_after=2)
    shutil.rmtree(fork / "checkpoints")
    assert {entry["step"] for entry in metrics(fork)} == {1, 2}
    run_on(pools(2), tiny, where, resume=str(tmp_path / "base"), stop_after=1)
    assert {entry["step"] for entry in metrics(fork)} == {3}
    run_on(pools(2), tiny, where, stop_after=1)
    assert status(fork)["began_from"] == str(base)
    shutil.rmtree(fork / "checkpoints")
    shutil.rmtree(tmp_path / "base")
    for error in errors(pools(2), tiny, where):
        assert f'training.run_dir = "{fork}": its run was begun from {base}, which is not' in error


def test_a_run_that_cannot_begin_says_so(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", [f"training.run_dir={tmp_path / 'run'}"]
    options.append("training.save_interval=0")
    (folder / "plan.json").mkdir(parents=True)  # in the way of the file
    for error in errors(pools(2), tiny, *options):
        assert f'training.run_dir = "{folder}": cannot write: ' in error
    entry = status(folder)
    assert (entry["state"], entry["step"]) == ("failed", 0)
    assert 'step 0: ConfigError: rank 0: training.run_dir = "' in entry["reason"]
    (folder / "plan.json").rmdir()
    run_on(pools(2), tiny, *options, stop_after=1)
    assert status(folder)["state"] == "preempted"


# -- what is damaged ------------------------------------------------------------------------------


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def _turn_a_shape(path: Path) -> None:
    manifest = json.loads(path.read_text())
    shapes = manifest["parameters"]
    name = next(name for name, shape in shapes.items() if len(shape) > 1)
    shapes[name].reverse()
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda folder: _flip(folder / "rank-00001.safetensors", -999),
    "truncated shard": lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"x" * 50),
    "missing shard": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "flipped bit of the state": lambda folder: _flip(folder / "state.json", 30),
    "flipped bit of the manifest": lambda folder: _flip(folder / "manifest.json", 200),
    "another shape in the manifest": lambda folder: _turn_a_shape(folder / "manifest.json"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


def test_a_damaged_checkpoint_is_skipped(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    interval = "training.save_interval=2"
    run_on(pools(2), tiny, f"training.run_dir={sound}", interval, stop_after=4)
    for number, damage in enumerate(DAMAGES.values()):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        checkpoints = folder / "checkpoints"
        damage(checkpoints / "step-4")
        (checkpoints / ".step-6.partial").mkdir()
        (checkpoints / ".latest.99.partial").touch()
        where = f"training.run_dir={folder}"
        [outcome, _] = run_on(pools(2), tiny, where, interval, stop_after=1)
        assert "skipped step-4: rank " in outcome.said
        assert f"continuing from {checkpoints / 'step-2'}: step 2" in outcome.said
        assert {p.name for p in checkpoints.iterdir()} == {
            "step-2", "step-3", "step-4.set-aside", "latest"
        }  # fmt: skip
        assert (checkpoints / "latest").read_text() == "step-3"
        for name in ("step-2", "step-3"):
            _flip(checkpoints / name / "rank-00000.safetensors", -999)
        for error in errors(pools(2), tiny, where, interval):
            assert f"{checkpoints}: no checkpoint is whole: skipped step-3: " in error
            assert "skipped step-2: " in error


def test_a_save_that_fails(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    """The run goes on, says so, leaves nothing half written, and saves again when it can."""
    where, often = f"training.run_dir={tmp_path / 'run'}", "training.save_interval=1"
    [outcome, _] = run_on(pools(2), tiny, where, often, full_disk=(3, 5))
    assert outcome.said.count("warning: step 3: no checkpoint: rank 1: cannot read or write: ") == 1
    assert "File too large" in outcome.said
    entry = status(tmp_path / "run")
    assert (entry["state"], entry["checkpoint"]) == ("finished", "checkpoints/step-6")
    assert entry["warning"].startswith("step 4: rank 1: cannot read or write")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-5", "step-6", "latest"}


def test_a_stop_that_cannot_save_is_an_error(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where, often = f"training.run_dir={tmp_path / 'run'}", "training.save_interval=2"
    options = {"full_disk": (3, 9), "stop_after": 3}
    for error in errors(pools(2), tiny, where, often, **options):
        assert error.startswith(
            "step 3: asked to stop, but cannot save: rank 1: cannot read or write: "
        )
    entry = status(tmp_path / "run")
    assert entry["state"] == "failed"
    assert "asked to stop, but cannot save" in entry["reason"]
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-2", "latest"}
    [outcome, _] = run_on(pools(2), tiny, where, often)
    assert "checkpoints/step-2: step 2" in outcome.said
    assert status(tmp_path / "run")["state"] == "finished"


# -- in the background ----------------------------------------------------------------------------

ASYNC = ["training.async_save=true", "training.save_interval=1", "training.keep_last=9"]


def shards(folder: Path) -> dict[str, dict[str, str]]:
    """The SHA-256 of every rank's file in every checkpoint."""
    found = {}
    for path in folder.glob("checkpoints/step-*"):
        files = json.loads((path / "manifest.json").read_text())["files"]
        found[path.name] = {n: f["sha256"] for n, f in files.items() if n.startswith("rank")}
    return found


@pytest.mark.parametrize("precision", ["bf16.enabled=true", "bf16.enabled=false"])
def test_saving_in_the_background_saves_the_same(
    precision: str, tiny: Tiny, pools: Pools, tmp_path: Path
) -> None:
    """Though training goes on meanwhile; and a save waits for the one before."""
    folders = {name: tmp_path / name for name in ("plain", "background")}
    options = [precision, *ASYNC[1:]]
    plain = run_on(pools(2), tiny, f"training.run_dir={folders['plain']}", *options)
    options = [precision, *ASYNC]
    where = f"training.run_dir={folders['background']}"
    outcomes = run_on(pools(2), tiny, where, *options, slow_disk=0.2)
    assert shards(folders["background"]) == shards(folders["plain"])
    assert len(shards(folders["plain"])) == STEPS
    for mine, other in zip(outcomes, plain, strict=True):
        assert mine.losses == other.losses
    said = outcomes[0].said
    assert "until the checkpoint of step 1 was written" in said
    assert "; their copy takes up to 0.00 GiB of a rank's host memory" in said
    entries = [e for e in metrics(folders["background"]) if "checkpoint/seconds" in e]
    assert [entry["step"] for entry in entries] == [*range(1, STEPS + 1)]
    for entry in entries[:-1]:  # the last one is waited for
        assert entry["checkpoint/stalled_seconds"] < entry["checkpoint/seconds"]


def test_a_stop_waits_for_the_background(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where, options = f"training.run_dir={tmp_path / 'run'}", [*ASYNC[:1], "training.keep_last=9"]
    options.append("training.save_interval=2")
    run_on(pools(2), tiny, where, *options, stop_after=3, slow_disk=0.3)
    assert set(shards(tmp_path / "run")) == {"step-2", "step-3"}
    assert status(tmp_path / "run")["checkpoint"] == "checkpoints/step-3"


def test_a_background_save_that_fails(tiny: Tiny, pools: Pools, tmp_path: Path) -> None:
    where = f"training.run_dir={tmp_path / 'run'}"
    [outcome, _] = run_on(pools(2), tiny, where, *ASYNC, full_disk=(3, 5), slow_disk=0.05)
    assert "warning: step 3: no checkpoint: rank 1: cannot read or write: " in outcome.said
    # Whether those next to it are written in time to fail depends on the machine.
    assert {"step-1", "step-5", "step-6"} <= set(shards(tmp_path / "run"))
    assert "step-3" not in shards(tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "finished"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
