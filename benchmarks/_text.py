"""Sources of any size from a small one, for benchmarks of the data scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep._pieces import Limits, cut
from data_prep._reading import Document, UnreadableFile
from data_prep._source import find_source
from sdp_llm.errors import ConfigError

MEGABYTE = 1_000_000
ROWS_PER_GROUP = 1000  # of a parquet file, as in FineWeb's own
_MAX_TEXT = 16 * MEGABYTE  # bytes; the default of tokenize_fineweb


def read_texts(source: str, column: str = "text", max_bytes: int | None = None) -> list[str]:
    """Read the distinct texts of a local source, as tokenize_fineweb does.

    :param max_bytes: Stop after so many bytes of UTF-8.
    :raises ConfigError: There is no text, or a file is broken.
    """
    texts: dict[str, None] = {}
    size = 0
    try:
        for document in _documents(source, column):
            if isinstance(document, str) and document.strip() and document not in texts:
                texts[document] = None
                size += len(document.encode())
            if max_bytes is not None and size >= max_bytes:
                break
    except UnreadableFile as error:
        raise ConfigError(f"--source {source}: {error}") from error
    if not texts:
        raise ConfigError(f"--source {source}: no text")
    return list(texts)


def _documents(source: str, column: str) -> Iterator[Document]:
    found = find_source(source, None)
    for piece in cut(found, column, Limits(_MAX_TEXT)):
        yield from piece.documents(found)


def repeated(texts: Sequence[str], size: int, label: str) -> Iterator[str]:
    """Yield texts again and again until they have ``size`` bytes of UTF-8, no two of them equal.

    :param label: Ends each text, with the number of the copy; another label gives other texts.
    """
    for copy in count():
        for text in texts:
            yield (one := f"{text} ({label}.{copy})")
            size -= len(one.encode())
            if size <= 0:
                return


def write_texts(path: Path, texts: Iterator[str], rows_per_group: int | None = None) -> None:
    """Write a parquet or a JSON lines file with the column ``text``, by the suffix of ``path``.

    :param rows_per_group: Of a parquet file; None for one row group, which is made in memory.
    """
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        return
    schema = pa.schema([("text", pa.large_string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(texts, rows_per_group)):
            table = pa.table({"text": pa.array(group, pa.large_string())}, schema)
            writer.write_table(table, row_group_size=len(group))
