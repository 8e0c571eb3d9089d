"""The checkpoints of one run folder: which there are, which stay, and whether they will fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdp_llm.checkpoint.save import LATEST
from sdp_llm.checkpoint.shared_folder import REPLACED, put_back
from sdp_llm.config import RunConfig
from sdp_llm.errors import ConfigError
from sdp_llm.files import replace_text, sync
from sdp_llm.plan.size import FP32_BYTES, setup_from_config
from sdp_llm.training.environment import device_type


def tag_of(step: int) -> str:
    """The name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step}"


def steps_in(folder: Path) -> list[int]:
    """The steps of which ``folder`` has a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def steps_to_remove(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """Which of these checkpoints are neither among the newest nor kept for good."""
    ascending = sorted(steps)
    old = ascending[: max(0, len(ascending) - keep_last)]
    return [step for step in old if not keep_every or step % keep_every]


def remove(folder: Path, steps: Iterable[int]) -> None:
    """Remove checkpoints, each of which disappears at once under its final name."""
    for step in steps:
        doomed = folder / f".{tag_of(step)}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        (folder / tag_of(step)).rename(doomed)
        sync(folder)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path, after: int) -> list[str]:
    """Rename the checkpoints after a step, from which the run goes another way now.

    The latest is the newest one that is left.

    :returns: their new names.
    """
    steps = steps_in(folder)
    left = [step for step in steps if step <= after]
    if left and left != steps:
        replace_text(folder / LATEST, tag_of(left[-1]))
    elif not left:
        (folder / LATEST).unlink(missing_ok=True)
    names = []
    for step in steps[len(left) :]:
        aside = _free_name(folder / f"{tag_of(step)}.set-aside")
        (folder / tag_of(step)).rename(aside)
        names.append(aside.name)
    return names


def _free_name(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3``, … that is not there."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def clear_rubbish(folder: Path) -> None:
    """Remove what a killed process left half written or half removed.

    A folder that it had not replaced yet gets its name back.
    """
    for path in folder.glob(f".*{REPLACED}"):
        put_back(folder / path.stem[1:])
    for path in folder.glob(".*"):
        if path.suffix in (".partial", ".removed", REPLACED):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def checkpoint_bytes(run: RunConfig, numel: int) -> int:
    """About how large a checkpoint of a model of ``numel`` parameters is: masters and moments."""
    return numel * (FP32_BYTES + setup_from_config(run, 1, "gloo").moment_bytes)


def largest_share(units: Iterable[tuple[Sequence[int], int]], world_size: int) -> int:
    """The most elements that one rank writes: of each of its units, as many as its co-owners.

    :param units: the owner set and the size of each.
    """
    shares = [0] * world_size
    for owners, numel in units:
        for rank in owners:
            shares[rank] += -(-numel // len(owners))
    return max(shares)


def checkpoint_line(run: RunConfig, numel: int, share: int) -> str:
    """When checkpoints are written and what they take, for the summary of a run.

    :param share: :func:`largest_share`.
    """
    training = run.training
    interval = f"every {training.save_interval:,} steps" if training.save_interval else "at a stop"
    line = f"checkpoints {interval}, {checkpoint_bytes(run, numel) / 1e9:,.2f} GB each"
    if training.async_save:
        memory = checkpoint_bytes(run, share) / 2**30
        if device_type() == "cuda":
            memory *= 2  # torch rounds pinned memory up to powers of two
        line += f"; their copy takes up to {memory:,.2f} GiB of a rank's host memory"
    return line


def check_space(run: RunConfig, folder: Path, size: int, step: int, total_steps: int) -> None:
    """Check that the checkpoints of the rest of a run will fit on the disk.

    :param folder: where they go; the folder that it will be in exists.
    :param size: bytes of one checkpoint.
    :raises ConfigError: naming what is needed and what there is.
    """
    training = run.training
    there = steps_in(folder)
    if step >= total_steps:
        return
    # Without an interval one is written when the run is stopped.
    every = {*there, step + 1}
    if training.save_interval:
        every = {*there, *range(0, total_steps, training.save_interval), total_steps}
        every = {s for s in every if s > step or s in there}
    kept = every - set(steps_to_remove(every, training.keep_last, training.keep_every))
    # One that is removed goes after the next one is complete.
    count = max(0, min(len(kept) + 1, len(every)) - len(there))
    need, free = count * size, shutil.disk_usage(folder.parent).free
    if need > free:
        raise ConfigError(
            f"training.keep_last = {training.keep_last}, training.keep_every = "
            f"{training.keep_every}: {count} more checkpoints of {size / 1e9:,.1f} GB need "
            f"{need / 1e9:,.1f} GB, but {folder} has {free / 1e9:,.1f} GB free; make room, keep "
            "fewer, or take another training.run_dir"
        )
