"""Pieces to token ids, in one process or several, each to files of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep._pieces import Limits, Piece
from data_prep._reading import Document, UnreadableFile, Unusable
from data_prep._seen import HASH, hash_text
from data_prep._source import Source
from data_prep._tokenizer import encode_with_backend, load_tokenizer, vocabulary_size
from sdp_llm.data.indexed import best_dtype
from sdp_llm.errors import ConfigError

# Set before tokenizers is used, and inherited by the workers: one process per core scales, threads
# in every process would fight over the cores.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000
IN_FLIGHT = 2  # pieces per worker: none waits for work, and few lie on the disk unfinished

# One row per document of an encoded piece; `position` counts the rows of the source, so that
# gaps show where a row was left out.
ROW = np.dtype([("position", "<i8"), ("tokens", "<i4"), ("bytes", "<i8"), ("hash", HASH)])


class Encoder:
    """Encodes documents with one tokenizer; every worker process gets a copy.

    It holds no more of the tokenizer than encoding takes: a worker that loaded it with transformers
    would import torch too, some seconds and 200 MB for each.
    """

    def __init__(self, tokenizer_folder: Path, limits: Limits) -> None:
        self.folder = tokenizer_folder
        self.limits = limits
        tokenizer = load_tokenizer(tokenizer_folder)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"--tokenizer {tokenizer_folder}: has no eos token, which separates documents"
            )
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = best_dtype(self.vocab_size)
        self._backend = tokenizer.backend_tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, ending with eos."""
        rows = encode_with_backend(self._backend, texts)
        for row in rows:
            row.append(self.eos_id)
        return rows

    def usable(self, document: Document) -> bytes | Unusable:
        """Return the UTF-8 of a document, or why it cannot be used."""
        if isinstance(document, Unusable):
            return document
        if not document.strip():
            return Unusable.EMPTY
        try:
            data = document.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            return Unusable.INVALID_UNICODE
        return Unusable.TOO_LONG if len(data) > self.limits.text_bytes else data


@dataclass(frozen=True)
class EncodedPiece:
    """The files of one encoded piece: ids back to back, a ``ROW`` per document, and the rest.

    Attributes:
        read: Rows of the source that the piece had.
        dropped: (position, reason) of each row left out.
        failure: Why the rest of the piece could not be read; None if it could.
    """

    stem: Path
    read: int
    dropped: list[tuple[int, str]]
    failure: str | None

    @classmethod
    def load(cls, folder: Path, name: str) -> EncodedPiece | None:
        """Return the piece ``name``, or None if it is not there complete."""
        try:
            described = json.loads((folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        dropped = [(position, reason) for position, reason in described["dropped"]]
        return cls(folder / name, described["read"], dropped, described["failure"])

    def rows(self) -> npt.NDArray[Any]:
        """The documents, ``ROW`` of shape [documents]."""
        return np.fromfile(self.stem.with_suffix(".rows"), dtype=ROW)

    def ids(self, dtype: npt.DTypeLike, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens ``start`` to ``stop`` of all documents together."""
        path, size = self.stem.with_suffix(".ids"), np.dtype(dtype).itemsize
        return np.fromfile(path, dtype, count=stop - start, offset=start * size)

    def remove(self) -> None:
        """Delete the files; the one that makes the others count goes first."""
        for suffix in (".json", ".rows", ".ids"):
            self.stem.with_suffix(suffix).unlink(missing_ok=True)


def encode_piece(encoder: Encoder, source: Source, piece: Piece, folder: Path) -> None:
    """Write the files of :class:`EncodedPiece` into ``folder``, unless they are there.

    A file that breaks off in the piece gives the documents before the break, and the failure.

    :raises HubUnreachable: The file is on the hub, which does not answer.
    """
    stem = folder / piece.name
    if stem.with_suffix(".json").exists():
        return
    read = 0
    dropped: list[tuple[int, str]] = []
    failure = None
    texts: list[str] = []
    rows: list[tuple[int, int, int, bytes]] = []
    characters = 0
    with _appearing(stem, ".ids") as ids_file, _appearing(stem, ".rows") as rows_file:

        def flush() -> None:
            nonlocal characters
            encoded = encoder.encode(texts)
            ids_file.write(np.fromiter(chain.from_iterable(encoded), encoder.dtype).tobytes())
            table = np.array(rows, dtype=ROW)
            table["tokens"] = [len(row) for row in encoded]
            rows_file.write(table.tobytes())
            texts.clear()
            rows.clear()
            characters = 0

        try:
            for document in piece.documents(source):
                data = encoder.usable(document)
                if isinstance(data, Unusable):
                    dropped.append((read, data.value))
                else:
                    assert isinstance(document, str)
                    texts.append(document)
                    rows.append((read, 0, len(data), hash_text(data)))
                    characters += len(document)
                read += 1
                if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                    flush()
        except UnreadableFile as error:
            failure = str(error)
        if texts:
            flush()
    # Last: where it exists, the other two are complete.
    with _appearing(stem, ".json") as stream:
        described = {"read": read, "dropped": dropped, "failure": failure}
        stream.write(json.dumps(described).encode())


@contextmanager
def _appearing(stem: Path, suffix: str) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when the block has ended well."""
    # The process's own name for it: an orphan of a killed run may still be writing the same piece.
    temporary = stem.with_suffix(f"{suffix}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        yield stream
    temporary.rename(stem.with_suffix(suffix))


_job: tuple[Encoder, Source] | None = None  # of this worker process


def _start_worker(encoder: Encoder, source: Source) -> None:
    global _job
    # Before anything slow: a worker whose parent was killed would wait for work forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _job = encoder, source


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(piece: Piece, folder: Path) -> None:
    assert _job is not None
    encoder, source = _job
    encode_piece(encoder, source, piece, folder)


def encode_pieces(
    pieces: Iterable[Piece], encoder: Encoder, source: Source, folder: Path, workers: int
) -> Iterator[tuple[Piece, EncodedPiece]]:
    """Encode pieces and yield each with its files, in order, whatever the number of workers.

    At most ``IN_FLIGHT`` pieces per worker are under way. One worker is this process.

    :raises OSError: A worker process was killed.
    """
    if workers == 1:
        for piece in pieces:
            encode_piece(encoder, source, piece, folder)
            yield piece, _finished(folder, piece)
        return
    # "spawn": the libraries that read the source run threads, which a fork would break.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder, source),
    )
    pending: deque[tuple[Piece, Future[None] | None]] = deque()

    def oldest() -> tuple[Piece, EncodedPiece]:
        piece, future = pending.popleft()
        if future is not None:
            future.result()
        return piece, _finished(folder, piece)

    try:
        for piece in pieces:
            is_there = EncodedPiece.load(folder, piece.name) is not None  # from a killed run
            future = None if is_there else pool.submit(_encode_in_worker, piece, folder)
            pending.append((piece, future))
            if len(pending) >= IN_FLIGHT * workers:
                yield oldest()
        while pending:
            yield oldest()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely for lack of memory") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(folder: Path, piece: Piece) -> EncodedPiece:
    encoded = EncodedPiece.load(folder, piece.name)
    assert encoded is not None
    return encoded
