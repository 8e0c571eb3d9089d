"""Where documents come from: files on the disk or in a dataset on the HuggingFace hub.

`datasets` finds the files of a hub dataset; both kinds are then read alike, through fsspec:
parquet by row groups with pyarrow, JSON lines and plain text record by record. Its own readers are
not used here: they ask the hub for the revision and the file list once for each file and process,
which its rate limit does not bear, and its JSON reader gives up the rest of a file at a bad row.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

from data_prep._common import note
from sdp_llm.errors import ConfigError

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_HUB = "hf://"
_ROWS = 64  # read at a time: bounds memory whatever the size of a row group
_BUFFER_BYTES = 1 << 20  # likewise
_HUB_BLOCK_BYTES = 32 << 20  # per request; the hub limits their number
# Waits between attempts to reach the hub, each of which huggingface_hub has tried for some 20
# seconds: about half an hour in all, since a run over night should survive an outage.
_PATIENCE = (5, 10, 20, 40, *([60] * 30))


class Unusable(Enum):
    """Why a row of a source is not a document; the value is its name in the manifest."""

    EMPTY = "empty"
    NOT_TEXT = "not_text"
    INVALID_UNICODE = "invalid_unicode"
    MALFORMED = "malformed_json"
    TOO_LONG = "too_long"


Document = str | Unusable


class UnreadableFile(Exception):
    """One file of a source is broken; the others may be fine."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: Absolute path, or an ``hf://`` URL with the revision in it.
        size: Bytes on the disk or the hub.
    """

    path: str
    size: int

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_remote(self) -> bool:
        """Whether it lies on the hub."""
        return self.path.startswith(_HUB)

    @property
    def format(self) -> str:
        """One of parquet, json (one object per line), text."""
        known = _format_of(self.path)
        assert known is not None
        return known

    @property
    def compression(self) -> str | None:
        """One of gzip, zstd, or None."""
        return _COMPRESSED.get(Path(self.path).suffix)


@dataclass(frozen=True)
class Source:
    """The files of a source, in the order in which they are read.

    Attributes:
        filesystem: fsspec's for all of them. A hub one carries the file list with it when it is
            sent to another process, which then need not ask for it.
        revision: Commit of the hub dataset; None on the disk.
    """

    files: tuple[SourceFile, ...]
    filesystem: Any
    revision: str | None


def _format_of(path: str) -> str | None:
    suffix = Path(path).suffix
    if suffix in _COMPRESSED:
        path = path.removesuffix(suffix)
        known = _FORMATS.get(Path(path).suffix)
        return None if known == "parquet" else known
    return _FORMATS.get(suffix)


def find_source(source: str, name: str | None, flag: str = "--source") -> Source:
    """Find the files that a path, a folder, a glob or the name of a hub dataset stands for.

    A folder stands for every file below it with a known suffix; files are sorted by path. Of a
    hub dataset it is the train split, in the dataset's own order.

    :param name: Configuration of the hub dataset.
    :raises ConfigError: Nothing is found, or a file has an unknown suffix.
    :raises OSError: The hub cannot be reached.
    """
    from fsspec.implementations.local import LocalFileSystem

    path = Path(source)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and _format_of(p.name)]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
    if found:
        for file in found:
            if _format_of(file.name) is None:
                raise ConfigError(
                    f"{flag} {file}: unknown suffix; use .parquet, .jsonl or .txt (the last two "
                    "also with .gz or .zst)"
                )
        paths = sorted(str(p.absolute()) for p in found)
        files = tuple(SourceFile(p, Path(p).stat().st_size) for p in paths)
        return Source(files, LocalFileSystem(), None)
    if path.is_dir():
        raise ConfigError(f"{flag} {source}: no .parquet, .jsonl or .txt file in this folder")
    looks_local = source.count("/") != 1 or source.startswith((".", "/", "~")) or "*" in source
    if looks_local or _format_of(source):
        raise ConfigError(f"{flag} {source}: no such file; give a file, a folder or a glob")
    return _find_on_hub(source, name, flag)


def _find_on_hub(source: str, name: str | None, flag: str) -> Source:
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    def look() -> Iterator[tuple[list[str], list[int], Any, str | None]]:
        builder = load_dataset_builder(source, name=name)
        paths = list((builder.config.data_files or {}).get("train", []))
        filesystem = HfFileSystem()  # the instance that the builder used: it knows the files
        # Without the hub `datasets` may find a copy in its cache, which is not these files.
        is_remote = bool(paths) and all(path.startswith(_HUB) for path in paths)
        sizes = [filesystem.info(path)["size"] for path in paths] if is_remote else []
        yield paths, sizes, filesystem, builder.hash

    try:
        paths, sizes, filesystem, revision = next(_patiently(look, source))
    except HubUnreachable:
        raise
    except Exception as error:  # datasets raises ValueError, FileNotFoundError and more
        raise ConfigError(
            f"{flag} {source}: no such file, and not readable from the hub: {_one_line(error)}"
        ) from error
    unknown = [path for path in paths if _format_of(path) is None]
    if unknown or not sizes:
        reason = f"{unknown[0]} has an unknown suffix" if unknown else "no files in a train split"
        raise ConfigError(f"{flag} {source}: {reason}; use a dataset of .parquet or .jsonl files")
    files = tuple(SourceFile(path, size) for path, size in zip(paths, sizes, strict=True))
    return Source(files, filesystem, revision)


class HubUnreachable(OSError):
    """The hub did not answer for as long as was waited for it."""


def _is_transient(error: BaseException) -> bool:
    """Whether an error is the network's and may pass, rather than a file's or a name's."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    if type(error) is FileNotFoundError:
        # What `datasets` makes of a hub that does not answer for a README.
        return "LocalEntryNotFoundError" in str(error)
    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))


_T = TypeVar("_T")


def _patiently(read: Callable[[], Iterator[_T]], what: str) -> Iterator[_T]:
    """Yield what ``read()`` yields; if the hub fails, start again and go on after the last value.

    :param read: Yields the same values each time.
    :param what: Named while waiting.
    :raises HubUnreachable: The hub keeps failing for as long as ``_PATIENCE`` lasts.
    """
    waits = iter(_PATIENCE)
    done = 0
    while True:
        try:
            for number, value in enumerate(read()):
                if number == done:
                    done += 1
                    waits = iter(_PATIENCE)
                    yield value
            return
        except Exception as error:
            if not _is_transient(error):
                raise
            wait = next(waits, None)
            if wait is None:
                raise HubUnreachable(
                    f"the hub did not give {what} for half an hour: {_one_line(error)}"
                ) from error
            note(f"waiting {wait} s for the hub to give {what}: {_one_line(error)}")
            time.sleep(wait)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    """Turn what readers raise on a broken file into UnreadableFile; a lost network stays."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        if file.is_remote and _is_transient(error):
            raise
        raise UnreadableFile(f"cannot be read as {file.format}: {_one_line(error)}") from error


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

    return next(_patiently(read, file.path))


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

    return _patiently(read, file.path)


def _decoded(data: bytes | None) -> Document:
    if data is None:
        return Unusable.EMPTY
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Unusable.INVALID_UNICODE


def _no_column(column: str, names: Any) -> UnreadableFile:
    return UnreadableFile(f"no column {column!r}, it has {', '.join(names)}; set --text_column")


@contextmanager
def _unpacked(source: Source, file: SourceFile) -> Iterator[IO[bytes]]:
    import pyarrow as pa

    with _raw(source, file) as raw:
        if file.compression == "gzip":
            with gzip.open(raw) as unzipped:
                yield io.BufferedReader(unzipped, _BUFFER_BYTES)
        elif file.compression == "zstd":
            # pyarrow's, because fsspec knows zstd only where a package for it is installed.
            with pa.CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(stream, _BUFFER_BYTES)
        else:
            yield io.BufferedReader(raw, _BUFFER_BYTES)


def read_records(
    source: Source, file: SourceFile, column: str, max_bytes: int
) -> Iterator[bytes | Unusable]:
    """Yield the undecoded records of a JSON lines or text file, to be decoded elsewhere.

    A line of JSON is a record; records of a .txt file are separated by blank lines.

    :param max_bytes: A longer record is not held in memory but reported as too long.
    :raises UnreadableFile: The file breaks off, is corrupt, or its first object has no ``column``.
    :raises HubUnreachable: It is on the hub, which does not answer.
    """

    def read() -> Iterator[bytes | Unusable]:
        is_json = file.format == "json"
        checked = not is_json
        with _readable(file), _unpacked(source, file) as stream:
            for record in (_lines if is_json else _paragraphs)(stream, max_bytes):
                if not checked and isinstance(record, bytes):
                    checked = _check_object(record, column)
                yield record

    return _patiently(read, file.path)


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


def _check_object(record: bytes, column: str) -> bool:
    """Return whether the record is an object; UnreadableFile if it is one without ``column``."""
    row = _parse(record)
    if not isinstance(row, dict):
        return False
    if column not in row:
        raise _no_column(column, sorted(row))
    return True


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
    text = row.get(column)
    if text is None:
        return Unusable.EMPTY
    return text if isinstance(text, str) else Unusable.NOT_TEXT
