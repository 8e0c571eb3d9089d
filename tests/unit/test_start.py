"""What the ranks compare before they start."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sdp_llm.errors import ConfigError
from sdp_llm.processes import this_process
from sdp_llm.training.corpora import fingerprint
from sdp_llm.training.start import (
    agree_on_start,
    first_difference,
    source_hash,
)

SAME = {"version of torch": "2.13", "training.seed": 1, "sdp.owner_sets": None}
FIX = "; start every rank with the same files, packages and arguments"


def test_ranks_that_agree() -> None:
    assert first_difference([SAME, dict(SAME), dict(SAME)]) is None
    assert first_difference([SAME]) is None


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            [SAME, SAME, SAME | {"training.seed": 2}],
            "the ranks differ in training.seed: 2 on rank 2, 1 on ranks 0, 1",
        ),
        (  # the first one of several, and rank 0 may be the one that is wrong
            [SAME | {"training.seed": 2, "version of torch": "2.12"}, SAME, SAME],
            'the ranks differ in version of torch: "2.12" on rank 0, "2.13" on ranks 1, 2',
        ),
        (
            [SAME, SAME, {"version of torch": "2.13", "training.seed": 1}],
            "the ranks differ in sdp.owner_sets: absent on rank 2, null on ranks 0, 1",
        ),
        (
            [SAME | {"new": True}, SAME],
            "the ranks differ in new: true on rank 0, absent on rank 1",
        ),
        (
            [{"x": i} for i in range(12)],
            "the ranks differ in x: 0 on rank 0, 1 on rank 1, 2 on rank 2, 9 other values",
        ),
        (
            [{"x": int(i == 0)} for i in range(12)],
            "the ranks differ in x: 1 on rank 0, 0 on ranks 1-11",
        ),
    ],
)
def test_the_first_difference(facts: list[dict[str, Any]], line: str) -> None:
    assert first_difference(facts) == line + FIX


def test_long_values_differ_visibly() -> None:
    values = ["x" * 200 + end for end in "ab"]
    line = first_difference([{"f": value} for value in values])
    assert line is not None
    assert 'xa" on rank 0' in line
    assert 'xb" on rank 1' in line
    assert len(line) < 400


def test_the_fingerprint_of_data(tmp_path: Path) -> None:
    for suffix, size in ((".bin", 3 << 20), (".idx", 100)):
        (tmp_path / f"a{suffix}").write_bytes(bytes(size))
    before = fingerprint(str(tmp_path / "a"))
    assert before.startswith(f"{3 << 20} + 100 bytes, SHA-256 ")
    for place in (0, (3 << 20) - 1):
        with (tmp_path / "a.bin").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert fingerprint(str(tmp_path / "a")) != before
        with (tmp_path / "a.bin").open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert fingerprint(str(tmp_path / "a")) == before


def test_the_hash_of_the_source_is_stable() -> None:
    assert source_hash() == source_hash.__wrapped__()


# -- through a store ------------------------------------------------------------------------------


def outcomes(facts: list[dict[str, Any]], world_size: int, seconds: float) -> list[Any]:
    """What each rank, a thread here, gets or raises."""
    store = dist.HashStore()
    patience = timedelta(seconds=seconds)
    found: list[Any] = [None] * len(facts)

    def rank(i: int) -> None:
        try:
            found[i] = agree_on_start(store, i, world_size, facts[i], patience)
        except ConfigError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_learn_each_others_process() -> None:
    found = outcomes([SAME, SAME, SAME], 3, 30)
    assert found == [[this_process()] * 3] * 3


def test_every_rank_says_the_same() -> None:
    found = outcomes([SAME, SAME | {"training.seed": 2}, SAME], 3, 30)
    assert found == ["the ranks differ in training.seed: 2 on rank 1, 1 on ranks 0, 2" + FIX] * 3


def test_a_rank_that_does_not_come() -> None:
    found = outcomes([SAME, SAME], 4, 0.3)
    assert len({*found}) == 1
    assert found[0].startswith("ranks 2, 3 of 4 did not come within 0 s (three times")


def test_alone() -> None:
    assert agree_on_start(None, 0, 1, SAME, timedelta(seconds=1)) == [this_process()]
