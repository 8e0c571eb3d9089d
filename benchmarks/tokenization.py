"""Measure the speed and memory of tokenize_fineweb against the bare tokenizer.

python benchmarks/tokenization.py --source data/demo.jsonl --tokenizer tokenizers/demo \
    --output docs/results/tokenization.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from benchmarks._record import PACKAGES, markdown_table, write_results
from benchmarks._text import MEGABYTE, ROWS_PER_GROUP, read_texts, repeated, write_texts
from benchmarks._tokenizing import BareRun, PipelineRun, run_bare, run_pipeline
from data_prep._common import note
from data_prep._pieces import PIECE_BYTES
from data_prep._tokenizer import load_tokenizer
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of

FORMATS = ("parquet", "jsonl")
BARE, CALL, PIPELINE = "encode_batch_fast", "tokenizer(texts)", "tokenize_fineweb"
MEMORY_WORKERS = 2
_NOT_DEDUPED = "--no_dedup"  # 16 bytes a document, in the main process: not what is asked here


@dataclass(frozen=True)
class Case:
    """One thing whose speed is measured, in ``workers`` processes at once."""

    what: str
    workers: int
    format: str = "parquet"

    @property
    def name(self) -> str:
        if self.what == PIPELINE:
            return f"{PIPELINE}, {self.format}"
        return f"bare: {self.what}"


def cases(workers: Sequence[int], formats: Sequence[str]) -> list[Case]:
    """What is measured in turn; the first is the reference."""
    bare = [Case(BARE, 1), Case(CALL, 1), *(Case(BARE, count) for count in workers if count > 1)]
    return bare + [Case(PIPELINE, count, name) for name in formats for count in workers]


def measure_speed(
    arguments: argparse.Namespace, texts: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Time every case ``--repeats`` times, in turn, so that all see the same moods of the machine.

    A ratio is taken within a repeat; the median is over the repeats.
    """
    files = _write_files(arguments, texts, folder)
    chosen = cases(arguments.workers, arguments.formats)
    repeats: list[dict[Case, BareRun | PipelineRun]] = []
    for number in range(arguments.repeats):
        repeats.append({})
        for case in chosen:
            note(f"repeat {number + 1}/{arguments.repeats}: {case.name}, {case.workers} at once")
            own = files[case.format][: case.workers]
            if case.what == PIPELINE:
                with tempfile.TemporaryDirectory(dir=folder) as empty:
                    run = run_pipeline(arguments.tokenizer, own, case.workers, Path(empty))
                repeats[-1][case] = run
            else:
                repeats[-1][case] = run_bare(arguments.tokenizer, own, case.what == CALL)
    return [_speed_entry(case, repeats) for case in chosen]


def _write_files(
    arguments: argparse.Namespace, texts: Sequence[str], folder: Path
) -> dict[str, list[Path]]:
    """Write one file for each worker, of equal amounts of text, in every format."""
    size, most = int(arguments.megabytes * MEGABYTE), max(arguments.workers)
    files: dict[str, list[Path]] = {}
    for kind in dict.fromkeys(["parquet", *arguments.formats]):
        files[kind] = [folder / f"{number}.{kind}" for number in range(most)]
        for number, path in enumerate(files[kind]):
            note(f"writing {path.name}")
            write_texts(path, repeated(texts, size, f"{number}"), ROWS_PER_GROUP)
        if most > 1 and any(path.stat().st_size < PIECE_BYTES for path in files[kind]):
            raise ConfigError(
                f"--megabytes {arguments.megabytes:g}: {kind} files of less than {PIECE_BYTES} "
                "bytes, too few for every worker to have work; give more"
            )
    return files


def _speed_entry(case: Case, repeats: list[dict[Case, BareRun | PipelineRun]]) -> dict[str, Any]:
    def rate(of: Case) -> list[float]:
        return [runs[of].text_bytes / runs[of].seconds for runs in repeats]

    def cost(of: Case) -> list[float]:
        return [runs[of].cpu_seconds / runs[of].text_bytes for runs in repeats]

    def ratio(over: list[float], under: list[float]) -> float:
        return median(x / y for x, y in zip(over, under, strict=True))

    one, as_many = Case(BARE, 1), Case(BARE, case.workers)
    tokens = [runs[case].tokens / runs[case].seconds for runs in repeats]
    return {
        "case": case.name,
        "workers": case.workers,
        "megabytes_per_second": median(rate(case)) / MEGABYTE,
        "tokens_per_second": median(tokens),
        "of_bare_times_workers": ratio(rate(case), rate(one)) / case.workers,
        "of_bare_at_once": ratio(rate(case), rate(as_many)),
        "cpu_of_bare_at_once": ratio(cost(as_many), cost(case)),
        "repeats": [asdict(runs[case]) for runs in repeats],
    }


def memory_sources(
    arguments: argparse.Namespace, texts: Sequence[str], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Yield sources to measure memory with: described, and written only when it is their turn."""
    small, group = arguments.memory_megabytes, arguments.row_group_megabytes
    groups = f"parquet, row groups of {ROWS_PER_GROUP} rows"
    planned: list[tuple[str, float, int | None]] = [
        *((groups, size, ROWS_PER_GROUP) for size in (small, 4 * small)),
        ("parquet, one row group", group, None),
        *(("jsonl", size, None) for size in (small, 4 * small)),
    ]
    for name, size, rows in planned:
        if size > 0:
            path = folder / f"memory.{name.split(',')[0]}"
            write_texts(path, repeated(texts, int(size * MEGABYTE), "0"), rows)
            yield name, path
            path.unlink()


def measure_memory(
    arguments: argparse.Namespace, texts: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Run tokenize_fineweb on files of several sizes and shapes, and see what it holds."""
    results = []
    for name, path in memory_sources(arguments, texts, folder):
        size = path.stat().st_size
        note(f"memory: {name}, {size / MEGABYTE:.0f} MB")
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            run = run_pipeline(
                arguments.tokenizer, [path], MEMORY_WORKERS, Path(empty), _NOT_DEDUPED
            )
        results.append({"file": name, "file_bytes": size} | asdict(run))
    return results


def speed_table(speed: list[dict[str, Any]]) -> str:
    ratios = ["of reference x at once", "of as many bare", "by CPU time"]
    header = ["what", "at once", "MB/s", "tokens/s", *ratios]
    rows = [
        [
            entry["case"],
            str(entry["workers"]),
            f"{entry['megabytes_per_second']:.2f}",
            f"{entry['tokens_per_second']:,.0f}",
            f"{entry['of_bare_times_workers']:.3f}",
            f"{entry['of_bare_at_once']:.3f}",
            f"{entry['cpu_of_bare_at_once']:.3f}",
        ]
        for entry in speed
    ]
    return markdown_table(header, rows)


def memory_table(memory: list[dict[str, Any]]) -> str:
    header = ["file", "text, MB", "file, MB", "workers", "worker's peak", "at start", "main's peak"]

    def size(entry: dict[str, Any], *keys: str) -> list[str]:
        return [f"{entry[key] / MEGABYTE:.0f}" for key in keys]

    rows = [
        [
            entry["file"],
            *size(entry, "text_bytes", "file_bytes"),
            str(entry["workers"]),
            *size(entry, "worker_peak", "worker_start", "main_peak"),
        ]
        for entry in memory
    ]
    return markdown_table(header, rows)


SPEED_TEXT = (
    "Speed in MB of UTF-8 text, medians of {repeats} repeats, each of which measures every row in "
    "turn; {megabytes:g} MB of text for every process. The reference is the first row: "
    "`encode_batch_fast` in one process, without threads, in batches of 256 documents that are in "
    "memory, whose ids are not even fetched. `tokenizer(texts)` is the usual call. "
    "`tokenize_fineweb` is the whole command, from the moment at which a worker has come up and "
    "none of the text has been handed out, to the finished corpus: reading, hashing, "
    "de-duplication, the split, writing, checksums, and the end, at which some workers wait for "
    "the last piece.\n\n"
    "Ratios are taken within a repeat: to the reference times the number of processes; to as many "
    "bare tokenizers at once, since even these do not keep their speed side by side where cores "
    "share their units or other programs run; and by the CPU time of all processes per byte, "
    "bare over this, which waiting does not change."
)
MEMORY_TEXT = (
    "Memory is the peak resident size in MB, with Python and libraries: of the worker that held "
    "most, at the end and before its first document, and of the process that started the workers. "
    "A file too small for two workers is encoded by that process itself. It must not grow with "
    "the file or the row group."
)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an option out of its range."""
    if arguments.megabytes <= 0:
        raise ConfigError(f"--megabytes {arguments.megabytes:g}: must be above 0")
    for option, value in (("workers", min(arguments.workers)), ("repeats", arguments.repeats)):
        if value < 1:
            raise ConfigError(f"--{option} {value}: must be at least 1")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write the result."""
    check_arguments(arguments)
    vocabulary = len(load_tokenizer(arguments.tokenizer))
    texts = read_texts(arguments.source, max_bytes=int(arguments.megabytes * MEGABYTE))
    with tempfile.TemporaryDirectory(prefix="tokenization-") as name:
        speed = measure_speed(arguments, texts, Path(name))
        memory = measure_memory(arguments, texts, Path(name))
    tokenizer = arguments.tokenizer.resolve()
    source = f"{len(texts):,} texts of {Path(arguments.source).name}"
    paragraphs = [
        f"{tokenizer.name}: {vocabulary:,} pieces. {source}, repeated with a suffix.",
        SPEED_TEXT.format(repeats=arguments.repeats, megabytes=arguments.megabytes),
        speed_table(speed),
        MEMORY_TEXT,
        memory_table(memory),
    ]
    print("\n\n".join((paragraphs[2], paragraphs[4])))
    content = {
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": vocabulary,
            "sha256": sha256_of(tokenizer / "tokenizer.json"),
        },
        "source": {
            "name": Path(arguments.source).name,
            "texts": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
        },
        "speed": speed,
        "memory": memory,
    }
    title = f"Tokenizing with {tokenizer.name}"
    packages = (*PACKAGES, "tokenizers", "pyarrow", "numpy")
    write_results(arguments.output, title, "\n\n".join(paragraphs), content, packages)


def default_workers(cores: int) -> list[int]:
    """Return the powers of two below ``cores``, and ``cores``."""
    return [*(2**n for n in range((cores - 1).bit_length())), cores]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenization", description=__doc__)
    add = parser.add_argument
    cores = default_workers(len(os.sched_getaffinity(0)))
    add("--source", required=True, help="text: a local file, folder or glob")
    add("--tokenizer", type=Path, required=True, help="folder from train_tokenizer.py")
    add("--output", type=Path, required=True, help="JSON file; a .md is written beside it")
    add("--megabytes", type=float, default=100.0, help="text for each process (default 100)")
    add("--workers", type=int, nargs="+", default=cores, help="(default 1, 2, 4, ... cores)")
    add("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="of the source")
    add("--repeats", type=int, default=3, help="of every measurement of speed (default 3)")
    add("--memory_megabytes", type=float, default=50.0, help="text; and 4 times that; 0: none")
    add("--row_group_megabytes", type=float, default=400.0, help="text of one; 0: not measured")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        run(arguments)
    except ConfigError as error:
        note(f"tokenization: error: {error}")
        return 2
    except KeyboardInterrupt:
        note("tokenization: interrupted, no output written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
