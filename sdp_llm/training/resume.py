"""Where a run begins: at its start, or from a checkpoint that was verified."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sdp_llm.agree import agree
from sdp_llm.checkpoint.load import read_state
from sdp_llm.checkpoint.save import MANIFEST
from sdp_llm.config import RunConfig, to_dict
from sdp_llm.config.deepspeed_keys import TORCH_SCHEDULERS
from sdp_llm.errors import ConfigError, DamagedCheckpoint
from sdp_llm.plan import Plan, Schedule
from sdp_llm.plan.schedule import phase_stops
from sdp_llm.subnetwork.residual import running_shares
from sdp_llm.training.backends import EngineBackend
from sdp_llm.training.budget import steps_from
from sdp_llm.training.checkpoints import steps_in, tag_of
from sdp_llm.training.corpora import weights
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.position import Position
from sdp_llm.training.status import read_status

AUTO, NONE = "auto", "none"

# Keys that change how the run goes on, by their beginning, and what to know about that. All others
# may change freely: ranks, plan, masking, ZeRO stage, micro-batches, logging.
_LOUD = {
    "training.seed": "the order of samples changes: some are read twice, some not at all",
    "data.validation": "",
    "data.tokenizer": "",
    "data.num_workers": "",
    "data.document_mask": "what a token attends to changes from here on",
    "data.": "the data change: samples are counted on, whatever they are",
    "optimizer.": "the optimizer keeps the checkpoint's",
    "scheduler": "the schedule goes on at this step of the new one",
    "bf16.": "weights are rounded anew from the fp32 masters",
    "gradient_clipping": "from here on",
    "sdp.schedule": "the run goes on in the phase of the new one",
    "sdp.residual_scale": "the weights were trained with the one before",
    "communication_data_type": "from here on",
    "training.decay_all": "from here on",
}


@dataclass(frozen=True)
class Start:
    """Where the run begins.

    ``checkpoint`` is None at step 0; ``messages`` are for a person: what was skipped and why, and
    what the config changes. ``is_own`` says whether the checkpoint is the run folder's;
    ``began_from`` names the one of another folder that the run was begun from, however long ago.
    """

    position: Position
    checkpoint: Path | None
    messages: tuple[str, ...] = ()
    is_own: bool = False
    began_from: str | None = None


def find_start(run: RunConfig, inputs: Inputs, backend: EngineBackend, resume: str) -> Start:
    """Load the newest checkpoint that is whole into the backend. Collective.

    :param resume: "auto": from the run folder, where it has one, else from what the run in it was
        begun from; "none": from step 0; or the path of a checkpoint, or of a folder that holds
        some.
    :raises ConfigError: on every rank, when there are checkpoints but none is whole, when there is
        none at a path that was given, or when it is of another model.
    """
    assert run.training.run_dir is not None
    if resume == NONE:
        return Start(Position(), None)
    is_given = resume != AUTO
    run_dir = Path(run.training.run_dir)
    folder = Path(resume) if is_given else run_dir
    # One rank looks, so that all try the same ones.
    looked = agree(lambda: _look(folder, run_dir) if backend.rank == 0 else None)[0]
    candidates, began_from = looked
    skipped: list[str] = []
    for path in candidates:
        try:
            client_state = backend.load(path)
        except DamagedCheckpoint as error:
            skipped.append(f"skipped {path.name}: {error}")
            continue
        if "trainer" not in client_state:
            raise ConfigError(
                f"{path}: written by another loop than launch/pretrain.py, it does not say which "
                "data come next; load it with engine.load_checkpoint in that loop"
            )
        try:
            position = Position(**client_state["trainer"])
        except TypeError as error:
            raise ConfigError(
                f"{path}: its position in the run cannot be read: {error}; load it with the "
                "version of sdp_llm that wrote it"
            ) from error
        messages = (*skipped, *_changes(read_state(path), run, inputs, position))
        if path.parent.resolve() == (run_dir / "checkpoints").resolve():
            return Start(position, path, messages, is_own=True, began_from=began_from)
        return Start(position, path, messages, began_from=str(path.resolve()))
    if skipped:
        raise ConfigError(
            f"{path.parent}: no checkpoint is whole: {'; '.join(skipped)}; start anew in another "
            "training.run_dir"
        )
    if is_given:
        raise ConfigError(
            f"--resume {resume}: no checkpoint there; name one, such as .../step-100, or give auto "
            "or none"
        )
    return Start(Position(), None)


def facts_to_compare(run: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What a checkpoint says of its run beside the config, for :func:`find_start`.

    ``global_batch`` is in samples; ``total_steps`` those of the schedule, not where the run ends:
    after a change of the batch that is another step, and each resume would hear of another budget.
    ``data`` has the fingerprint and the weight of every training corpus, in their order.
    """
    assert run.data is not None
    return {
        "global_batch": inputs.batch.global_batch,
        "total_steps": inputs.schedule.total_steps,
        "data": [[inputs.fingerprints[path], w] for path, w in weights(run.data).items()],
    }


def _look(folder: Path, run_dir: Path) -> tuple[list[Path], str | None]:
    """The checkpoints to try, newest first, and what the run in ``run_dir`` was begun from."""
    found, began_from = _candidates(folder), read_status(run_dir).get("began_from")
    if not isinstance(began_from, str):
        return found, None
    if found or folder != run_dir:
        return found, began_from
    # It has saved none of its own.
    if not (Path(began_from) / MANIFEST).exists():
        raise ConfigError(
            f"training.run_dir = {json.dumps(str(folder))}: its run was begun from {began_from}, "
            "which is not there any more, and has saved nothing; name a checkpoint with --resume, "
            "or begin anew with another training.run_dir"
        )
    return [Path(began_from)], began_from


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints that ``folder`` is or has, newest first."""
    if (folder / MANIFEST).exists():
        return [folder]
    for inside in (folder / "checkpoints", folder):
        steps = steps_in(inside)
        if steps:
            return [inside / tag_of(step) for step in reversed(steps)]
    return []


def _changes(
    saved: Mapping[str, Any], run: RunConfig, inputs: Inputs, position: Position
) -> Iterator[str]:
    """A line for everything that goes on in another way than it did."""
    facts, total_steps = saved["client_state"], inputs.schedule.total_steps
    world_size, now = saved["plan"]["world_size"], inputs.schedule.world_size
    if world_size != now:
        yield f"{now} ranks, {world_size} before"
    batch = inputs.batch.global_batch
    if facts["global_batch"] != batch:
        yield (
            f"warning: train_batch_size = {facts['global_batch']} before, {batch} now: the data "
            "go on with the next unseen sample, schedules count steps"
        )
    last = steps_from(run, inputs.batch, position, total_steps)
    assert run.data is not None
    per_step = batch * run.data.sequence_length
    if run.training.tokens is not None and position.tokens != position.step * per_step:
        yield (
            f"warning: training.tokens are used up at step {last:,}; phases, and a scheduler "
            f'with total_num_steps = "auto", end at step {total_steps:,}, as if a step had always '
            f"had as many tokens as now; training.tokens=null training.steps={last} ends all "
            "together"
        )
    if facts["total_steps"] != total_steps:
        yield (
            f"warning: the budget was {facts['total_steps']} steps, it is {total_steps} now; a "
            'scheduler with total_num_steps = "auto" follows it'
        )
    data_before, data_now = facts.get("data"), facts_to_compare(run, inputs)["data"]
    if data_before is not None:
        yield from _other_data(data_before, data_now)
    before, after = dict(flat(saved["config"])), dict(flat(to_dict(run)))
    for key in sorted(before.keys() | after.keys()):
        # Where a corpus lies does not matter, where it is known what it holds.
        is_told = data_before is not None and key.startswith("data.train")
        if before.get(key) != after.get(key) and not is_told:
            effect = next((text for start, text in _LOUD.items() if key.startswith(start)), "")
            if key.startswith("scheduler.") and run.scheduler is None:
                effect = "the optimizer keeps the checkpoint's learning rate"
            elif key.startswith("scheduler.params.") and _is_torchs(run):
                effect = "the schedulers of torch keep the checkpoint's"
            if key == "optimizer.params.lr" and _starts_from_lr(run):
                effect = "the scheduler goes on from the new one, a step later"
            if effect:
                yield f"warning: {key} = {before.get(key)} before, {after.get(key)} now: {effect}"
    if run.sdp.residual_scale == before.get("sdp.residual_scale") == "eval":
        yield from _other_shares(saved["plan"], *inputs.schedule.at(position.step))
    budget_before = facts["total_steps"]
    has_changed = before.get("sdp.schedule") != after.get("sdp.schedule")
    if len(inputs.schedule.phases) > 1 and (has_changed or budget_before != total_steps):
        yield _phases_line(
            run, inputs.schedule, position.step, None if has_changed else budget_before
        )


def _other_data(before: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    """A line where the training corpora, or their weights, are not those of before."""
    for number, pair in enumerate(zip_longest(before, now), 1):
        if pair[0] != pair[1]:
            was, is_now = ("none" if c is None else f"{c[0]}, weight {c[1]:g}" for c in pair)
            yield (
                f"warning: data.train: corpus {number} was {was}, it is {is_now} now: "
                f"{_LOUD['data.']}"
            )
            return


def _other_shares(saved: Mapping[str, Any], plan: Plan, masking: str) -> Iterator[str]:
    """What changes in the whole model when a block has another share of the ranks than before."""
    shares = (
        running_shares(saved["world_size"], saved["owners"], saved["masking"]),
        running_shares(plan.world_size, plan.owner_sets, masking),
    )
    differing = [(b, *pair) for b, pair in enumerate(zip(*shares, strict=True)) if len({*pair}) > 1]
    if differing:
        b, was, now = differing[0]
        yield (
            f"warning: block {b} runs on {was:.0%} of the ranks before, {now:.0%} now: with "
            'sdp.residual_scale = "eval" the whole model multiplies it by that, and jumps'
        )


def _is_torchs(run: RunConfig) -> bool:
    return run.scheduler is not None and run.scheduler.type in TORCH_SCHEDULERS


def _starts_from_lr(run: RunConfig) -> bool:
    """Whether it is DeepSpeed's scheduler that multiplies the optimizer's rate, and keeps none."""
    if run.scheduler is None or "warmup_max_lr" in run.scheduler.params:
        return False
    return run.scheduler.type in ("WarmupLR", "WarmupCosineLR")


def _phases_line(run: RunConfig, schedule: Schedule, step: int, budget_before: int | None) -> str:
    """Where the phases end now, and which one the run goes on in.

    :param budget_before: of the same phases; None: there were others.
    """
    stops = ", ".join(f"{phase.stop:,}" for phase in schedule.phases)
    line = f"phases are shares of the budget: they end at steps {stops} now"
    number, count = schedule.number_at(step), len(schedule.phases)
    line += f"; the run goes on in phase {number} of {count}"
    if budget_before is not None:
        stops_before = phase_stops(run.sdp, budget_before)
        was = next((i for i, stop in enumerate(stops_before, 1) if step < stop), count)
        if was != number:
            line += f", it was in phase {was}"
    return line


def flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, each with its path behind ``path``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
