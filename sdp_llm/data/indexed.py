"""Megatron's memory-mapped indexed dataset: a pair of files, PREFIX.bin and PREFIX.idx.

The layout is Megatron-LM's (``megatron/core/datasets/indexed_dataset.py``), so that corpora move
freely between the two. ``.bin`` is the token ids of all sequences, back to back. ``.idx`` is, all
little-endian:

====== ======= =====================================================================
bytes  dtype   content
====== ======= =====================================================================
9              magic ``MMIDIDX\\0\\0``
8      uint64  version, 1
1      uint8   dtype code of the ids in ``.bin`` (``_DTYPE_BY_CODE``)
8      uint64  number of sequences Q
8      uint64  number of document indices D: documents + 1, since the list starts at 0
4 Q    int32   tokens per sequence
8 Q    int64   byte offset of each sequence in ``.bin``
8 D    int64   document d is the sequences ``[index[d], index[d + 1])``
====== ======= =====================================================================

The writer makes every document one sequence; the reader takes any number of them.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sdp_llm.errors import ConfigError
from sdp_llm.files import from_here, sync

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_BY_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_CODE_BY_DTYPE = {dtype: code for code, dtype in _DTYPE_BY_CODE.items()}
_REMAKE = "make the corpus again with `python data_prep/tokenize_fineweb.py`"
_ROWS = 1 << 20  # index entries at a time: bounds the memory of writing and opening a dataset


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype Megatron stores ids of this vocabulary in: uint16 below 65500, else int32.

    Megatron's limit is 65500 and not 65536; following it keeps the files byte-identical.
    """
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def _paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    # Not with_suffix: it would eat the end of a prefix with a dot in it, such as "corpus-v1.5".
    return Path(f"{os.fspath(prefix)}.bin"), Path(f"{os.fspath(prefix)}.idx")


def _meant_instead(prefix: str) -> str:
    """The fix for a prefix without files: perhaps a file or a folder was named."""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    if stem != prefix and all(path.is_file() for path in _paths(stem)):
        return f"name the corpus without the suffix, as {stem}"
    inside = sorted(str(path) for path in Path(prefix).glob("*.idx"))
    if inside:
        return f"name a corpus in this folder, such as {inside[0].removesuffix('.idx')}"
    return _REMAKE


def write_index(path: Path, lengths: npt.NDArray[np.integer], dtype: npt.DTypeLike) -> None:
    """Write the .idx of a .bin in which every document is one sequence, and flush it to disk.

    :param lengths: Tokens per document, shape [documents].
    :param dtype: Of the ids in the .bin.
    """
    itemsize = np.dtype(dtype).itemsize
    code = _CODE_BY_DTYPE[np.dtype(dtype).newbyteorder("<")]
    count = len(lengths)
    parts = [lengths[start : start + _ROWS] for start in range(0, count, _ROWS)]
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        for part in parts:
            stream.write(part.astype("<i4", copy=False).tobytes())
        position = 0
        for part in parts:
            ends = position + np.cumsum(part, dtype=np.int64) * itemsize
            stream.write((ends - part.astype(np.int64) * itemsize).astype("<i8").tobytes())
            position = int(ends[-1])
        for start in range(0, count + 1, _ROWS):
            documents = np.arange(start, min(start + _ROWS, count + 1), dtype="<i8")
            stream.write(documents.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


class IndexedDatasetWriter:
    """Write documents to PREFIX.bin and PREFIX.idx; both appear, complete, at :meth:`close`.

    Until then they have the names PREFIX.bin.tmp and PREFIX.idx.tmp. Used as a context manager it
    closes at the end of the block, and removes the temporary files when the block raises.

    :param prefix: Path without ``.bin`` / ``.idx``; its folder must exist.
    :param dtype: Integer dtype of the ids on disk, see :func:`best_dtype`.
    :raises ConfigError: The dtype is not an integer type of the format, or the files exist already.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODE_BY_DTYPE or self.dtype.kind not in "ui":
            raise ConfigError(
                f"{os.fspath(prefix)}: dtype {self.dtype.name} is no integer type of this format; "
                "use uint16 or int32"
            )
        self._final = _paths(prefix)
        for path in self._final:
            if path.exists():
                raise ConfigError(f"{path}: exists and is not overwritten; remove it or rename it")
        self._temporary = tuple(path.with_name(path.name + ".tmp") for path in self._final)
        self._lengths = array("i")  # 4 bytes a document: 15 M documents stay in 60 MB
        self._bin: BinaryIO | None = self._temporary[0].open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document of ``ids``, shape [length], any integer dtype.

        :raises ValueError: ``ids`` is not one-dimensional, has an id that ``dtype`` cannot hold
            (which numpy would wrap silently), or the writer is closed.
        """
        if self._bin is None:
            raise ValueError(f"{self._final[0]}: the writer is closed")
        values = np.asarray(ids)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "ui"):
            raise ValueError(
                f"ids must be integers of shape [length], got {values.dtype} of {values.shape}"
            )
        if values.size and values.dtype != self.dtype:
            low, high, limits = int(values.min()), int(values.max()), np.iinfo(self.dtype)
            if low < limits.min or high > limits.max:
                raise ValueError(f"ids in [{low}, {high}] do not fit into {self.dtype.name}")
        self._bin.write(values.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(values))

    def close(self) -> None:
        """Write the index, flush both files to disk and give them their final names."""
        if self._bin is None:
            return
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        self._bin = None
        write_index(self._temporary[1], np.frombuffer(self._lengths, dtype=np.intc), self.dtype)
        # The index last: where it exists, its .bin is complete.
        for temporary, final in zip(self._temporary, self._final, strict=True):
            temporary.rename(final)
        sync(self._final[0].parent)

    def abort(self) -> None:
        """Remove what was written; nothing appears under the final names."""
        if self._bin is not None:
            self._bin.close()
            self._bin = None
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:  # such as a full disk: leave no half-written files behind
            self.abort()
            raise


class IndexedDataset:
    """Read PREFIX.bin and PREFIX.idx through memory maps; opening reads the index once.

    :param prefix: Path without ``.bin`` / ``.idx``.
    :raises ConfigError: A file is missing, is not in this format, or the two do not fit together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._bin_path, self._idx_path = _paths(prefix)
        for path in (self._bin_path, self._idx_path):
            if not path.is_file():
                raise ConfigError(
                    f"{path}: no such file{from_here(path)}; {_meant_instead(self.prefix)}"
                )
        self._read_header()
        self._check_index()
        size = self._bin_path.stat().st_size
        expected = self.num_tokens * self.dtype.itemsize
        if size != expected:
            raise ConfigError(
                f"{self._bin_path}: {size} bytes, its index describes {expected}; the file is "
                f"truncated or belongs to another index; {_REMAKE}"
            )
        # mmap refuses an empty file, which is a valid corpus of no tokens.
        self._tokens: npt.NDArray[Any] = (
            np.memmap(self._bin_path, dtype=self.dtype, mode="r")
            if size
            else np.empty(0, self.dtype)
        )

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # To another process goes the path, not the tokens that the memory map shows.
        return type(self), (self.prefix,)

    def _corrupt(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._idx_path}: {reason}; {_REMAKE}")

    def _read_header(self) -> None:
        with self._idx_path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._corrupt("not a Megatron index (it must start with MMIDIDX)")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION:
            raise self._corrupt(f"version {version}, only version {_VERSION} is known")
        if code not in _DTYPE_BY_CODE or _DTYPE_BY_CODE[code].kind not in "ui":
            raise self._corrupt(f"dtype code {code} is not an integer type")
        self.dtype: np.dtype[Any] = _DTYPE_BY_CODE[code]
        size = self._idx_path.stat().st_size
        expected = _HEADER.size + 12 * sequences + 8 * documents
        # A multimodal index carries one int8 per sequence at the end: text readers may ignore it.
        if documents < 1 or size not in (expected, expected + sequences):
            raise self._corrupt(f"{size} bytes where its header describes {expected}")
        raw = np.memmap(self._idx_path, dtype=np.uint8, mode="r")
        bounds = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * documents])
        parts = [raw[start:stop] for start, stop in pairwise(bounds)]
        self._lengths = parts[0].view("<i4")
        self._pointers = parts[1].view("<i8")
        self._documents = parts[2].view("<i8")

    def _check_index(self) -> None:
        """Check that the sequences lie back to back and that the documents cover them."""
        position = 0
        for start in range(0, len(self._lengths), _ROWS):
            lengths = self._lengths[start : start + _ROWS].astype(np.int64)
            ends = position + np.cumsum(lengths)
            pointers = self._pointers[start : start + _ROWS]
            if lengths.min() < 0 or np.any(pointers != (ends - lengths) * self.dtype.itemsize):
                raise self._corrupt("its sequences do not lie back to back")
            position = int(ends[-1])
        self._num_tokens = position
        documents = self._documents
        is_covering = documents[0] == 0 and documents[-1] == len(self._lengths)
        parts = (documents[start : start + _ROWS + 1] for start in range(0, len(documents), _ROWS))
        if not is_covering or any(np.any(part[1:] < part[:-1]) for part in parts):
            raise self._corrupt("its documents do not cover its sequences in order")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents together."""
        return self._num_tokens

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens per document, int64 of shape [num_documents]."""
        ends = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return np.diff(ends[self._documents])

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """Return the token ids of one document, int64 of shape [length].

        :raises IndexError: ``index`` is not in ``[0, num_documents)``.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        first, end = int(self._documents[index]), int(self._documents[index + 1])
        return self.tokens(self._sequence_start(first), self._sequence_start(end))

    def document_of(self, token: int) -> int:
        """Return the document that a token of the stream is of.

        :raises IndexError: ``token`` is not in ``[0, num_tokens)``.
        """
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} of {self.num_tokens} in {self.prefix}")

        def start(document: int) -> int:
            return self._sequence_start(int(self._documents[document]))

        # The last one that starts there or before: empty ones start where the next one does.
        return bisect_right(range(self.num_documents), token, key=start) - 1

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return ``[start, stop)`` of the concatenated documents, int64 of shape [stop - start].

        :raises IndexError: The range is not within ``[0, num_tokens]``; unlike a Python slice, a
            short answer would silently shift every later sample.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")
        return self._tokens[start:stop].astype(np.int64)

    def _sequence_start(self, sequence: int) -> int:
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize
