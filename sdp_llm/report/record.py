"""What the folder of a run says, read with nothing but JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdp_llm.errors import ConfigError

# The key that tells which kind of line it is.
TRAINING, VALIDATION = "loss", "validation/loss"
MEMORY, GRADIENTS = "memory/rank", "gradients/cosine"
_KINDS = (TRAINING, VALIDATION, MEMORY, GRADIENTS)


@dataclass(frozen=True)
class Record:
    """One run: the objects of its JSON files ({} where there is none) and its metrics by kind.

    ``training``, ``validation``, ``memory`` and ``gradients`` are lines of ``metrics.jsonl`` in the
    order of their steps, each step once.
    """

    name: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    prediction: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    training: tuple[Mapping[str, Any], ...]
    validation: tuple[Mapping[str, Any], ...]
    memory: tuple[Mapping[str, Any], ...]
    gradients: tuple[Mapping[str, Any], ...]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((int(e["step"]) for e in (*self.training, *self.validation)), default=0)

    @property
    def total_steps(self) -> int | None:
        """The budget, as the last line knew it."""
        return int(self.training[-1]["total_steps"]) if self.training else None


def read_runs(folders: Iterable[Path]) -> list[Record]:
    """Read several runs, whose names are as much of their paths as tells them apart.

    :raises ConfigError: a folder is no run, or is named twice.
    """
    paths = list(folders)
    names = _names([path.resolve() for path in paths])
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(folder: Path, name: str) -> Record:
    """Read one run, also while it goes on.

    :raises ConfigError: when the folder has no metrics.
    """
    path = folder / "metrics.jsonl"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = _current(_objects(file))
    except OSError as error:
        raise ConfigError(
            f"{folder}: no run: {error.strerror} ({path.name}); name a training.run_dir"
        ) from None
    kinds = {kind: tuple(line for line in lines if kind in line) for kind in _KINDS}
    return Record(
        name,
        config=_json(folder / "config.json"),
        plan=_json(folder / "plan.json"),
        prediction=_json(folder / "prediction.json"),
        environment=_json(folder / "environment.json"),
        status=_json(folder / "status.json"),
        training=kinds[TRAINING],
        validation=kinds[VALIDATION],
        memory=kinds[MEMORY],
        gradients=kinds[GRADIENTS],
    )


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are whole: the last one may be under way, or cut off by a crash."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry


def _current(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what was done again: a step that comes a second time takes back all after it."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        kind, step = _kind(entry), entry["step"]
        # Other lines are of saves in the background, which end in a later step than their own.
        if kind is None:
            continue
        while kept and kept[-1]["step"] > step:
            kept.pop()
        at = len(kept)
        while at and kept[at - 1]["step"] == step:
            at -= 1
            if _kind(kept[at]) == kind:
                del kept[at]
        kept.append(entry)
    return kept


def _kind(entry: Mapping[str, Any]) -> str | None:
    return next((kind for kind in _KINDS if kind in entry), None)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed for names that differ."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{next(p for p in paths if paths.count(p) > 1)}: named twice; name it once")
