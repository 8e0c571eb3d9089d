r"""Does Subnetwork Data Parallelism train as well as plain data parallelism? Small models.

python data_prep/train_tokenizer.py --input FINEWEB.parquet --vocab_size 2048 --output TOKENIZER
python data_prep/tokenize_fineweb.py --source FINEWEB.parquet --tokenizer TOKENIZER \
    --output DIR --validation_fraction 0.05
python benchmarks/study.py run --data DIR --output runs/study
python benchmarks/study.py report --output runs/study --pages docs/study --fill docs/study.md

`run` trains what is missing, one process per run, and may be killed and started again; a file
named `stop` in the output folder lets it end after the runs that are under way. Each run takes
the way of launch/simulate.py, with all workers in one pass, on the CPU or on one GPU (--device
cuda), and its `runs/ID/config.json` trains there again: launch/simulate.py --deepspeed_config FILE
--world_size 8 --set training.run_dir=NEW (but for another learning rate of free blocks or of a last
phase, which only the study knows). `report` also writes all runs into one file, runs.jsonl; in the
folder of a study it stands for the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch

from benchmarks._command import run_command
from benchmarks._study_cases import Run
from benchmarks._study_plan import PROBED, QUESTIONS
from benchmarks._study_queue import Settings, missing, seconds_of, train_missing
from benchmarks._study_results import read_results
from sdp_llm.errors import ConfigError
from sdp_llm.report.png import require_matplotlib
from sdp_llm.training.environment import prepare
from sdp_llm.training.progress import duration

# What tells most comes first.
ORDER = (1, 2, 8, 9, 5, 4, 6, 3, 7)


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing."""
    settings = _settings(arguments)
    failed = train_missing(settings)
    left = sum(1 for _ in missing(settings, read_results(settings.output)))
    print(f"{left} runs are missing" if left else "all runs are there")
    if failed:
        raise ConfigError(f"{len(failed)} runs failed, the first is {failed[0]}; see its log")


def one(arguments: argparse.Namespace) -> None:
    """Train a single run."""
    os.nice(19)
    prepare()
    from benchmarks._study_train import train

    study_run = Run.from_json(json.loads(arguments.run))
    is_probed = study_run.case in PROBED
    result = train(study_run, arguments.data, arguments.output, is_probed)
    seconds = result["cpu_seconds"]
    print(f"loss {result['loss']:.4f} after {result['steps']} steps, {seconds:.0f} s of CPU")


def show(arguments: argparse.Namespace) -> None:
    """Print the missing runs in their order, with the time each is expected to take."""
    settings = _settings(arguments)
    results = read_results(settings.output)
    total = 0.0
    for entry in missing(settings, results):
        seconds = seconds_of(entry.case, results)
        total += seconds
        case = entry.case
        rate = f"{entry.run.rate:g}" if entry.run else "?"
        budget = "flops of" if case.is_equal_flops else "as many as"
        print(
            f"{entry.question}  seed {entry.seed}  {case.model!s:<16} {case.kind:<34} "
            f"{case.steps():>5} steps ({budget} {case.dense_steps})  lr {rate:<6} "
            f"{duration(seconds):>8}  sum {duration(total)}"
        )


def report(arguments: argparse.Namespace) -> None:
    """Write tables and pictures of the results that are there."""
    from benchmarks._study_page import fill
    from benchmarks._study_report import write_report

    require_matplotlib("report")
    results = read_results(arguments.output)
    for path in write_report(results, arguments.pages):
        print(path)
    if arguments.fill:
        arguments.fill.write_text(fill(arguments.fill.read_text("utf-8"), results), "utf-8")
        print(arguments.fill)


def _settings(arguments: argparse.Namespace) -> Settings:
    _check_data(arguments.data)
    _check_device(arguments.device)
    return Settings(
        arguments.data.absolute(),
        arguments.output.absolute(),
        arguments.questions,
        arguments.seeds,
        arguments.workers,
        arguments.device,
    )


def _check_data(data: Path) -> None:
    if not (data / "validation_text_document.idx").is_file():
        raise ConfigError(
            f"--data {data}: no tokenized corpus with a validation split there; make one with "
            "data_prep/tokenize_fineweb.py --validation_fraction 0.05"
        )


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out for the CPU")


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("study", description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, action in (("run", run), ("list", show), ("one", one), ("report", report)):
        command = commands.add_parser(name, help=(action.__doc__ or "").split("\n")[0])
        command.set_defaults(action=action)
        add = command.add_argument
        add("--output", type=Path, required=True, help="folder of the study")
        if name == "report":
            add("--pages", type=Path, required=True, help="folder that is written")
            add("--fill", type=Path, help="page whose tables are made anew")
        else:
            add("--data", type=Path, required=True, help="folder of the tokenized corpus")
        if name == "one":
            add("--run", required=True, help="JSON, as the queue gives it")
        if name in ("run", "list"):
            add("--questions", type=int, nargs="+", choices=sorted(QUESTIONS), default=ORDER)
            add("--seeds", type=int, default=3, help="of every case")
            add("--workers", type=int, default=2, help="runs at a time")
            add("--device", choices=("cpu", "cuda"), default="cpu", help="of the runs")
    return parser


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    return run_command(_parser(), lambda arguments: arguments.action(arguments))


if __name__ == "__main__":
    sys.exit(main())
