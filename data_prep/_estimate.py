"""What a source will come to in tokens and bytes, from a look at its first documents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from data_prep._encoding import IN_FLIGHT, Encoder
from data_prep._pieces import PIECE_BYTES, Piece, cut
from data_prep._reading import UnreadableFile, read_footer
from data_prep._seen import HASH
from data_prep._source import Source

_SAMPLE_DOCUMENTS = 256
_COMPRESSED_TEXT = 2.6  # bytes of JSON lines per byte of .gz or .zst: of FineWeb, levels 6 and 3
_INDEX_BYTES = 4 + 8 + 8  # per document, in the .idx
_WORK_BYTES = 4  # per document, while a run is under way


@dataclass(frozen=True)
class Estimate:
    """What the run will write.

    Attributes:
        is_guess: The files are compressed text, whose size when unpacked is not known.
    """

    documents: float
    tokens: float
    output_bytes: float
    is_guess: bool

    @property
    def hash_bytes(self) -> float:
        """Memory, and disk, of de-duplication."""
        return self.documents * HASH.itemsize


def estimate(
    source: Source, column: str, encoder: Encoder, max_documents: int | None, *, dedup: bool
) -> Estimate | None:
    """Tokenize the first documents and scale up by the sizes of the files.

    :param dedup: Whether hashes are kept.
    :returns: None if no file has a usable document.
    """
    for piece in cut(source, column, encoder.limits):
        texts, size = _sample(piece, source, encoder)
        if not texts:
            continue
        mean = size / len(texts)
        ratio = _text_per_byte(piece, source, mean)
        documents = ratio * sum(file.size for file in source.files) / mean
        if max_documents is not None:
            documents = min(documents, max_documents)
        tokens = documents * sum(map(len, encoder.encode(texts))) / len(texts)
        per_document = _INDEX_BYTES + _WORK_BYTES + (HASH.itemsize if dedup else 0)
        written = tokens * encoder.dtype.itemsize + documents * per_document
        return Estimate(documents, tokens, written, piece.file.compression is not None)
    return None


def _sample(piece: Piece, source: Source, encoder: Encoder) -> tuple[list[str], int]:
    """The first usable texts of a piece and their UTF-8 bytes."""
    texts: list[str] = []
    size = 0
    try:
        for document in islice(piece.documents(source), _SAMPLE_DOCUMENTS):
            data = encoder.usable(document)
            if isinstance(data, bytes):
                assert isinstance(document, str)
                texts.append(document)
                size += len(data)
    except UnreadableFile:
        pass  # the run itself reports it, in its turn
    return texts, size


def _text_per_byte(piece: Piece, source: Source, mean: float) -> float:
    """UTF-8 bytes of text per byte of the piece's file.

    :param mean: Bytes per document of its first ones.
    """
    if piece.records is None:
        rows = read_footer(source, piece.file, piece.column).rows
        return rows * mean / piece.file.size
    raw = sum(len(record) for record in piece.records if isinstance(record, bytes))
    return len(piece.records) * mean / raw * (_COMPRESSED_TEXT if piece.file.compression else 1.0)


def unfinished_bytes(workers: int) -> int:
    """Disk that pieces under way take at most, roughly: their tokens are no larger than they."""
    return IN_FLIGHT * workers * PIECE_BYTES
