"""What the data scripts share: reading documents, progress, outputs that appear complete."""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sdp_llm.errors import ConfigError

# Suffix -> builder of the `datasets` library. It unpacks .gz and .zst by itself.
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")


def run_script(
    script: str, run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace
) -> int:
    """Call ``run`` and turn what a person can cause into one line on stderr and a status.

    :returns: 0, 2 for wrong input, 1 for a failing disk or network, 130 when interrupted.
    """
    # On a terminal the message replaces the progress line that it interrupts.
    name = "\r\x1b[2K" + script if sys.stderr.isatty() else script
    try:
        run(arguments)
    except (ConfigError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted, no output written", file=sys.stderr)
        return 130
    return 0


def _builder(path: str) -> str | None:
    for suffix in _COMPRESSED:
        path = path.removesuffix(suffix)
    return _BUILDERS.get(Path(path).suffix)


def find_files(source: str) -> list[str]:
    """Return the text files that a path, a folder or a glob pattern names, sorted.

    A folder stands for every file below it with a known suffix.

    :returns: Paths; empty when nothing of this name is on the disk.
    :raises ConfigError: A file has an unknown suffix, or a folder holds no text file.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.is_file() and _builder(p.name))
        if not files:
            raise ConfigError(f"{source}: no .txt, .jsonl or .parquet file in this folder")
        return files
    files = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    for file in files:
        if _builder(file) is None:
            raise ConfigError(
                f"{file}: unknown suffix; use .txt, .jsonl or .parquet (.txt and .jsonl also "
                "with .gz or .zst)"
            )
    return files


def read_file(path: str, text_column: str) -> Iterator[Any]:
    """Yield the documents of one local file, in order, without holding the file in memory.

    A row of JSONL or parquet is a document. A .txt file holds documents separated by blank lines.

    :returns: The value of the text column: a str, or None and other types where the data is bad.
    :raises ConfigError: The file cannot be read, or has no such column.
    """
    from datasets import load_dataset

    builder = _builder(path)
    options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
    column = "text" if builder == "text" else text_column
    # Brackets in a name are a pattern to `datasets`.
    files = [glob.escape(os.path.abspath(path))]
    try:
        stream = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        yield from _column(stream, column, path)
    except ConfigError:
        raise
    except Exception as error:  # datasets, pyarrow and fsspec each raise their own kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{path}: cannot be read as {builder}: {reason}") from error


def read_hub(source: str, name: str | None, text_column: str) -> Iterator[Any]:
    """Yield the documents of the train split of a dataset on the HuggingFace hub, streamed.

    :raises ConfigError: There is no such dataset, configuration or column, or the hub is
        unreachable.
    """
    from datasets import load_dataset

    try:
        stream = load_dataset(source, name=name, split="train", streaming=True)
        yield from _column(stream, text_column, source)
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"--source {source}: no such file or pattern, and not readable from the hub: {reason}"
        ) from error


def _column(stream: Any, column: str, where: str) -> Iterator[Any]:
    names: list[str] | None = None
    for row in stream:
        if names is None:
            names = sorted(row)
            if column not in row:
                raise ConfigError(
                    f"{where}: no column {column!r}, it has {', '.join(names)}; set --text_column"
                )
        yield row.get(column)


def read_source(source: str, name: str | None, text_column: str) -> Iterator[Any]:
    """Yield the documents of local files (path, folder, glob) or of a dataset on the hub.

    :raises ConfigError: see :func:`find_files`, :func:`read_file`, :func:`read_hub`.
    """
    files = find_files(source)
    if not files:
        looks_local = source.count("/") != 1 or source.startswith((".", "/", "~")) or "*" in source
        if looks_local or _builder(source):
            raise ConfigError(f"--source {source}: no such file; give a file, a folder or a glob")
        yield from read_hub(source, name, text_column)
    for file in files:
        yield from read_file(file, text_column)


class Progress:
    """One line on stderr: rewritten in place on a terminal, a new line now and then in a pipe."""

    def __init__(self, label: str, stream: IO[str] | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._interval = 0.2 if self._live else 5.0  # seconds
        self._next = 0.0  # the first call prints, so that a person sees at once that it runs
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, message: str, *, last: bool = False) -> None:
        """Show ``message`` unless a line was shown just before; the ``last`` is always shown."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + self._interval
        line = f"{self._label}: {message}"
        if self._live:
            self._stream.write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def refuse_existing(path: Path) -> None:
    """Raise ConfigError if ``--output`` exists: no script overwrites what may have taken a day."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--output {path}: exists and is not overwritten; remove or rename it")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield OUTPUT.partial to write into; it becomes OUTPUT when the block ends well.

    When the block raises, the partial folder is removed. What a killed run left is cleared; a
    lock on the folder keeps two runs from writing into it at the same time.

    :raises ConfigError: OUTPUT exists, is being written by another run, or cannot be written.
    """
    refuse_existing(output)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--output {output}: another run is writing {partial}") from error
        try:
            _clear(partial)
            yield partial
            _sync_tree(partial)
            refuse_existing(output)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    try:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from error


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that the trained model is exported with: ``AutoTokenizer``'s, from disk.


    :raises ConfigError: The folder is missing, or transformers cannot load a fast tokenizer from
        it.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--tokenizer {folder}: no such folder; make one with `python "
            "data_prep/train_tokenizer.py`"
        )
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        # transformers would convert it each time, and needs protobuf for that.
        raise ConfigError(
            f"--tokenizer {folder}: has tokenizer.model but no tokenizer.json; convert it with "
            f"`python data_prep/train_tokenizer.py --output DIR "
            f"--from_model {folder}/tokenizer.model`"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--tokenizer {folder}: not a tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"--tokenizer {folder}: has no tokenizer.json (a fast tokenizer)")
    return tokenizer


def encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text: no bos or eos added, and no markup read from the text.

    A document that spells out ``</s>`` gets the tokens of these four characters; it must not be
    able to write the separator of documents. The backend of ``tokenizer`` is called directly,
    which skips offsets and masks: about a third faster than calling the tokenizer.

    :returns: Token ids, one list per text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
