"""How alike the owners' gradients are, block by block, in the course of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sdp_llm.report.picture import draw_values
from sdp_llm.report.record import Record
from sdp_llm.report.scale import value_text
from sdp_llm.report.svg import tag

WIDTH = 540  # pixels
MOST_COLUMNS = 240  # of a heat map


def gradient_cards(record: Record, are_several: bool) -> list[str]:
    """The cosine similarity and the norm of the gradient as heat maps, where they were measured."""
    lines = record.gradients
    if not lines:
        return []
    lines = lines[:: -(-len(lines) // MOST_COLUMNS)]
    steps = [int(line["step"]) for line in lines]
    names = list(dict.fromkeys(name for line in lines for name in line["gradients/cosine"]))
    cosines = [_row(line["gradients/cosine"], names) for line in lines]
    norms = [_row(line["gradients/norm"], names) for line in lines]
    logs = [[math.log10(value) if value > 0 else math.nan for value in row] for row in norms]
    whose = record.name if are_several else ""
    return [
        _card(
            "Cosine similarity of the owners' gradients",
            whose,
            draw_values(cosines, steps, names, WIDTH, _limits(cosines), cosines),
            f"Mean over the pairs of a unit's owners; {_range_text(cosines)}.",
        ),
        _card(
            "Gradient norm by block",
            whose,
            draw_values(logs, steps, names, WIDTH, _limits(logs), norms),
            f"Of the average, before clipping; {_range_text(norms)}, logarithmic.",
        ),
    ]


def _row(values: dict[str, float | None], names: Sequence[str]) -> list[float]:
    return [math.nan if (value := values.get(name)) is None else value for name in names]


def _finite(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row if math.isfinite(value)] or [0.0]


def _limits(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    low, high = min(_finite(rows)), max(_finite(rows))
    return low, high if high > low else low + 1.0


def _range_text(rows: Sequence[Sequence[float]]) -> str:
    values = _finite(rows)
    return f"from faint to strong {value_text(min(values))} to {value_text(max(values))}"


def _card(title: str, unit: str, drawn: tuple[str, float], note: str) -> str:
    group, height = drawn
    picture = tag("svg", group, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)
    return (
        f'<section class="card"><h2>{escape(title)}<span>{escape(unit)}</span></h2>'
        f'{picture}<p class="note">{escape(note)}</p></section>'
    )
