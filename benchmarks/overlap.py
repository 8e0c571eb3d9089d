"""Show where a step of SDP waits for communication: a trace, and the share of the step.

python benchmarks/overlap.py --model configs/model/llama_10m.json --world_size 2 \
    --output docs/results/overlap.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks._case import tokens_of_step
from benchmarks._command import run_command
from benchmarks._ranks import run_ranks
from benchmarks._record import markdown_table, write_results
from benchmarks._systems import Workload, parse_system
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.sharding.collectives import Communicator, Pending
from sdp_llm.subnetwork.measure import load_model_config

REDUCE, GATHER = "reduce gradients", "gather weights"
PHASES = ("forward", "backward", "optimizer")
LATE = "other ranks"
WARM_UP = 2
GOAL = 0.05


@dataclass(frozen=True)
class Message:
    """A collective: seconds at which it was started, waited for, and known to be over.

    ``number`` counts the collectives of its kind among its ranks: it is the same on all of them.
    """

    kind: str
    ranks: tuple[int, ...]
    number: int
    mebibytes: float
    started: float
    waited: float
    over: float


class Recorder:
    """Notes when the collectives of a communicator are started and waited for."""

    def __init__(self, communicator: Communicator) -> None:
        self.messages: list[Message] = []
        self._numbers: Counter[tuple[str, tuple[int, ...]]] = Counter()
        reduce_scatter, all_gather = communicator.reduce_scatter, communicator.all_gather

        def reduce(send: Any, received: Any, group: Any) -> Any:
            started = time.perf_counter()
            summands, pending = reduce_scatter(send, received, group)
            return summands, self._timed(REDUCE, send, group, started, pending)

        def gather(full: Any, group: Any) -> Pending:
            started = time.perf_counter()
            return self._timed(GATHER, full, group, started, all_gather(full, group))

        communicator.reduce_scatter = reduce  # type: ignore[method-assign]
        communicator.all_gather = gather  # type: ignore[method-assign]

    def _timed(self, kind: str, sent: Any, group: Any, started: float, pending: Pending) -> Pending:
        ranks = tuple(dist.get_process_group_ranks(group))
        number = self._numbers[kind, ranks]
        self._numbers[kind, ranks] += 1
        mebibytes = sent.numel() * sent.element_size() / 2**20

        def wait() -> None:
            waited = time.perf_counter()
            pending.wait()
            over = time.perf_counter()
            self.messages.append(Message(kind, ranks, number, mebibytes, started, waited, over))

        return Pending(wait)


def measure(
    workload: Workload, system_text: str, model: PretrainedConfig, steps: int
) -> list[dict[str, Any]]:
    """Run on a rank: for each step its phases, ``(start, end)`` in seconds, and messages.

    A message is of the step in which it is waited for: a gather of the one after its own.
    """
    case = workload.case(parse_system(system_text))
    engine, *_ = initialize(model, case.run_config())
    recorder = Recorder(engine.sharded.communicator)
    found = []
    for step in range(WARM_UP + steps):
        tokens = tokens_of_step(case, model.get_text_config().vocab_size, step)
        recorder.messages.clear()
        marks = [time.perf_counter()]
        loss = summed_loss(engine, tokens) / target_count(tokens)
        marks.append(time.perf_counter())
        engine.backward(loss, scale_wrt_gas=False)
        marks.append(time.perf_counter())
        engine.step()
        marks.append(time.perf_counter())
        phases = dict(zip(PHASES, pairwise(marks), strict=True))
        found.append({"phases": phases, "messages": [asdict(m) for m in recorder.messages]})
    engine.wait_for_weights()
    dist.barrier()
    engine.destroy()
    return found[WARM_UP:]


def waiting(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, float]]]:
    """For each rank and step the share of the step that it waits: by phase, and of it for ranks.

    Until the last of its ranks has started a collective, the others wait for that rank
    (:data:`LATE`), after that for the bytes. All ranks are on one machine and read one clock.
    """
    last_start: dict[Any, float] = {}
    for message in (m for steps in ranks for step in steps for m in step["messages"]):
        key = _key(message)
        last_start[key] = max(last_start.get(key, 0.0), message["started"])
    return [[_waiting_of(step, last_start) for step in steps] for steps in ranks]


def _waiting_of(step: dict[str, Any], last_start: dict[Any, float]) -> dict[str, float]:
    seconds = step["phases"]["optimizer"][1] - step["phases"]["forward"][0]
    shares = dict.fromkeys((*PHASES, LATE), 0.0)
    for message in step["messages"]:
        waited, over = message["waited"], message["over"]
        ready = min(max(waited, last_start[_key(message)]), over)
        shares[LATE] += (ready - waited) / seconds
        for name, (start, stop) in step["phases"].items():
            if start <= waited < stop:
                shares[name] += (over - ready) / seconds
    return shares


def _key(message: dict[str, Any]) -> tuple[str, tuple[int, ...], int]:
    return message["kind"], tuple(message["ranks"]), message["number"]


_ABOUT = """\
{system}, {ranks} ranks over the loopback interface, one sample of {sequence} tokens each, \
{dtype}; medians over {steps} steps of the share of a step that the computing thread waits for \
gradients or weights; the rank that waits most. Until the last of its ranks has started a \
collective, the others wait for that rank, which no overlap can hide; the phases count what comes \
after. The gradient norm, one number, is not in it. In the picture (rank 0, one step) a bar is a \
collective from its start to where its end was noticed, the dark part of it what the computing \
thread waited."""


def report(ranks: Sequence[Sequence[dict[str, Any]]], system: str, workload: Workload) -> str:
    """The table, and whether the goal is reached."""
    shares = waiting(ranks)
    totals = [median(sum(step[name] for name in PHASES) for step in steps) for steps in shares]
    worst = max(range(len(totals)), key=totals.__getitem__)
    rows = [[f"bytes, {name}", f"{median(s[name] for s in shares[worst]):.1%}"] for name in PHASES]
    rows.append(["bytes, whole step", f"{totals[worst]:.1%}"])
    rows.append(
        [LATE.removeprefix("waiting for "), f"{median(s[LATE] for s in shares[worst]):.1%}"]
    )
    verdict = "reached" if totals[worst] <= GOAL else "MISSED"
    about = _ABOUT.format(
        system=system,
        ranks=workload.world_size,
        sequence=workload.sequence_length,
        dtype=workload.dtype,
        steps=len(ranks[0]),
    )
    goal = f"Goal for the bytes: at most {GOAL:.0%} of the step: {verdict}."
    return "\n\n".join((about, markdown_table(["waiting for", "share of step"], rows), goal))


def draw(step: dict[str, Any], path: Path) -> bool:
    """Draw one step's phases and messages; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    begin = step["phases"]["forward"][0]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for (name, (start, stop)), shade in zip(
        step["phases"].items(), ("#d9e8f5", "#f5e6d3", "#e3f0dc"), strict=True
    ):
        axes.axvspan((start - begin) * 1e3, (stop - begin) * 1e3, color=shade, label=name)
    messages = sorted(step["messages"], key=lambda message: message["started"])
    for row, message in enumerate(messages):
        started, waited, over = ((message[k] - begin) * 1e3 for k in ("started", "waited", "over"))
        color = "tab:blue" if message["kind"] == GATHER else "tab:orange"
        axes.barh(row, over - started, left=started, color=color, alpha=0.5)
        axes.barh(row, over - waited, left=waited, color=color)
        axes.text(over, row, f" {message['mebibytes']:.1f} MiB", va="center", fontsize="x-small")
    axes.barh(0, 0, color="tab:blue", label=GATHER)
    axes.barh(0, 0, color="tab:orange", label=REDUCE)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("milliseconds since the start of the step")
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write table and picture.

    :raises ConfigError: for a model or a system that does not exist.
    """
    model = load_model_config(arguments.model)
    workload = Workload(arguments.world_size, arguments.sequence_length, arguments.bf16)
    system = parse_system(arguments.system)
    ranks = run_ranks(
        workload.world_size, measure, workload, arguments.system, model, arguments.steps
    )
    text = report(ranks, str(system), workload)
    print(text)
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = output.with_suffix(".png")
    if draw(ranks[0][len(ranks[0]) // 2], picture):
        text = f"![one step]({picture.name})\n\n{text}"
    name = Path(arguments.model).stem
    content = {"model": name, "system": str(system), "workload": asdict(workload)}
    write_results(output, f"Overlap of {name}", text, content | {"waiting": waiting(ranks)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="configs/model/llama_10m.json", help="a HF config")
    parser.add_argument("--system", default="sdp:1/2", help="sdp:COVERAGE:MASKING:STAGE")
    parser.add_argument("--world_size", type=int, default=2, help="number of gloo ranks")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and messages")
    parser.add_argument("--steps", type=int, default=20, help="steps that are recorded")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; page and picture are beside it"
    )
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
