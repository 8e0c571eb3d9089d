"""Whether all ranks were started with the same things, told before any of them can hang."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

import sdp_llm
from sdp_llm.config import RunConfig, to_dict
from sdp_llm.errors import ConfigError
from sdp_llm.processes import ProcessId, this_process
from sdp_llm.ranks import say_ranks
from sdp_llm.training.environment import device_type
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.resume import flat
from sdp_llm.versions import versions

# What a value may take of the line that tells a difference.
_MOST_SHOWN = 80

Facts = Mapping[str, Any]


def facts_of(run: RunConfig, inputs: Inputs, resume: str, world_size: int) -> Facts:
    """What must be the same on every rank, by what a person calls it; JSON only."""
    found: dict[str, Any] = {"world size": world_size}
    found |= {f"version of {name}": version for name, version in versions().items()}
    found["source of sdp_llm (SHA-256)"] = source_hash()
    found["device"] = device_type()
    found |= flat(to_dict(run))
    found["--resume"] = resume
    model = json.loads(json.dumps(inputs.model.to_dict(), default=str))
    assert run.model is not None
    found |= flat(model, f"{run.model.config}: ")
    found["plan (SHA-256)"] = hashlib.sha256(repr(inputs.schedule).encode()).hexdigest()[:16]
    found |= {f"data of {prefix}": text for prefix, text in inputs.fingerprints.items()}
    return found


@cache
def source_hash() -> str:
    """Of the Python files of this package, which may be changed without a version."""
    folder = Path(sdp_llm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def first_difference(facts: Sequence[Facts]) -> str | None:
    """One line on the first fact that is not the same on all ranks; None where all agree.

    :param facts: by rank, in one order of importance.
    """
    names = dict.fromkeys(name for rank in facts for name in rank)
    for name in names:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, found in enumerate(facts):
            value = json.dumps(found[name]) if name in found else "absent"
            ranks_by_value.setdefault(value, []).append(rank)
        if len(ranks_by_value) > 1:
            # The few that differ come first.
            parts = sorted(ranks_by_value.items(), key=lambda item: (len(item[1]), item[1]))
            values = _around_difference([value for value, _ in parts[:3]])
            shown = [
                f"{value} on {say_ranks(ranks)}"
                for value, (_, ranks) in zip(values, parts, strict=False)
            ]
            more = [f"{len(parts) - 3} other values"] if len(parts) > 3 else []
            return (
                f"the ranks differ in {name}: {', '.join(shown + more)}; start every rank with the "
                "same files, packages and arguments"
            )
    return None


def agree_on_start(
    store: dist.Store | None, rank: int, world_size: int, facts: Facts, timeout: timedelta
) -> list[ProcessId]:
    """Compare the ranks' facts, without a collective: ranks that differ could hang in one.

    Every rank puts its own into the store; rank 0 compares, and puts there what all of them say.

    :param store: None: this rank is alone.
    :param timeout: how long to wait for ranks that have not come.
    :returns: the process of each rank.
    :raises ConfigError: on every rank with the same line: where they differ, or which did not come.
    """
    if store is None:
        return [this_process()]
    entry = {"facts": facts, "process": asdict(this_process())}
    store.set(f"start/{rank}", json.dumps(entry))
    if rank == 0:
        store.set("started", json.dumps(_compare(store, world_size, timeout)))
    try:
        # Rank 0 has come, and says within the timeout who has not.
        store.wait(["started"], timeout * 2)
        verdict = json.loads(store.get("started"))
    except dist.DistError as error:
        raise ConfigError(
            "rank 0 came, but did not compare the ranks within "
            f"{2 * timeout.total_seconds():.0f} s; look what became of it"
        ) from error
    if verdict["problem"] is not None:
        raise ConfigError(verdict["problem"])
    return [ProcessId(**process) for process in verdict["processes"]]


def _compare(store: dist.Store, world_size: int, timeout: timedelta) -> dict[str, Any]:
    keys = [f"start/{rank}" for rank in range(world_size)]
    end = time.monotonic() + timeout.total_seconds()
    # Not store.wait, which says on stderr, at length, that it waited in vain.
    while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > end:
            return {
                "problem": f"{say_ranks(missing)} of {world_size} did not come within "
                f"{timeout.total_seconds():.0f} s (three times training.step_timeout); look what "
                "became of them and whether each machine starts its ranks"
            }
        time.sleep(0.05)
    entries = [json.loads(store.get(key)) for key in keys]
    return {
        "problem": first_difference([entry["facts"] for entry in entries]),
        "processes": [entry["process"] for entry in entries],
    }


def _around_difference(texts: Sequence[str]) -> list[str]:
    """The texts, long ones cut to a part that differs."""
    columns = enumerate(zip(*texts, strict=False))
    first = next((i for i, letters in columns if len({*letters}) > 1), min(map(len, texts)))
    start = max(0, first - _MOST_SHOWN // 2) if max(map(len, texts)) > _MOST_SHOWN else 0
    return [
        ("…" if start else "")
        + text[start : start + _MOST_SHOWN]
        + ("…" if len(text) > start + _MOST_SHOWN else "")
        for text in texts
    ]
