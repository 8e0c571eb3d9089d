"""Turn text into the token files that training reads, in Megatron's indexed format.

``--source`` is a file, a folder or a glob of parquet, JSON lines and text files, or the name of a
dataset on the HuggingFace hub (only the data scripts ever talk to the hub). The output folder
holds ``train_text_document.{bin,idx}``, ``validation_text_document.{bin,idx}`` and
``manifest.json``. It appears complete or not at all, and is the same for any number of workers.

A run that was stopped in whatever way continues when the same command is given again.

Every document is its tokens and then one end-of-sequence token, which separates it from the next;
no beginning-of-sequence token is written. A document belongs to validation by a hash of its text,
so that the split survives re-runs, more data, and copies of a text under different ids. Of texts
that are exactly equal only the first is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from data_prep._common import (
    Progress,
    format_size,
    is_own,
    left_out,
    locked_folder,
    note,
    partial_of,
    refuse_existing,
    remove_own,
    run_script,
)
from data_prep._corpus import SPLITS, GrowingCorpus, State, check_settings
from data_prep._encoding import Encoder, encode_pieces
from data_prep._estimate import estimate, unfinished_bytes
from data_prep._pieces import PIECE_BYTES, Limits, Piece, cut
from data_prep._source import Source, find_source, refuse_output_within
from sdp_llm.cli import Parser
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of
from sdp_llm.training.progress import duration

__all__ = ["FORMAT_VERSION", "SPLITS", "main"]

FORMAT_VERSION = 2


def output_settings(
    arguments: argparse.Namespace, encoder: Encoder, source: Source
) -> dict[str, Any]:
    """Return all that decides the bytes of the output, as JSON values."""
    import tokenizers

    return {
        "source": arguments.source,
        "name": arguments.name,
        "revision": source.revision,
        "files": [[file.name, file.size] for file in source.files],
        "text_column": arguments.text_column,
        "max_documents": arguments.max_documents,
        "max_document_megabytes": arguments.max_document_megabytes,
        "validation_fraction": arguments.validation_fraction,
        "dedup": not arguments.no_dedup,
        "tokenizer_sha256": sha256_of(encoder.folder / "tokenizer.json"),
        "eos_id": encoder.eos_id,  # tokenizer_config.json decides it
        "tokenizers_version": tokenizers.__version__,
        "format_version": FORMAT_VERSION,
    }


def manifest(arguments: argparse.Namespace, encoder: Encoder, state: State) -> dict[str, Any]:
    """Describe the corpus: all that is needed to make it again."""
    return {
        "format": "megatron-mmap-indexed",
        "format_version": FORMAT_VERSION,
        "settings": state.settings,
        "tokenizer": {
            "path": str(arguments.tokenizer),
            "sha256": state.settings["tokenizer_sha256"],
            "vocab_size": encoder.vocab_size,
            "eos_id": encoder.eos_id,
        },
        "dtype": encoder.dtype.name,
        "documents_read": state.read,
        "dropped": dict(sorted(state.dropped.items())),
        "failed_files": state.failed_files,
        "splits": {split: asdict(counts) for split, counts in state.splits.items()},
    }


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a flag out of its range, or an output among the source."""
    if not 0.0 <= arguments.validation_fraction < 1.0:
        raise ConfigError(
            f"--validation_fraction {arguments.validation_fraction}: must be at least 0 and below 1"
        )
    for flag in ("workers", "max_documents", "max_document_megabytes"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    refuse_output_within(arguments.output, arguments.source)


def complete_already(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of ``output`` where it is what the command would make; None: not there.

    :raises ConfigError: It is something else, which is not overwritten.
    """
    described = _json(output / "manifest.json")
    if not described:
        refuse_existing(output)
        return None
    check_settings(output, described.get("settings", {}), settings)
    return described


def begun_revision(output: Path, source: str) -> str | None:
    """Return the commit of the hub dataset ``source`` of which ``output`` was begun."""
    for path in (output / "manifest.json", partial_of(output) / "state.json"):
        settings = _json(path).get("settings", {})
        if settings.get("source") == source:
            revision: str | None = settings["revision"]
            return revision
    return None


def _json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing where it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Watch:
    """The progress line: how far the run is, at what speed, and when it will end."""

    def __init__(self, source: Source, state: State) -> None:
        self._state = state
        self._progress = Progress("tokenize_fineweb")
        self._ends = [0, *accumulate(file.size for file in source.files)]
        self._first_tokens = state.tokens
        self._first_share: float | None = None
        self._share = 0.0

    def show(self, piece: Piece | None = None, *, last: bool = False) -> None:
        """Show the line, after ``piece`` was appended."""
        state, seconds = self._state, max(self._progress.seconds, 1e-3)
        if piece is not None:
            self._share = (self._ends[piece.file_number] + piece.end) / max(self._ends[-1], 1)
            limit = state.settings["max_documents"]
            if limit is not None:
                self._share = max(self._share, state.read / limit)
        if self._first_share is None:
            self._first_share = self._share
        done = self._share - self._first_share
        eta = duration(seconds * (1 - self._share) / done) if done > 0 else "unknown"
        rate = (state.tokens - self._first_tokens) / seconds
        self._progress.update(
            f"{state.read:,} documents, {state.tokens / 1e6:,.2f} M tokens, "
            f"{rate:,.0f} tokens/s, {self._share:.1%} of the source, ETA {eta}",
            last=last,
        )

    def say(self, message: str) -> None:
        """Show another message in the same place."""
        self._progress.update(message)


def check_space(
    arguments: argparse.Namespace, corpus: GrowingCorpus, source: Source, encoder: Encoder
) -> None:
    """Print what the run will take, and raise ConfigError if the disk has not as much."""
    limit, dedup = arguments.max_documents, not arguments.no_dedup
    expected = estimate(source, arguments.text_column, encoder, limit, dedup=dedup)
    if expected is None:
        return  # nothing to write; the run finds out why
    size = format_size(sum(file.size for file in source.files))
    count = f"{len(source.files)} file{'' if len(source.files) == 1 else 's'}"
    free = shutil.disk_usage(corpus.folder).free
    print(
        f"{arguments.source}: {count} of {size}; "
        f"{'roughly' if expected.is_guess else 'about'} {expected.documents:,.0f} documents and "
        f"{expected.tokens / 1e6:,.1f} M tokens, {format_size(expected.output_bytes)} to write, "
        f"{format_size(free)} are free"
    )
    if dedup:
        print(
            f"{arguments.source}: finding duplicates takes 16 bytes a document: "
            f"{format_size(expected.hash_bytes)} of memory (twice that for moments) and of disk; "
            "--no_dedup: none"
        )
    sys.stdout.flush()
    written = corpus.state.tokens * encoder.dtype.itemsize
    needed = expected.output_bytes + unfinished_bytes(arguments.workers) - written
    if needed > free:
        text = (
            f"--output {arguments.output}: needs {format_size(needed)} more, {format_size(free)} "
            "are free there; free some or choose another disk"
        )
        if not expected.is_guess:
            raise ConfigError(text)
        guessed = "a guess, as the source is packed"
        print(f"tokenize_fineweb: warning: {text} ({guessed})", file=sys.stderr)


def fill(
    arguments: argparse.Namespace, corpus: GrowingCorpus, source: Source, encoder: Encoder
) -> None:
    """Tokenize what the corpus lacks of the source, and append it."""
    state, watch = corpus.state, Watch(source, corpus.state)
    watch.show()
    limit = arguments.max_documents
    if limit is None or state.read < limit:
        column, place = arguments.text_column, (state.file_number, state.part)
        pieces = cut(source, column, encoder.limits, *place)
        # Starting a process takes longer than encoding a piece.
        size = sum(file.size for file in source.files)
        workers = min(arguments.workers, max(1, size // PIECE_BYTES))
        for piece, encoded in encode_pieces(pieces, encoder, source, corpus.pieces, workers):
            corpus.append(encoded, piece.file.name, (piece.file_number, piece.part + 1))
            watch.show(piece)
            if limit is not None and state.read >= limit:
                break
    watch.show(last=True)


def tokenize(arguments: argparse.Namespace) -> None:
    """Make the corpus folder ``--output``, or go on with it, and print its counts.

    :raises OSError: The corpus is made, but some files of the source could not be read whole.
    """
    check_arguments(arguments)
    limits = Limits(text_bytes=arguments.max_document_megabytes * 1_000_000)
    encoder = Encoder(arguments.tokenizer, limits)
    output: Path = arguments.output
    # A dataset may have had commits since: the corpus is of the one that it was begun with.
    revision = begun_revision(output, arguments.source)
    source = find_source(arguments.source, arguments.name, revision=revision)
    settings = output_settings(arguments, encoder, source)
    described = complete_already(output, settings) if os.path.lexists(output) else None
    if described is not None:
        if is_own(partial_of(output)):  # from a run that was killed after its last action
            with suppress(OSError):  # it takes space, but the corpus is there
                remove_own(partial_of(output))
        print(f"{output}: complete already")
        refuse_failed(output, described.get("failed_files", []))
        return
    with locked_folder(output) as folder:
        corpus = GrowingCorpus(folder, settings, encoder.dtype)
        try:
            if corpus.state.read:
                print(f"{output}: going on after {corpus.state.read:,} documents", flush=True)
            check_space(arguments, corpus, source, encoder)
            fill(arguments, corpus, source, encoder)
            if not corpus.state.tokens:
                raise no_text(arguments, corpus.state)
            described = manifest(arguments, encoder, corpus.state)
            corpus.finish(output, described, lambda text: print(f"{output}: {text}", flush=True))
        except BaseException as error:
            if not corpus.state.tokens:
                corpus.close()
                remove_own(folder)
            elif isinstance(error, (OSError, KeyboardInterrupt)):
                with suppress(OSError):  # a full disk; the pieces are there even so
                    corpus.save()
                note(f"{folder} keeps what is done; the same command goes on from there")
            raise
    report(output, corpus.state)


def no_text(arguments: argparse.Namespace, state: State) -> ConfigError:
    """Return the error for a source without any text, with what there is instead."""
    reasons = [left_out(state.dropped)] if state.dropped else []
    reasons += ["{file}: {error}".format(**failed) for failed in state.failed_files[:3]]
    if len(state.failed_files) > 3:
        reasons.append(f"and {len(state.failed_files) - 3} more files")
    return ConfigError(
        f"--source {arguments.source}: {state.read} documents and no text in column "
        f"{arguments.text_column!r}: {'; '.join(reasons) or 'the files are empty'}; check the "
        "files and --text_column"
    )


def report(output: Path, state: State) -> None:
    """Print what the corpus holds; raise OSError if files could not be read whole."""
    for split, counts in state.splits.items():
        print(f"{output}: {split}: {counts.documents:,} documents, {counts.tokens:,} tokens")
        if not counts.documents:
            print(f"tokenize_fineweb: warning: the {split} split is empty", file=sys.stderr)
    if state.dropped:
        print(f"{output}: left out: {left_out(state.dropped)}")
    refuse_failed(output, state.failed_files)


def refuse_failed(output: Path, failed_files: list[dict[str, str]]) -> None:
    """Raise OSError if files could not be read whole."""
    if failed_files:
        listed = "; ".join(f"{failed['file']}: {failed['error']}" for failed in failed_files)
        raise OSError(
            f"{output} is complete but for what could not be read: {listed}; to have that too, "
            f"mend the files, remove {output} and start again"
        )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", required=True, help="file, folder, glob, or name of a dataset on the hub")
    add("--name", help="configuration of the hub dataset, such as sample-10BT")
    add("--tokenizer", type=Path, required=True, help="folder that AutoTokenizer loads")
    add("--output", type=Path, required=True, help="folder to write")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )
    add("--validation_fraction", type=float, default=0.005, help="share held out (default 0.005)")
    add("--max_documents", type=int, help="stop after this many documents of the source")
    add("--max_document_megabytes", type=int, default=8, help="leave out longer texts (default 8)")
    add("--no_dedup", action="store_true", help="keep texts that are exactly equal")
    add("--text_column", default="text", help="column of the text (default text)")
    return run_script("tokenize_fineweb", tokenize, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
