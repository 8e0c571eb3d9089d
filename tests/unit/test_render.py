"""The ownership matrix as text."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sdp_llm.plan import make_plan, render_ownership


def test_small_plan_exactly() -> None:
    plan = make_plan(2, 4, owner_sets=[[0, 1], [0], [1], [0]])
    assert render_ownership(plan).splitlines() == [
        "2 ranks, 4 blocks, coverage 1/2 of the free blocks "
        "(█ owned, · not owned, P pinned: owned by all)",
        "block   0123",
        "rank 0  P█·█  3/4 blocks (75%)",
        "rank 1  P·█·  2/4 blocks (50%)",
    ]


def test_header_reads_downwards() -> None:
    lines = render_ownership(make_plan(2, 12, owners_per_block=1)).splitlines()
    assert lines[1] == "block   0         1".replace("0", " ")
    assert lines[2] == "        012345678901"


def test_many_blocks_are_cut_into_panels() -> None:
    plan = make_plan(2, 130, owners_per_block=1)
    lines = render_ownership(plan).splitlines()
    assert max(len(line) for line in lines) <= 110
    rows = [line.split()[2] for line in lines if line.startswith("rank 0")]
    assert [len(row) for row in rows] == [64, 64, 2]
    joined = "".join(rows)
    assert [b for b, cell in enumerate(joined) if cell != "·"] == list(plan.owned_blocks(0))
    assert sum("blocks (" in line for line in lines if line.startswith("rank 0")) == 1
    assert lines[-5:-2] == ["block   1", "        2", "        89"]


def test_ranks_with_equal_blocks_share_a_row_beyond_16_ranks() -> None:
    sets = [list(range(20)), [*range(10), 15], [*range(10, 15), *range(16, 20)]]
    text = render_ownership(make_plan(20, 3, owner_sets=sets))
    assert text.splitlines()[2:] == [
        "rank 0-9,15       P█·  2/3 blocks (67%)",
        "rank 10-14,16-19  P·█  2/3 blocks (67%)",
    ]


def test_middle_rows_are_left_out_with_a_note() -> None:
    lines = render_ownership(make_plan(40, 40, owners_per_block=20)).splitlines()
    assert sum(line.startswith("rank ") for line in lines) == 16
    assert "... 24 more ranks ..." in lines
    assert any(line.startswith("rank 39") for line in lines)


@pytest.mark.parametrize("n", [1, 16, 17])
def test_full_coverage(n: int) -> None:
    text = render_ownership(make_plan(n, 4, coverage=Fraction(1)))
    assert "P██P  4/4 blocks (100%)" in text
    assert "·" not in text.split("\n", 1)[1]
