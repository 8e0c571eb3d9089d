"""Heat maps: who owns what, and numbers by block and step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdp_llm.plan import Phase, Plan, Schedule
from sdp_llm.report.scale import linear_ticks, value_text
from sdp_llm.report.svg import asset, pixels, tag, text

CELL, LEAST_CELL = 26.0, 3.0  # pixels
LABELS, MARGIN = 52, 84  # pixels at the left and at the right of the cells
NAMES = 76  # pixels for the names of units
LINE, FOOT = 17, 24  # pixels of a line above them, and below them
GAP = 28  # pixels between phases
PAGE = 1130.0  # pixels that a picture may be wide
LEGEND = {"owned": "owned", "pinned": "pinned: every rank owns it", "absent": "not owned"}
_LEGEND_WIDTH = 420.0


@dataclass(frozen=True)
class PhasePicture:
    """Who owns what in one phase: the ranks of each block, and which blocks are pinned."""

    lines: tuple[str, ...]
    world_size: int
    owners: tuple[tuple[int, ...], ...]
    pinned: frozenset[int]


def phases_of_schedule(schedule: Schedule) -> list[PhasePicture]:
    """The phases of a schedule, each before its rotations."""
    return _pictures(schedule.phases)


def phases_of_record(plan: Mapping[str, Any]) -> list[PhasePicture]:
    """The phases that a run folder's ``plan.json`` has."""
    world_size = int(plan.get("world_size", 0))
    return _pictures([_recorded(phase, world_size) for phase in plan.get("phases", [])])


def _recorded(phase: Mapping[str, Any], world_size: int) -> Phase:
    owners = tuple(tuple(ranks) for ranks in phase["owners"])
    plan = Plan(world_size, owners, tuple(phase.get("pinned", ())), "explicit", 0)
    return Phase(phase["start"], phase["stop"], plan, phase["masking"], phase["rotate_every"], 0)


def _pictures(phases: Sequence[Phase]) -> list[PhasePicture]:
    found = []
    for i, phase in enumerate(phases, 1):
        when = f"phase {i}: steps {phase.start + 1:,} to {phase.stop:,}"
        lines = (when, str(phase)) if len(phases) > 1 else (str(phase),)
        plan = phase.plan
        found.append(PhasePicture(lines, plan.world_size, plan.owner_sets, frozenset(plan.pinned)))
    return found


def cell_size(columns: int, rows: int, width: float) -> tuple[float, float]:
    """The width and the height of a cell, so that the columns fit ``width`` pixels."""
    wide = min(CELL, max(LEAST_CELL, (width - LABELS - MARGIN) / columns))
    return wide, min(wide, CELL, max(LEAST_CELL, 420 / rows))


def draw_plans(phases: Sequence[PhasePicture], width: float) -> tuple[str, float]:
    """Phases side by side, as far as they fit.

    :returns: an SVG group, and its height in pixels.
    """
    x = y = row = 0.0
    groups = []
    for phase in phases:
        across, high = _plan_size(phase, width)
        if x and x + across > width:
            x, y, row = 0.0, y + row + GAP, 0.0
        groups.append(tag("g", _draw_plan(phase, width), transform=f"translate({x:g} {y:g})"))
        x, row = x + across + GAP, max(row, high)
    return tag("g", *groups), y + row


def plan_svg(phases: Sequence[PhasePicture]) -> str:
    """An SVG file with the phases side by side, light or dark as its reader is."""
    edge = 16
    alone = sum(_plan_size(phase, PAGE)[0] + GAP for phase in phases) - GAP
    width = max(min(alone, PAGE), _LEGEND_WIDTH)
    group, height = draw_plans(phases, width)
    legend, x = [], float(LABELS)
    for kind, name in LEGEND.items():
        legend.append(tag("rect", x=x, y=2, width=11, height=11, class_=kind))
        legend.append(text(name, x + 17, 12, class_="label"))
        x += 40 + 6.5 * len(name)
    high, wide = height + 30 + 2 * edge, width + 2 * edge
    return tag(
        "svg",
        f"<style>{asset('style.css')}</style>",
        tag("rect", width=wide, height=high, class_="background"),
        tag("g", *legend, transform=f"translate({edge} {edge})"),
        tag("g", group, transform=f"translate({edge} {edge + 30})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {wide:g} {high:g}",
        style=f"width:{wide:g}px;font-family:Inter,system-ui,sans-serif",
    )


def fits(phases: Sequence[PhasePicture], width: float) -> bool:
    """Whether all phases stand side by side, with cells as large as they get."""
    sizes = [_plan_size(phase, math.inf)[0] for phase in phases]
    return sum(sizes) + GAP * (len(sizes) - 1) <= width


def _plan_size(phase: PhasePicture, width: float) -> tuple[float, float]:
    wide, high = cell_size(len(phase.owners), phase.world_size, width)
    longest = max(len(line) for line in phase.lines)
    across = LABELS + max(wide * len(phase.owners) + MARGIN, 6.0 * longest)
    return across, LINE * len(phase.lines) + 6 + high * phase.world_size + FOOT


def _draw_plan(phase: PhasePicture, width: float) -> str:
    """Ranks by blocks, a row for each rank with its number of blocks."""
    blocks = len(phase.owners)
    wide, high = cell_size(blocks, phase.world_size, width)
    head = LINE * len(phase.lines) + 6
    parts = [
        text(line, LABELS, 13 + LINE * i, class_="label" if i else "heading")
        for i, line in enumerate(phase.lines)
    ]
    for rank in range(phase.world_size):
        y = head + rank * high
        owned = [b for b, ranks in enumerate(phase.owners) if rank in ranks]
        cells = {"owned": [b for b in owned if b not in phase.pinned]}
        cells["pinned"] = [b for b in owned if b in phase.pinned]
        cells["absent"] = [b for b in range(blocks) if b not in owned]
        names = ", ".join(str(b) for b in owned)
        row = [tag("title", f"rank {rank} owns {len(owned)} of {blocks} blocks: {names}")]
        row += [
            tag("path", d=_cells(places, y, wide, high), class_=name)
            for name, places in cells.items()
            if places
        ]
        if high >= 10 or rank % math.ceil(12 / high) == 0:
            middle = y + high / 2 + 4
            row.append(text(f"rank {rank}", LABELS - 8, middle, class_="tick", text_anchor="end"))
            share = f"{len(owned)}/{blocks} blocks"
            row.append(text(share, LABELS + wide * blocks + 8, middle, class_="tick"))
        parts.append(tag("g", *row))
    bottom = head + high * phase.world_size + 15
    for block in _shown(blocks, wide):
        x = LABELS + (block + 0.5) * wide
        parts.append(text(str(block), x, bottom, class_="tick", text_anchor="middle"))
    parts.append(text("block", LABELS - 8, bottom, class_="tick", text_anchor="end"))
    return tag("g", *parts)


def draw_values(
    values: Sequence[Sequence[float]],
    steps: Sequence[int],
    blocks: Sequence[str],
    width: float,
    limits: tuple[float, float],
    shown: Sequence[Sequence[float]],
) -> tuple[str, float]:
    """Numbers as shades, a row for each block and a column for each step.

    :param values: by step, then by block; NaN: nothing is known.
    :param limits: the values of the lightest and of the darkest shade.
    :param shown: what is written where the pointer rests, in place of ``values``.
    :returns: an SVG group, and its height in pixels.
    """
    columns = len(steps)
    wide = (width - NAMES - 24) / columns
    high = min(CELL, max(LEAST_CELL, 300 / len(blocks)))
    low, top = limits
    parts = []
    for i, row in enumerate(values):
        for b, value in enumerate(row):
            if math.isfinite(value):
                share = min(1.0, max(0.0, (value - low) / (top - low)))
                hint = tag("title", f"step {steps[i]:,}, {blocks[b]}: {value_text(shown[i][b])}")
                parts.append(
                    tag(
                        "rect",
                        hint,
                        x=NAMES + i * wide,
                        y=6 + b * high,
                        width=max(wide - (1 if wide > 4 else 0), 0.5),
                        height=high - 1,
                        class_="shade",
                        fill_opacity=0.06 + 0.94 * share,
                    )
                )
    for b in _shown(len(blocks), high):
        middle = 6 + (b + 0.5) * high + 4
        parts.append(text(blocks[b], NAMES - 8, middle, class_="tick", text_anchor="end"))
    bottom = 6 + high * len(blocks) + 16
    ticks = [0, columns - 1] if columns < 3 else [int(t) for t in linear_ticks(0, columns - 1, 8)]
    for i in dict.fromkeys(ticks):
        x = NAMES + (i + 0.5) * wide
        parts.append(text(f"{steps[i]:,}", x, bottom, class_="tick", text_anchor="middle"))
    parts.append(text("step", NAMES - 8, bottom, class_="tick", text_anchor="end"))
    return tag("g", *parts), bottom + 8


def _cells(blocks: Sequence[int], y: float, wide: float, high: float) -> str:
    gap = 2.0 if min(wide, high) > 8 else 0.5
    return "".join(
        f"M{pixels(LABELS + b * wide)} {pixels(y)}h{pixels(wide - gap)}v{pixels(high - gap)}"
        f"h{pixels(gap - wide)}z"
        for b in blocks
    )


def _shown(count: int, size: float) -> list[int]:
    """Which of ``count`` cells get a label, where one needs about 18 pixels."""
    every = next((e for e in (1, 2, 5, 10, 20, 50, 100) if e * size >= 18), 200)
    return list(range(0, count, every))
