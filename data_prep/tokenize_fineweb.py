"""Turn text into the token files that training reads, in Megatron's indexed format.

``--source`` is a file, a folder or a glob of txt, jsonl and parquet files, or the name of a
dataset on the HuggingFace hub (only this script ever talks to the hub). The output folder holds
``train_text_document.{bin,idx}``, ``validation_text_document.{bin,idx}`` and ``manifest.json``; it
appears complete or not at all, and is the same for any number of workers.

Every document is its tokens and then one end-of-sequence token, which separates it from the next;
no beginning-of-sequence token is written. A document belongs to validation by a hash of its text,
so that the split survives re-runs, more data, and copies of a text under different ids.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import numpy as np
import numpy.typing as npt

from data_prep._common import (
    Progress,
    new_folder,
    read_source,
    refuse_existing,
    run_script,
    sha256_of,
)
from data_prep._encoding import Encoded, Encoder, encode_all
from sdp_llm.data.indexed import IndexedDatasetWriter
from sdp_llm.errors import ConfigError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")


@dataclass
class Counts:
    """What went into one split."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0


@dataclass
class Totals:
    """What a run has read and written so far."""

    splits: dict[str, Counts] = field(default_factory=lambda: {s: Counts() for s in SPLITS})
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(counts.tokens for counts in self.splits.values())


def write_splits(chunks: Iterable[Encoded], folder: Path, dtype: npt.DTypeLike) -> Totals:
    """Write the token files of both splits into ``folder`` and count what goes in."""
    totals = Totals()
    progress = Progress("tokenize_fineweb")

    def show(*, last: bool = False) -> None:
        rate = totals.tokens / max(progress.seconds, 1e-3)
        progress.update(
            f"{totals.read} documents, {totals.tokens / 1e6:.2f} M tokens, {rate:,.0f} tokens/s",
            last=last,
        )

    with (
        IndexedDatasetWriter(folder / "train_text_document", dtype) as train,
        IndexedDatasetWriter(folder / "validation_text_document", dtype) as validation,
    ):
        show()
        for chunk in chunks:
            ends = np.cumsum(chunk.lengths, dtype=np.int64)
            for start, end, held_out in zip(
                ends - chunk.lengths, ends, chunk.validation, strict=True
            ):
                (validation if held_out else train).add_document(chunk.ids[start:end])
            for split, mask in zip(SPLITS, (~chunk.validation, chunk.validation), strict=True):
                counts = totals.splits[split]
                counts.documents += int(mask.sum())
                counts.tokens += int(chunk.lengths[mask].sum())
                counts.utf8_bytes += int(chunk.sizes[mask].sum())
            totals.dropped += chunk.dropped
            totals.read += chunk.read
            show()
    show(last=True)
    return totals


def manifest(
    arguments: argparse.Namespace, encoder: Encoder, totals: Totals, folder: Path
) -> dict[str, Any]:
    """Describe the corpus in ``folder``: where it is from, what is in it, how to verify it."""
    return {
        "format": "megatron-mmap-indexed",
        "format_version": FORMAT_VERSION,
        "source": arguments.source,
        "name": arguments.name,
        "text_column": arguments.text_column,
        "max_documents": arguments.max_documents,
        "validation_fraction": arguments.validation_fraction,
        "tokenizer": {
            "path": str(arguments.tokenizer),
            "sha256": sha256_of(arguments.tokenizer / "tokenizer.json"),
            "vocab_size": encoder.vocab_size,
            "eos_id": encoder.eos_id,
        },
        "dtype": encoder.dtype.name,
        "documents_read": totals.read,
        "dropped": dict(sorted(totals.dropped.items())),
        "splits": {split: vars(counts) for split, counts in totals.splits.items()},
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.glob("*_document.*"))},
    }


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a flag out of its range."""
    if not 0.0 <= arguments.validation_fraction < 1.0:
        raise ConfigError(
            f"--validation_fraction {arguments.validation_fraction}: must be at least 0 and below 1"
        )
    for flag in ("workers", "max_documents"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    refuse_existing(arguments.output)


def tokenize(arguments: argparse.Namespace) -> None:
    """Write the corpus folder ``--output``, complete or not at all, and print its counts."""
    check_arguments(arguments)
    encoder = Encoder(arguments.tokenizer, arguments.validation_fraction)
    source = read_source(arguments.source, arguments.name, arguments.text_column)
    with new_folder(arguments.output) as folder:
        chunks = encode_all(
            islice(source, arguments.max_documents),
            encoder,
            workers=arguments.workers,
            tokenizer_folder=arguments.tokenizer,
            validation_fraction=arguments.validation_fraction,
        )
        totals = write_splits(chunks, folder, encoder.dtype)
        if not totals.tokens:
            raise ConfigError(
                f"--source {arguments.source}: {totals.read} documents and no text in column "
                f"{arguments.text_column!r}; check the files and --text_column"
            )
        described = manifest(arguments, encoder, totals, folder)
        (folder / "manifest.json").write_text(json.dumps(described, indent=2) + "\n")
    for split, counts in totals.splits.items():
        print(f"{arguments.output}: {split}: {counts.documents} documents, {counts.tokens} tokens")
        if not counts.documents:
            print(f"tokenize_fineweb: warning: the {split} split is empty", file=sys.stderr)
    if totals.dropped:
        print(f"{arguments.output}: dropped {dict(totals.dropped)}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--source", required=True, help="file, folder, glob, or name of a dataset on the hub")
    add("--name", help="configuration of the hub dataset, such as sample-10BT")
    add("--tokenizer", type=Path, required=True, help="folder from train_tokenizer.py")
    add("--output", type=Path, required=True, help="folder to write")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    add("--validation_fraction", type=float, default=0.005, help="of the documents (0.005)")
    add("--max_documents", type=int, help="stop after this many documents of the source")
    add("--text_column", default="text", help="column of the text (default text)")
    return run_script("tokenize_fineweb", tokenize, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
