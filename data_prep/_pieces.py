"""Cut a source into pieces: consecutive documents of one file, a few seconds of work each.

A piece is what a worker does at a time, what is kept or lost when a run is killed, and what the
order of the output goes by. Where a file is cut depends on the file alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep._reading import (
    Document,
    UnreadableFile,
    Unusable,
    decode_record,
    read_footer,
    read_records,
    read_rows,
)
from data_prep._source import Source, SourceFile

PIECE_BYTES = 4 << 20  # of the file; of undecoded records, which travel to the worker
_HUB_PIECE_BYTES = 32 << 20  # a parquet file's footer, up to some MB, is fetched for each piece


@dataclass(frozen=True)
class Limits:
    """What bounds the memory of one document.

    Attributes:
        text_bytes: Longer texts (UTF-8) are left out.
    """

    text_bytes: int

    @property
    def record_bytes(self) -> int:
        """Bytes of a line that may hold such a text: JSON can spell a character in six bytes."""
        return 6 * self.text_bytes


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of one file, or the news that no more of the file can be read.

    Attributes:
        file_number: Position of the file in the source.
        part: Position of the piece in the file.
        row_groups: Those of a parquet file, which the worker reads; else None.
        records: Undecoded records of another file; else None.
        failure: Why the file cannot be read.
        end: Bytes of the file up to the end of this piece, as far as is known; for progress.
    """

    file: SourceFile
    file_number: int
    part: int
    column: str
    row_groups: range | None = None
    records: Sequence[bytes | Unusable] | None = None
    failure: str | None = None
    end: int = 0

    @property
    def name(self) -> str:
        """A file name that sorts in the order of the source."""
        return f"{self.file_number:06d}-{self.part:08d}"

    def documents(self, source: Source) -> Iterator[Document]:
        """Yield the documents in order.

        :raises UnreadableFile: The file breaks off or is corrupt.
        :raises HubUnreachable: It is on the hub, which does not answer.
        """
        if self.failure is not None:
            raise UnreadableFile(self.failure)
        for record in self.records or ():
            yield decode_record(record, self.file, self.column)
        if self.row_groups is not None:
            yield from read_rows(source, self.file, self.column, self.row_groups)


def cut(
    source: Source, column: str, limits: Limits, file_number: int = 0, part: int = 0
) -> Iterator[Piece]:
    """Yield the pieces of ``source`` in order, from piece ``part`` of file ``file_number`` on.

    :raises HubUnreachable: The files are on the hub, which does not answer.
    """
    for number in range(file_number, len(source.files)):
        first = part if number == file_number else 0
        is_parquet = source.files[number].format == "parquet"
        pieces = (_cut_parquet if is_parquet else _cut_records)(source, number, column, limits)
        yield from (piece for piece in pieces if piece.part >= first)


def _cut_parquet(source: Source, number: int, column: str, limits: Limits) -> Iterator[Piece]:
    file = source.files[number]
    try:
        row_groups = read_footer(source, file, column).row_groups
    except UnreadableFile as error:
        yield Piece(file, number, 0, column, failure=str(error), end=file.size)
        return
    size = _HUB_PIECE_BYTES if file.is_remote else PIECE_BYTES
    parts = min(row_groups, -(-file.size // size))
    for part in range(parts):  # none of a file without row groups
        start, stop = (row_groups * edge // parts for edge in (part, part + 1))
        end = file.size * stop // row_groups
        yield Piece(file, number, part, column, row_groups=range(start, stop), end=end)


def _cut_records(source: Source, number: int, column: str, limits: Limits) -> Iterator[Piece]:
    file = source.files[number]
    records: list[bytes | Unusable] = []
    part = size = read = 0
    failure = None
    try:
        for record in read_records(source, file, column, limits.record_bytes):
            records.append(record)
            size += len(record) if isinstance(record, bytes) else 0
            if size >= PIECE_BYTES:
                read += size
                # Of a compressed file the position is not known before its end.
                end = 0 if file.compression else min(read, file.size)
                yield Piece(file, number, part, column, records=records, end=end)
                records, size, part = [], 0, part + 1
    except UnreadableFile as error:
        failure = str(error)
    if records:
        yield Piece(file, number, part, column, records=records, end=file.size)
        part += 1
    if failure is not None:
        yield Piece(file, number, part, column, failure=failure, end=file.size)
