"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sdp_llm.plan.assignment import Plan
from sdp_llm.ranks import ranges

MAX_ROWS = 16
MAX_COLUMNS = 64
OWNED, NOT_OWNED, PINNED = "█", "·", "P"


def render_ownership(plan: Plan) -> str:
    """The ownership matrix: a row per rank, a column per block.

    The right margin gives the owned blocks and their share of all blocks, pinned ones included.
    With more than 16 ranks, those with the same blocks share a row; if more than 16 rows remain,
    the middle ones are left out with a note. With more than 64 blocks the matrix is cut into
    panels below each other, the last of which has the margin.

    :returns: Lines joined by newlines, without a newline at the end.
    """
    title = (
        f"{plan.world_size} ranks, {plan.num_blocks} blocks, coverage {plan.coverage} of the free "
        f"blocks ({OWNED} owned, {NOT_OWNED} not owned, {PINNED} pinned: owned by all)"
    )
    rows = _rows(plan)
    labels = [f"rank {','.join(ranges(ranks))}" for _, ranks in rows]
    cells = [_cells(plan, owned) for owned, _ in rows]
    margins = [
        f"{len(owned)}/{plan.num_blocks} blocks ({len(owned) / plan.num_blocks:.0%})"
        for owned, _ in rows
    ]
    hidden = sum(len(ranks) for _, ranks in rows[MAX_ROWS // 2 : -MAX_ROWS // 2])
    width = max(len(label) for label in [*labels, "block"])
    lines = [title]
    for start in range(0, plan.num_blocks, MAX_COLUMNS):
        stop = min(start + MAX_COLUMNS, plan.num_blocks)
        panel = [
            f"{label:<{width}}  {row[start:stop]}  {margin if stop == plan.num_blocks else ''}"
            for label, row, margin in zip(labels, cells, margins, strict=True)
        ]
        if len(rows) > MAX_ROWS:
            note = f"... {hidden} more ranks ..."
            panel[MAX_ROWS // 2 : -MAX_ROWS // 2] = [note]
        lines += _header(start, stop, width) + panel
    return "\n".join(line.rstrip() for line in lines)


def _rows(plan: Plan) -> list[tuple[tuple[int, ...], list[int]]]:
    """Pairs of owned blocks and the ranks that own them, by lowest rank."""
    owned = [plan.owned_blocks(rank) for rank in range(plan.world_size)]
    if plan.world_size <= MAX_ROWS:
        return [(blocks, [rank]) for rank, blocks in enumerate(owned)]
    patterns: dict[tuple[int, ...], list[int]] = {}
    for rank, blocks in enumerate(owned):
        patterns.setdefault(blocks, []).append(rank)
    return list(patterns.items())


def _cells(plan: Plan, owned: Sequence[int]) -> str:
    cells = [NOT_OWNED] * plan.num_blocks
    for block in owned:
        cells[block] = OWNED
    for block in plan.pinned:
        cells[block] = PINNED
    return "".join(cells)


def _header(start: int, stop: int, width: int) -> list[str]:
    """Block indices read downwards; the upper digits stand over each tenth block only."""
    digits = len(str(stop - 1))
    names = [str(block).rjust(digits) for block in range(start, stop)]
    lines = []
    for place in range(digits):
        upper = place < digits - 1
        line = "".join(
            " " if upper and block % 10 and block != start else name[place]
            for block, name in zip(range(start, stop), names, strict=True)
        )
        lines.append(f"{'block' if place == 0 else '':<{width}}  {line}")
    return lines
