"""What is said about steps over slow links: tables, verdicts, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

from benchmarks._network import MIN_BURST, congestion_control
from benchmarks._record import markdown_table
from benchmarks._systems import SDP, System, Workload

MIB = 2**20
DDP = "DDP"
ZERO2 = "ZeRO-2"
RESHARDING = ("ZeRO-3", "FSDP2")
RESHARDING_GOAL = 1.8  # at RESHARDING_GBITS
RESHARDING_GBITS = 1.0
CLOSED_FORM_SHARE = 0.95


@dataclass
class Measured:
    """A system at one bandwidth.

    ``seconds`` are those of a step, one per round; ``sent`` the bytes of each rank and step, per
    round; ``closed_form`` the bytes that a rank should send, mean over the ranks.
    """

    system: str
    gbits: float
    closed_form: int
    seconds: list[float] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)

    @property
    def mean_sent(self) -> float:
        """Bytes per rank and step, mean over ranks and rounds."""
        return mean(sent for of_ranks in self.sent for sent in of_ranks)


_ABOUT = (
    "Each of the {ranks} ranks has a network namespace of its own; its link to the bridge between "
    "them is limited in both directions by a token bucket (bursts of {burst} KiB, or 2 ms of the "
    "rate where that is more; packets of 1,500 bytes, of which 1,448 are payload). {steps} per "
    "measurement, after a first one over links without a limit, timed from a barrier to the end of "
    "the slowest rank; each system is started anew {rounds}, all in turn. TCP's congestion control "
    "is {congestion}. Seconds are medians. "
    "Ratios of tokens/s are medians of the rounds' ratios. Sent is the byte counter of the rank's "
    "own interface, mean over ranks and rounds. {tokens} tokens per step, weights and traffic in "
    "{dtype}. All ranks share the CPU named below: where links are fast, it is computing that "
    "takes the time."
)


def page(
    systems: Sequence[System], workload: Workload, measured: Sequence[Measured], steps: int
) -> str:
    """All tables, with what they show."""
    rounds = len(measured[0].seconds)
    tokens = workload.world_size * workload.sequence_length * workload.accumulation
    about = _ABOUT.format(
        ranks=workload.world_size,
        burst=MIN_BURST // 1024,
        steps="One step" if steps == 1 else f"{steps} steps",
        rounds="once" if rounds == 1 else f"{rounds} times",
        congestion=congestion_control(),
        tokens=tokens,
        dtype=workload.dtype,
    )
    parts = [about]
    for gbits in dict.fromkeys(entry.gbits for entry in measured):
        entries = {entry.system: entry for entry in measured if entry.gbits == gbits}
        parts.append(f"## {gbits:g} Gbit/s\n\n{_table(entries, tokens)}")
        rows = _verdicts(systems, entries, gbits)
        if rows:
            header = ["system", "over", "tokens/s, ratio", "goal", "verdict"]
            parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def _table(entries: dict[str, Measured], tokens: int) -> str:
    header = ["system", "s/step", "tokens/s", "tokens/s over DDP"]
    header += ["sent per rank and step, MiB", "closed form, MiB", "DDP's closed form over it"]
    ddp = entries.get(DDP)
    rows = []
    for entry in entries.values():
        seconds = median(entry.seconds)
        rows.append(
            [
                entry.system,
                f"{seconds:,.3f}",
                f"{tokens / seconds:,.1f}",
                f"{speedup(entry, ddp):.2f}" if ddp else "-",
                f"{entry.mean_sent / MIB:,.1f}",
                f"{entry.closed_form / MIB:,.1f}",
                f"{ddp.closed_form / entry.closed_form:.2f}" if ddp else "-",
            ]
        )
    return markdown_table(header, rows)


def speedup(entry: Measured, *others: Measured) -> float:
    """Tokens per second over those of the fastest other one, the median of the rounds' ratios."""
    fastest = [min(seconds) for seconds in zip(*(o.seconds for o in others), strict=True)]
    return median(o / own for o, own in zip(fastest, entry.seconds, strict=True))


def _verdicts(
    systems: Sequence[System], entries: dict[str, Measured], gbits: float
) -> list[list[str]]:
    """Of each SDP with half of the blocks over its peers."""
    rows = []
    for system in systems:
        if system.kind != SDP or Fraction(system.coverage) != Fraction(1, 2):
            continue
        own = entries[str(system)]
        resharding = [entries[name] for name in RESHARDING if name in entries]
        if len(resharding) == len(RESHARDING):
            goal = RESHARDING_GOAL if gbits == RESHARDING_GBITS else None
            over = f"the faster of {' and '.join(RESHARDING)}"
            rows.append(_verdict(own, over, speedup(own, *resharding), goal))
        for name in (DDP, ZERO2):
            if name in entries:
                bytes_ratio = entries[name].closed_form / own.closed_form
                ratio = speedup(own, entries[name])
                rows.append(_verdict(own, name, ratio, CLOSED_FORM_SHARE * bytes_ratio, True))
    return rows


def _verdict(
    own: Measured, over: str, ratio: float, goal: float | None, is_share: bool = False
) -> list[str]:
    if goal is None:
        return [own.system, over, f"{ratio:.2f}", "-", "-"]
    told = f"{goal:.2f}"
    if is_share:
        told += f" = {CLOSED_FORM_SHARE} x {goal / CLOSED_FORM_SHARE:.2f} of bytes"
    return [own.system, over, f"{ratio:.2f}", told, "reached" if ratio >= goal else "missed"]


def draw(measured: Sequence[Measured], path: Path) -> bool:
    """Write the picture: seconds per step by system and bandwidth; False without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    bandwidths = list(dict.fromkeys(entry.gbits for entry in measured))
    systems = list(dict.fromkeys(entry.system for entry in measured))
    figure = Figure(figsize=(4 * len(bandwidths) + 2, 0.3 * len(systems) + 1.2), layout="tight")
    for i, gbits in enumerate(bandwidths):
        axes = figure.add_subplot(1, len(bandwidths), i + 1)
        entries = {entry.system: entry for entry in measured if entry.gbits == gbits}
        values = [median(entries[name].seconds) for name in systems]
        colors = ["#c8501e" if name.startswith(SDP) else "#1f5fa8" for name in systems]
        bars = axes.barh(systems if i == 0 else range(len(systems)), values, color=colors)
        axes.bar_label(bars, fmt="{:.2f}", padding=2, fontsize=8)
        if i:
            axes.set_yticks([])
        axes.set_xmargin(0.15)
        axes.invert_yaxis()
        axes.set_title(f"{gbits:g} Gbit/s", fontsize=10)
        axes.set_xlabel("s per step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
