"""The numbers of each run, one row each."""

from __future__ import annotations

import math
from collections import Counter
from html import escape

from sdp_llm.plan.tables import number, unit_for
from sdp_llm.processes import was_killed
from sdp_llm.report.figures import flops_of, predicted_peak, seconds_of
from sdp_llm.report.record import Record
from sdp_llm.report.scale import si_text, value_text

Cell = tuple[str, str]  # what is shown, and a smaller line below it

NOTHING = ("-", "")
_ENDINGS = {"finished": "", "running": "still going", "preempted": "stopped", "failed": "failed"}
COLUMNS = (
    "validation loss",
    "training loss",
    "tokens",
    "compute",
    "time in steps",
    "memory of a rank",
    "spread of losses",
    "plan",
)


def row_of(record: Record) -> dict[str, Cell]:
    """The cells of a run, by column."""
    return {
        "validation loss": _validation(record),
        "training loss": _training(record),
        "tokens": _tokens(record),
        "compute": _compute(record),
        "time in steps": _time(record),
        "memory of a rank": _memory(record),
        "spread of losses": _lagging(record),
        "plan": _plan(record),
    }


def progress_text(record: Record) -> str:
    """How far a run has come and how it ended."""
    total = record.total_steps
    text = f"{record.step:,} of {total:,} steps" if total else f"{record.step:,} steps"
    state = str(record.status.get("state", ""))
    ending = "killed" if was_killed(record.status) else _ENDINGS.get(state, state)
    return f"{text}, {ending}" if ending else text


def model_text(record: Record) -> str:
    """The model and its size, where they are known."""
    config = record.config.get("model") or {}
    name = str(config.get("config", "")).rsplit("/", 1)[-1].removesuffix(".json")
    if "parameters" in record.prediction:
        name += f", {si_text(float(record.prediction['parameters']))} parameters"
    return name


def table_html(records: list[Record]) -> str:
    """The table, a row for each run."""
    rows = [row_of(record) for record in records]
    columns = [name for name in COLUMNS if any(row[name] != NOTHING for row in rows)]
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in ("run", *columns))
    body = []
    for color, (record, row) in enumerate(zip(records, rows, strict=True)):
        first = (record.name, f"{model_text(record)}\n{progress_text(record)}")
        cells = [_cell(first, f"<i class='swatch s{color}'></i>", "th")]
        cells += [_cell(row[name]) for name in columns]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell, before: str = "", name: str = "td") -> str:
    main, below = cell
    small = "".join(f"<small>{escape(line)}</small>" for line in below.split("\n") if line)
    return f"<{name}>{before}{escape(main)}{small}</{name}>"


def _validation(record: Record) -> Cell:
    if not record.validation:
        return NOTHING
    last = record.validation[-1]
    bits = last.get("validation/bits_per_byte")
    below = f"step {last['step']:,}" + (f"\n{bits:.4f} bits/byte" if bits else "")
    return f"{last['validation/loss']:.4f}", below


def _training(record: Record) -> Cell:
    if not record.training:
        return NOTHING
    last = record.training[-1]
    skipped = f"\n{last['skipped']} steps skipped" if last["skipped"] else ""
    return f"{last['loss']:.4f}", f"step {last['step']:,}{skipped}"


def _tokens(record: Record) -> Cell:
    if not record.training:
        return NOTHING
    seconds = seconds_of(record)[-1]
    tokens = float(record.training[-1]["tokens"])
    return si_text(tokens), f"{tokens / seconds:,.0f} per second"


def _compute(record: Record) -> Cell:
    flops = flops_of(record)
    return (f"{si_text(flops[-1])}FLOPs", "all ranks") if flops else NOTHING


def _time(record: Record) -> Cell:
    if not record.training:
        return NOTHING
    minutes, seconds = divmod(round(seconds_of(record)[-1]), 60)
    hours, minutes = divmod(minutes, 60)
    left = record.training[-1]["eta"]
    status = record.status
    is_going = left and status.get("state") == "running" and not was_killed(status)
    return f"{hours}:{minutes:02d}:{seconds:02d}", f"{left / 60:,.0f} min left" if is_going else ""


def _memory(record: Record) -> Cell:
    """What was measured of what was predicted."""
    if not record.memory:
        expected = predicted_peak(record)
        return (f"{number(expected / 2**30)} GiB", "predicted") if expected else NOTHING
    last = record.memory[-1]
    predicted, measured = last["memory/predicted"], last["memory/measured"]
    has_peak = "peak" in predicted
    what = "peak" if has_peak else "model state"
    names = ["peak"] if has_peak else ["weights", "gradients", "optimizer"]
    expected, found = (sum(side[name] for name in names) for side in (predicted, measured))
    unit, divisor = unit_for(max(expected, found))
    below = f"{what} of rank {last['memory/rank']}\n{number(expected / divisor)} {unit} predicted"
    return f"{number(found / divisor)} {unit}", below


def _lagging(record: Record) -> Cell:
    """The last spread, and the rank that is highest most often."""
    lines = [entry for entry in record.training if "highest_rank" in entry]
    lines = [entry for entry in lines if math.isfinite(entry["highest_loss"])]
    if not lines or all(entry["highest_rank"] == entry["lowest_rank"] for entry in lines):
        return NOTHING
    last = lines[-1]
    rank, count = Counter(entry["highest_rank"] for entry in lines).most_common(1)[0]
    spread = value_text(last["highest_loss"] - last["lowest_loss"])
    return spread, f"between ranks\nrank {rank} highest in {count / len(lines):.0%}"


def _plan(record: Record) -> Cell:
    phases = record.plan.get("phases", [])
    if not phases:
        return NOTHING
    if len(phases) > 1:
        return f"{len(phases)} phases", f"{record.plan['world_size']} ranks"
    sdp = record.config.get("sdp") or {}
    stage = (record.config.get("zero_optimization") or {}).get("stage", 0)
    owners = sdp.get("owners_per_block")
    coverage = f"{owners} owners" if owners else f"C = {sdp.get('coverage')}"
    if sdp.get("owner_sets"):
        coverage = "explicit"
    below = f"{record.plan['world_size']} ranks, ZeRO {stage}\n{phases[0]['masking']} masking"
    return coverage, below
