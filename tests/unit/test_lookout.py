"""Who is named when a run does not go on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sdp_llm.processes import GONE, STOPPED, ProcessId
from sdp_llm.training.lookout import (
    RankState,
    accusation,
    culprits,
    is_alive,
    rank_state,
    table,
    with_silence,
)

WAITING = RankState(0, "left", 10, "optimizer", 7, 30.2, True, 5, "gradient norm")
REDUCING = replace(WAITING, phase="reduce", waits_for="gradient of block 3", owners=(0, 2))


def world(**others: RankState) -> list[RankState]:
    """Four ranks; rank ``r1`` is what is given as such, the others wait."""
    states = [others.get(f"r{rank}", WAITING) for rank in range(4)]
    return [replace(state, rank=rank, pid=10 + rank) for rank, state in enumerate(states)]


def busy(step: int = 7) -> RankState:
    return replace(WAITING, phase="data", waits_for=None, step=step)


@pytest.mark.parametrize(
    ("states", "named"),
    [
        (world(r2=replace(WAITING, is_silent=True)), [2]),
        (world(r2=replace(WAITING, process=STOPPED)), [2]),
        (world(r2=replace(WAITING, process=GONE), r3=busy()), [2]),
        (world(r1=busy(), r0=REDUCING), [1]),
        (world(r1=busy(), r3=busy()), [1, 3]),
        (world(r3=replace(WAITING, step=6)), [3]),
        (world(r1=REDUCING), []),
        (world(), []),
    ],
)
def test_the_culprits(states: list[RankState], named: list[int]) -> None:
    assert culprits(states) == named


def test_who_is_alive() -> None:
    assert is_alive(WAITING)
    assert not is_alive(replace(WAITING, is_silent=True))
    assert not is_alive(replace(WAITING, process=STOPPED))


def test_who_says_nothing_is_silent_whatever_its_clock_says() -> None:
    later = replace(WAITING, sent=6, quiet=1e9)
    assert not with_silence(WAITING, later).is_silent
    assert with_silence(WAITING, replace(WAITING, quiet=1e9)).is_silent


def test_the_accusation_is_one_line() -> None:
    states = world(r1=busy(), r2=replace(REDUCING, is_silent=True))
    assert accusation(states) == (
        "rank 2 (pid 12 on left) does not answer, last in reduce after step 7, waiting for "
        "gradient of block 3 of ranks 0, 2"
    )
    assert accusation(world(r1=replace(busy(), process=STOPPED))) == (
        "rank 1 (pid 11 on left) is stopped, last in data after step 7"
    )
    assert "do not match" in accusation(world())
    many = [replace(busy(), rank=rank) for rank in range(9)]
    assert accusation(many).endswith("; 5 more ranks, see the table")


def test_the_table() -> None:
    silent = replace(REDUCING, is_silent=True)
    lines = table(world(r1=replace(busy(), process=STOPPED), r3=silent)).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "rank host pid process step phase quiet waits for",
        "0 left 10 running 7 optimizer 30 s gradient norm of all ranks",
        "> 1 left 11 stopped 7 data 30 s -",
        "2 left 12 running 7 optimizer 30 s gradient norm of all ranks",
        "> 3 left 13 silent 7 reduce 30 s gradient of block 3 of ranks 0, 2",
    ]
    assert len({lines[0].index("step"), *(line.index(" 7 ") + 1 for line in lines[1:])}) == 1


def test_what_is_published_comes_back() -> None:
    process = ProcessId("machine", "left", 10, 99)
    for state in (WAITING, REDUCING, busy()):
        assert rank_state(0, process, json.loads(json.dumps(vars(state)))) == state
    assert rank_state(3, process, None).sent == 0
