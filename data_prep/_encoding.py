"""Documents to token ids, in one process or several, in the order of the source."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep._common import encode_plain, load_tokenizer
from sdp_llm.data.indexed import best_dtype
from sdp_llm.errors import ConfigError

# Set before tokenizers is used, and inherited by the workers: one process per core scales, threads
# in every process would fight over the cores.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1_000_000
_CHUNKS_IN_THIS_PROCESS = 16  # a smaller source is done before worker processes have started
_CHUNKS_IN_FLIGHT = 3  # per worker: enough that none waits, few enough to bound the memory


@dataclass
class Encoded:
    """One chunk of documents after tokenization.

    Attributes:
        ids: Tokens of all documents back to back, each ending with eos, of the corpus's dtype.
        lengths: Tokens per document, int32.
        validation: Which documents belong to the validation split, bool.
        sizes: UTF-8 bytes per document, int64.
        dropped: Reason -> number of documents left out.
        read: Documents that came in.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    validation: npt.NDArray[np.bool_]
    sizes: npt.NDArray[np.int64]
    dropped: Counter[str]
    read: int


class Encoder:
    """Encode chunks of documents with one tokenizer; each worker process has one."""

    def __init__(self, tokenizer_folder: Path, validation_fraction: float) -> None:
        self._tokenizer = load_tokenizer(tokenizer_folder)
        self._eos = self._tokenizer.eos_token_id
        if self._eos is None:
            raise ConfigError(
                f"--tokenizer {tokenizer_folder}: has no eos token, which separates documents"
            )
        self.vocab_size = len(self._tokenizer)
        self.dtype = best_dtype(self.vocab_size)
        self._fraction = validation_fraction

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return int(self._eos)

    def encode(self, documents: list[Any]) -> Encoded:
        """Tokenize ``documents``; what is not usable text is counted by reason and left out."""
        texts, sizes, validation = [], [], []
        dropped: Counter[str] = Counter()
        for text in documents:
            if text is None or (isinstance(text, str) and not text.strip()):
                dropped["empty"] += 1
                continue
            if not isinstance(text, str):
                dropped["not_text"] += 1
                continue
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
                dropped["invalid_unicode"] += 1
                continue
            texts.append(text)
            sizes.append(len(data))
            validation.append(in_validation(data, self._fraction))
        rows = encode_plain(self._tokenizer, texts)
        for row in rows:
            row.append(self._eos)
        return Encoded(
            ids=np.fromiter(chain.from_iterable(rows), dtype=self.dtype),
            lengths=np.array([len(row) for row in rows], dtype=np.int32),
            validation=np.array(validation, dtype=np.bool_),
            sizes=np.array(sizes, dtype=np.int64),
            dropped=dropped,
            read=len(documents),
        )


def in_validation(text: bytes, fraction: float) -> bool:
    """Return whether a text belongs to validation: its hash is in the lowest ``fraction``."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


_encoder: Encoder | None = None  # of this worker process


def _start_worker(tokenizer_folder: Path, validation_fraction: float) -> None:
    global _encoder
    _encoder = Encoder(tokenizer_folder, validation_fraction)


def _encode_in_worker(documents: list[Any]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(documents)


def chunked(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut a stream into lists of bounded length, in documents and in characters."""
    chunk: list[Any] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_all(
    documents: Iterable[Any],
    encoder: Encoder,
    *,
    workers: int,
    tokenizer_folder: Path,
    validation_fraction: float,
) -> Iterator[Encoded]:
    """Yield the encoded chunks in the order of the source, whatever the number of workers.

    One worker, or a small source, is encoded by this process. At most a few chunks per worker are
    under way, so that memory does not depend on the size of the source.

    :raises OSError: A worker process was killed.
    """
    chunks = chunked(documents)
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    first = list(islice(chunks, _CHUNKS_IN_THIS_PROCESS))
    rest = next(chunks, None)
    if rest is None:
        yield from map(encoder.encode, first)
        return
    # "spawn": the libraries that read the source run threads, which a fork would break.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_folder, validation_fraction),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chain(first, [rest], chunks):
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= _CHUNKS_IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely for lack of memory") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
