"""Which charts are made of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdp_llm.plan.tables import unit_for
from sdp_llm.report.chart import Chart, Series, is_log_better
from sdp_llm.report.record import Record
from sdp_llm.report.scale import prefix_for

Entry = Mapping[str, Any]

STEPS, TOKENS, FLOPS, HOURS = "steps", "tokens", "FLOPs", "time"
AXES = (STEPS, TOKENS, FLOPS, HOURS)


def tokens_of(record: Record) -> list[float]:
    """The tokens that were trained on, at each line."""
    return [float(entry["tokens"]) for entry in record.training]


def seconds_of(record: Record) -> list[float]:
    """The time in optimizer steps, at each line."""
    return [float(entry["seconds"]) for entry in record.training]


def flops_of(record: Record) -> list[float] | None:
    """The operations of all ranks together, at each line; None where they are not known."""
    found = [entry["flops"] for entry in record.training]
    return None if None in found else [float(flops) for flops in found]


def progress_of(record: Record, axis: str) -> list[float] | None:
    """How far the run had come at each line, as ``axis`` counts it; None where that is unknown."""
    if axis == STEPS:
        return [float(entry["step"]) for entry in record.training]
    if axis == TOKENS:
        return tokens_of(record)
    if axis == FLOPS:
        return flops_of(record)
    return [seconds / 3600 for seconds in seconds_of(record)]


def loss_charts(records: Sequence[Record]) -> dict[str, Chart]:
    """Training and validation loss over each of ``AXES`` that is known for all runs."""
    charts = {}
    for axis in AXES:
        found = [progress_of(record, axis) for record in records]
        known = [progress for progress in found if progress is not None]
        if len(known) < len(records):
            continue
        largest = max((max(progress, default=0.0) for progress in known), default=0.0)
        label, factor = _axis_label(axis, largest)
        series = []
        for color, (record, progress) in enumerate(zip(records, known, strict=True)):
            scaled = [value / factor for value in progress]
            series += _losses(record, color, scaled, are_several=len(records) > 1)
        marks = _phase_marks(records[0]) if axis == STEPS and len(records) == 1 else ()
        charts[axis] = Chart(
            f"loss-{axis.lower()}", "Loss", "nats per token", label, tuple(series), marks=marks
        )
    return charts


def _axis_label(axis: str, largest: float) -> tuple[str, float]:
    if axis == STEPS:
        return "optimizer step", 1.0
    if axis == HOURS:
        return ("hours in steps", 1.0) if largest >= 2 else ("minutes in steps", 1 / 60)
    prefix, factor = prefix_for(largest)
    if axis == TOKENS:
        words = {"": "tokens", "K": "thousand tokens", "M": "million tokens", "G": "billion tokens"}
        return words.get(prefix, f"{prefix} tokens"), factor
    return f"{prefix}FLOPs of all ranks", factor


def _losses(
    record: Record, color: int, progress: list[float], *, are_several: bool
) -> list[Series]:
    prefix = f"{record.name}, " if are_several else ""
    steps = [float(entry["step"]) for entry in record.training]
    has_validation = bool(record.validation)
    training = Series(
        f"{prefix}training",
        color,
        tuple(progress),
        tuple(float(entry["loss"]) for entry in record.training),
        has_end_value=not has_validation,
    )
    if not has_validation:
        return [training]
    at = [float(entry["step"]) for entry in record.validation]
    places = np.interp(at, [0.0, *steps], [0.0, *progress]) if steps else at
    return [
        training,
        Series(
            f"{prefix}validation",
            color,
            tuple(float(place) for place in places),
            tuple(float(entry["validation/loss"]) for entry in record.validation),
            has_marks=True,
            has_end_value=True,
        ),
    ]


def _phase_marks(record: Record) -> tuple[tuple[float, str], ...]:
    phases = record.plan.get("phases", [])[1:]
    return tuple((float(p["start"]), f"phase {i}") for i, p in enumerate(phases, 2))


def step_charts(records: Sequence[Record]) -> list[Chart]:
    """What else is logged, over the steps."""
    norms = [float(entry["grad_norm"]) for record in records for entry in record.training]
    peak, divisor = _peaks(records)
    charts = [
        _simple(
            "lr", "Learning rate", "", records, lambda entry: float(entry["lr"]), from_zero=True
        ),
        _simple(
            "grad-norm",
            "Gradient norm",
            "before clipping, whole model",
            records,
            lambda entry: float(entry["grad_norm"]),
            is_log=is_log_better(norms),
        ),
        _simple(
            "tokens-per-second",
            "Throughput",
            "tokens/s, all ranks",
            records,
            lambda entry: float(entry["tokens_per_second"]),
            from_zero=True,
        ),
        _memory_chart(records, peak, divisor),
        _spread_chart(records),
    ]
    return [chart for chart in charts if not chart.is_empty]


def _simple(
    key: str,
    title: str,
    unit: str,
    records: Sequence[Record],
    value: Callable[[Entry], float],
    *,
    from_zero: bool = False,
    is_log: bool = False,
) -> Chart:
    series = tuple(
        Series(
            record.name,
            color,
            tuple(float(entry["step"]) for entry in record.training),
            tuple(value(entry) for entry in record.training),
        )
        for color, record in enumerate(records)
    )
    return Chart(key, title, unit, "optimizer step", series, from_zero, is_log)


def _peaks(records: Sequence[Record]) -> tuple[str, float]:
    peaks = [entry["memory_peak"][1] for record in records for entry in record.training]
    return unit_for(max(peaks, default=0))


def _memory_chart(records: Sequence[Record], unit: str, divisor: float) -> Chart:
    """The peak of the rank that needs most, the band down to the one that needs least."""
    series = []
    for color, record in enumerate(records):
        steps = tuple(float(entry["step"]) for entry in record.training)
        peaks = [entry["memory_peak"] for entry in record.training]
        low, high = (tuple(p[end] / divisor for p in peaks) for end in (0, 1))
        series.append(Series(record.name, color, steps, high, low, high))
        expected = predicted_peak(record)
        if expected is not None and steps:
            name, ends = f"{record.name}, predicted", (steps[0], steps[-1])
            flat = (expected / divisor,) * 2
            series.append(Series(name, color, ends, flat, is_dashed=True))
    note = "Band: from the rank that needs least to the one that needs most."
    if any(predicted_peak(record) is None for record in records):
        note += " On the CPU it is what the process has resident, Python and libraries included."
    title, what = "Peak memory", f"{unit} on a rank"
    return Chart("memory", title, what, "optimizer step", tuple(series), True, note=note)


def predicted_peak(record: Record) -> float | None:
    """The predicted bytes of the rank that needs most, where the peak can be measured: on CUDA."""
    if record.prediction.get("device") != "cuda":
        return None
    return max(
        float(sum(rank.values()))
        for phase in record.prediction["phases"]
        for rank in phase["memory_bytes"]
    )


def _spread_chart(records: Sequence[Record]) -> Chart:
    """How far the ranks' losses are apart."""
    series = []
    for color, record in enumerate(records):
        lines = [entry for entry in record.training if "highest_loss" in entry]
        gaps = tuple(float(entry["highest_loss"] - entry["lowest_loss"]) for entry in lines)
        steps = tuple(float(entry["step"]) for entry in lines)
        extra = tuple(
            f"rank {entry['highest_rank']} highest" if "highest_rank" in entry else ""
            for entry in lines
        )
        series.append(Series(record.name, color, steps, gaps, extra=extra))
    return Chart(
        "rank-spread",
        "Spread of the ranks' losses",
        "highest minus lowest, nats per token",
        "optimizer step",
        tuple(series),
        True,
        note="Ranks train different subnetworks on different samples; under the pointer: which "
        "one is highest.",
    )
