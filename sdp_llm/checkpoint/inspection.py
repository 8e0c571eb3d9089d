"""What a checkpoint holds, and whether it is what was saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdp_llm.checkpoint.coverage import coverage_error, parse_key
from sdp_llm.checkpoint.find import is_plain_name
from sdp_llm.checkpoint.load import CheckpointReader
from sdp_llm.checkpoint.save import MANIFEST
from sdp_llm.checkpoint.stream import read_header
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of
from sdp_llm.plan import make_plan, render_ownership


@dataclass(frozen=True)
class Inspection:
    """A report, and what is wrong: one line each that names the file or the parameter."""

    report: str
    problems: list[str]


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read all of a checkpoint; what it holds is told where every file is what was saved.

    The checksum of every file is computed; and every parameter, and every moment of the optimizer,
    must be covered exactly once by what the files hold.
    """
    files = _listed_files(folder)
    problems = [problem for name in files for problem in _file_problems(folder / name, files[name])]
    lines = _row("checkpoint", folder)
    if not problems:
        try:
            with ExitStack() as stack:
                reader = CheckpointReader(folder, stack)
                lines += _contents(reader)
                problem = coverage_error(reader.ranges, reader.manifest["parameters"])
            if problem is not None:
                problems.append(f"{folder}: {problem}; take another checkpoint")
        except ConfigError as error:
            problems.append(str(error))
    for name, entry in files.items():
        lines += _row("file", f"{_bytes(entry['bytes'])}  {name}")
    if not problems:
        count = len(reader.manifest["parameters"])
        what = f"{len(files)} files; {count} parameters and their moments, each exactly once"
        lines += _row("verified", what)
    return Inspection("\n".join(lines), problems)


def _contents(reader: CheckpointReader) -> list[str]:
    state = reader.state
    return [*_progress(state), _plan(state), *_sizes(reader), *_versions(state)]


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of the manifest; none where it is damaged, of which the reader tells more."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = {
            name: {"bytes": int(e["bytes"]), "sha256": e["sha256"]} for name, e in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found if all(map(is_plain_name, found)) else {}


def _file_problems(path: Path, expected: dict[str, Any]) -> Iterator[str]:
    try:
        size = path.stat().st_size
        is_same = size == expected["bytes"] and sha256_of(path) == expected["sha256"]
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}; take another checkpoint"
        return
    if size != expected["bytes"]:
        yield f"{path}: has {size} bytes, {expected['bytes']} were saved; take another checkpoint"
    elif not is_same:
        yield f"{path}: has another SHA-256 than what was saved; take another checkpoint"


def _progress(state: dict[str, Any]) -> list[str]:
    """Step, samples and tokens; a loop that is not the trainer's has no count of the last."""
    counters = state["counters"]
    trainer = state["client_state"].get("trainer")
    samples = trainer["samples"] if trainer else counters["global_samples"]
    tokens = f"{trainer['tokens']:,} tokens" if trainer else "tokens not counted by this loop"
    skipped = counters["skipped_steps"]
    step = f"{counters['global_steps']:,}" + (f" ({skipped:,} skipped)" if skipped else "")
    return _row("step", f"{step}, {samples:,} samples, {tokens}")


def _sizes(reader: CheckpointReader) -> list[str]:
    """Bytes and elements of each kind of tensor, the largest first."""
    sizes: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for name in reader.manifest["files"]:
        if not name.endswith(".safetensors"):
            continue
        for key, entry in read_header(reader.folder / name).items():
            kind, _, start, stop = parse_key(key)
            begin, end = entry["data_offsets"]
            sizes[kind] += end - begin
            elements[kind] += stop - start
    return [
        line
        for kind, size in sizes.most_common()
        for line in _row("stored", f"{_bytes(size)}  {kind} of {elements[kind]:,} elements")
    ]


def _versions(state: dict[str, Any]) -> list[str]:
    found = (f"{name} {value}" for name, value in state["versions"].items() if value)
    return _row("versions", ", ".join(found))


def _plan(state: dict[str, Any]) -> str:
    plan = state["plan"]
    owners = plan["owners"]
    return render_ownership(make_plan(plan["world_size"], len(owners), owner_sets=owners))


def _row(name: str, value: object) -> list[str]:
    return [f"{name:<12}  {value}"]


def _bytes(count: int) -> str:
    return f"{count / 1e6:12,.3f} MB"
