"""Whether the stored ranges of a checkpoint are every parameter exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from sdp_llm.sharding.unit import MASTER

RNG = "rng"
CUDA_RNG = "cuda_rng"


@dataclass(frozen=True)
class StoredRange:
    """Where elements ``start`` to ``stop`` of a flattened tensor are stored."""

    start: int
    stop: int
    file: str
    key: str


Ranges = dict[tuple[str, str], list[StoredRange]]


def tensor_key(kind: str, name: str, start: int, stop: int) -> str:
    """The key of elements ``start`` to ``stop`` of the flattened tensor ``name``.

    :param kind: ``master`` or the name of an optimizer state tensor, such as ``exp_avg``.
    """
    return f"{kind}|{name}|{start}|{stop}"


def parse_key(key: str) -> tuple[str, str, int, int]:
    """The parts of a :func:`tensor_key`."""
    kind, name, start, stop = key.split("|")
    return kind, name, int(start), int(stop)


def stored_ranges(keys: Iterable[tuple[str, str]]) -> Ranges:
    """The ranges of each tensor, ascending, by kind and global name.

    :param keys: pairs of a file's name and a :func:`tensor_key` in it.
    """
    ranges: Ranges = {}
    for file, key in keys:
        kind, name, start, stop = parse_key(key)
        ranges.setdefault((kind, name), []).append(StoredRange(start, stop, file, key))
    for parts in ranges.values():
        parts.sort(key=lambda part: (part.start, part.stop, part.file))
    return ranges


def coverage_error(ranges: Ranges, parameters: Mapping[str, Sequence[int]]) -> str | None:
    """What of the parameters is missing or stored twice; None where all is there once.

    The masters must cover every parameter; each kind of optimizer state either too, or it does
    not exist (before the first step).

    :param parameters: the shape of every parameter of the whole model, by global name.
    """
    kinds = {MASTER} | {kind for kind, _ in ranges} - {RNG, CUDA_RNG}
    problems = [
        f"{kind} of {name}: not a parameter of the model"
        for kind, name in ranges
        if kind in kinds and name not in parameters
    ]
    for kind in sorted(kinds, key=lambda kind: (kind != MASTER, kind)):
        for name, shape in parameters.items():
            for problem in _gaps(ranges.get((kind, name), []), prod(shape)):
                problems.append(f"{kind} of {name}: {problem}")
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more of this kind)" if len(problems) > 1 else ""
    return problems[0] + more


def _gaps(parts: Sequence[StoredRange], numel: int) -> list[str]:
    problems = []
    end = 0
    for part in parts:
        if part.start > end:
            problems.append(f"elements {end} to {part.start} of {numel} are missing")
        elif part.start < end:
            upto = min(end, part.stop)
            problems.append(f"elements {part.start} to {upto} are stored twice ({part.file})")
        end = max(end, part.stop)
    if end < numel:
        problems.append(f"elements {end} to {numel} of {numel} are missing")
    elif end > numel:
        problems.append(f"stored up to element {end}, but it has {numel}")
    return problems
