"""Who keeps a run from going on: arithmetic on what the ranks said last, without processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdp_llm.activity import START
from sdp_llm.processes import GONE, RUNNING, STOPPED, ProcessId
from sdp_llm.ranks import say_ranks


@dataclass(frozen=True)
class RankState:
    """What one rank said last.

    ``quiet`` is how long it had been without a beat then, in seconds, ``is_overdue`` whether that
    is too long; ``sent`` counts what it has said; ``waits_for`` is None where it works on its own,
    ``owners`` None where it waits for all. ``process`` is what the system says about it, as far as
    someone on its machine has looked.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    quiet: float
    is_overdue: bool = False
    sent: int = 0
    waits_for: str | None = None
    owners: tuple[int, ...] | None = None
    process: str = RUNNING
    is_silent: bool = False


def rank_state(rank: int, process: ProcessId, entry: Mapping[str, Any] | None) -> RankState:
    """What a rank published, as it comes from JSON; None: nothing yet."""
    if entry is None:
        return RankState(rank, process.host, process.pid, START, 0, 0.0)
    return RankState(**{**entry, "owners": entry["owners"] and tuple(entry["owners"])})


def with_silence(before: RankState, now: RankState) -> RankState:
    """``now``, silent where the rank has said nothing since ``before``.

    A count, not a time: the clocks of two machines differ.
    """
    return replace(now, is_silent=before.sent == now.sent)


def is_alive(state: RankState) -> bool:
    """Whether a rank can still act."""
    return not state.is_silent and state.process not in (STOPPED, GONE)


def culprits(states: Sequence[RankState]) -> list[int]:
    """The ranks that the others wait for; none where every one waits for another.

    Those that cannot act; else those that work on their own while others wait; else those that are
    behind in steps.
    """
    dead = [s.rank for s in states if not is_alive(s)]
    if dead:
        return dead
    busy = [s.rank for s in states if s.waits_for is None]
    if busy:
        return busy
    lowest = min(s.step for s in states)
    behind = [s.rank for s in states if s.step == lowest]
    return behind if len(behind) < len(states) else []


def accusation(states: Sequence[RankState]) -> str:
    """One line that names the culprits and what each was doing."""
    named = culprits(states)
    if not named:
        return "every rank waits for another: the ranks' collectives do not match, see the table"
    by_rank = {state.rank: state for state in states}
    parts = [describe(by_rank[rank]) for rank in named[:4]]
    if named[4:]:
        parts.append(f"{len(named) - 4} more ranks, see the table")
    return "; ".join(parts)


def describe(state: RankState) -> str:
    """Which rank, where, and what it was doing."""
    where = f"rank {state.rank} (pid {state.pid} on {state.host})"
    if state.process in (STOPPED, GONE):
        how = f"is {state.process}, "
    else:
        how = "does not answer, " if state.is_silent else ""
    return f"{where} {how}last in {state.phase} after step {state.step}{_wait(state)}"


def table(states: Sequence[RankState]) -> str:
    """A line per rank, the culprits marked."""
    named = set(culprits(states))
    rows = [("", "rank", "host", "pid", "process", "step", "phase", "quiet", "waits for")]
    for s in states:
        process = "silent" if s.is_silent and s.process not in (STOPPED, GONE) else s.process
        waits = _wait(s).removeprefix(", waiting for ") or "-"
        mark = ">" if s.rank in named else ""
        cells = (mark, str(s.rank), s.host, str(s.pid), process, str(s.step), s.phase)
        rows.append((*cells, f"{s.quiet:.0f} s", waits))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _wait(state: RankState) -> str:
    if state.waits_for is None:
        return ""
    owners = "all ranks" if state.owners is None else say_ranks(state.owners)
    return f", waiting for {state.waits_for} of {owners}"
