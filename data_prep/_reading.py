"""The documents of one file of a source, whether it lies on the disk or on the hub.

Parquet is read by row groups with pyarrow, JSON lines and plain text record by record, both
through fsspec. The readers of `datasets` are not used: they ask the hub for the revision and the
file list once for each file and process, which its rate limit does not bear, and its JSON reader
gives up the rest of a file at the first bad row.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import IO, Any

from data_prep._hub import is_transient, one_line, patiently
from data_prep._source import Source, SourceFile

_ROWS = 64  # read at a time: bounds memory whatever the size of a row group
_BUFFER_BYTES = 1 << 20  # likewise
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")  # how an array of objects begins
_ZSTD_BYTES = 4 << 10  # unpacked at a time: what is lost at most where a file breaks off
_SHOWN_COLUMNS = 20  # in a message
_FIRST_OBJECTS = 1000  # of a file, of which one at least must have the column of the text
_HUB_BLOCK_BYTES = 32 << 20  # per request; the hub limits their number


class Unusable(Enum):
    """Why a row of a source is not a document; the value is its name in the manifest."""

    EMPTY = "empty"
    NO_COLUMN = "no_column"
    NOT_TEXT = "not_text"
    INVALID_UNICODE = "invalid_unicode"
    MALFORMED = "malformed_json"
    TOO_LONG = "too_long"


Document = str | Unusable


class UnreadableFile(Exception):
    """One file of a source is broken; the others may be fine."""


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """Turn what readers raise on a broken file into UnreadableFile; a lost network stays."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        if file.is_remote and is_transient(error):
            raise
        kind = f"{file.format}, {file.compression}" if file.compression else file.format
        raise UnreadableFile(f"cannot be read as {kind}: {one_line(error)}") from error


@contextmanager
def _parquet(source: Source, file: SourceFile) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _readable(file), _raw(source, file) as stream:
        yield pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _raw(source: Source, file: SourceFile) -> Any:
    options = {"block_size": _HUB_BLOCK_BYTES} if file.is_remote else {}
    return source.filesystem.open(file.path, "rb", **options)


@dataclass(frozen=True)
class Footer:
    """What the end of a parquet file says: its row groups and rows."""

    row_groups: int
    rows: int


def read_footer(source: Source, file: SourceFile, column: str) -> Footer:
    """Return the number of row groups and rows of a parquet file, after a look at its schema.

    :raises UnreadableFile: It is no parquet file, or ``column`` is missing or not text.
    :raises HubUnreachable: It is on the hub, which does not answer.
    """

    def read() -> Iterator[Footer]:
        with _parquet(source, file) as parquet:
            _check_column(parquet.schema_arrow, column)
            yield Footer(parquet.num_row_groups, parquet.metadata.num_rows)

    return next(patiently(read, file.path))


def _check_column(schema: Any, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise _no_column(column, schema.names)
    kind = schema.field(column).type
    if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string)):
        raise UnreadableFile(f"column {column!r} holds no text but {kind}; set --text_column")


def read_rows(
    source: Source, file: SourceFile, column: str, row_groups: range
) -> Iterator[Document]:
    """Yield the texts of some row groups of a parquet file.

    :raises UnreadableFile: The file is corrupt.
    :raises HubUnreachable: It is on the hub, which does not answer.
    """

    def read() -> Iterator[Document]:
        import pyarrow as pa

        with _parquet(source, file) as parquet:
            # One by one: what comes before a corrupt row group is fine.
            for batch in chain.from_iterable(
                parquet.iter_batches(_ROWS, [group], [column], use_threads=False)
                for group in row_groups
            ):
                # As bytes: parquet does not promise that strings are valid UTF-8.
                for data in batch[column].cast(pa.large_binary()).to_pylist():
                    yield _decoded(data)

    return patiently(read, file.path)


def _decoded(data: bytes | None) -> Document:
    if data is None:
        return Unusable.EMPTY
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Unusable.INVALID_UNICODE


def _no_column(column: str, names: list[str]) -> UnreadableFile:
    more = ", ..." if len(names) > _SHOWN_COLUMNS else ""
    shown = ", ".join(names[:_SHOWN_COLUMNS]) + more
    return UnreadableFile(f"no column {column!r}, it has {shown}; set --text_column")


class _Unpacking(io.RawIOBase):
    """What a decompressor gives, passed on at once: all that comes before the break of a file.

    A buffer that fills itself with it would lose what it holds when the break raises.
    """

    def __init__(self, stream: Any, size: int) -> None:
        self._stream = stream
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(min(len(buffer), self._size))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _unpacked(source: Source, file: SourceFile) -> Iterator[io.BufferedReader]:
    import pyarrow as pa

    with _raw(source, file) as raw:
        if file.compression == "gzip":
            with gzip.open(raw) as unzipped:
                yield io.BufferedReader(_Unpacking(unzipped, _BUFFER_BYTES), _BUFFER_BYTES)
        elif file.compression == "zstd":
            # pyarrow's, because fsspec knows zstd only where a package for it is installed.
            with pa.CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(_Unpacking(stream, _ZSTD_BYTES), _BUFFER_BYTES)
        else:
            yield io.BufferedReader(raw, _BUFFER_BYTES)


def read_records(
    source: Source, file: SourceFile, column: str, max_bytes: int
) -> Iterator[bytes | Unusable]:
    """Yield the undecoded records of a JSON lines or text file, to be decoded elsewhere.

    A line of JSON is a record; records of a .txt file are separated by blank lines.

    :param max_bytes: A longer record is not held in memory but reported as too long.
    :raises UnreadableFile: The file breaks off, is corrupt or one array of objects, or none of its
        first objects (``_FIRST_OBJECTS``) has ``column``.
    :raises HubUnreachable: It is on the hub, which does not answer.
    """

    def read() -> Iterator[bytes | Unusable]:
        is_json = file.format == "json"
        has_column = not is_json
        others: dict[str, None] = {}  # the columns of objects without it, in order
        count = 0
        with _readable(file), _unpacked(source, file) as stream:
            if is_json:
                _refuse_array(stream)
            for record in (_lines if is_json else _paragraphs)(stream, max_bytes):
                row = None if has_column or isinstance(record, Unusable) else _parse(record)
                if isinstance(row, dict):
                    has_column = column in row
                    if len(others) <= _SHOWN_COLUMNS:
                        others |= dict.fromkeys(row)
                    count += 1
                    if count == _FIRST_OBJECTS and not has_column:
                        break  # a wrong name must not cost reading all of it
                yield record
        if others and not has_column:
            raise _no_column(column, list(others))

    return patiently(read, file.path)


def _refuse_array(stream: io.BufferedReader) -> None:
    if _ARRAY.match(stream.peek()):
        raise UnreadableFile(
            "one JSON array, not JSON lines (one object a line); convert it with "
            "`jq -c '.[]' array.json > lines.jsonl`"
        )


def _lines(stream: IO[bytes], max_bytes: int) -> Iterator[bytes | Unusable]:
    while line := stream.readline(max_bytes):
        if len(line) == max_bytes and not line.endswith(b"\n"):
            while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
                pass
            yield Unusable.TOO_LONG
        elif not line.isspace():
            yield line


def _paragraphs(stream: IO[bytes], max_bytes: int) -> Iterator[bytes | Unusable]:
    lines: list[bytes] = []
    size = 0
    while line := stream.readline(max_bytes):
        if not line.isspace():
            size += len(line)
            if size <= max_bytes:
                lines.append(line)
        elif lines:
            yield b"".join(lines).rstrip(b"\r\n") if size <= max_bytes else Unusable.TOO_LONG
            lines, size = [], 0
    if lines:
        yield b"".join(lines).rstrip(b"\r\n") if size <= max_bytes else Unusable.TOO_LONG


def _parse(record: bytes) -> Any:
    try:
        return json.loads(record)
    except UnicodeDecodeError:
        return Unusable.INVALID_UNICODE
    except (ValueError, RecursionError):
        return Unusable.MALFORMED


def decode_record(record: bytes | Unusable, file: SourceFile, column: str) -> Document:
    """Return the text of what :func:`read_records` yielded."""
    if isinstance(record, Unusable):
        return record
    if file.format == "text":
        return _decoded(record)
    row = _parse(record)
    if isinstance(row, Unusable):
        return row
    if not isinstance(row, dict):
        return Unusable.MALFORMED
    if column not in row:
        return Unusable.NO_COLUMN
    text = row[column]
    if text is None:
        return Unusable.EMPTY
    return text if isinstance(text, str) else Unusable.NOT_TEXT
