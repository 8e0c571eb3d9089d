"""Megatron's indexed format, written and read from its public description alone.

The description is the documentation of ``megatron/core/datasets/indexed_dataset.py`` and
``megatron/core/datasets/readme.md`` in NVIDIA/Megatron-LM. Nothing here comes from ``sdp_llm``, so
that an error of its reader and its writer, made twice, does not cancel out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The DType enumeration of the description.
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@dataclass(frozen=True)
class Contents:
    """Documents as lists of sequences of ids, and the mode of each sequence (multimodal only)."""

    documents: list[list[list[int]]]
    dtype: str
    modes: list[int] | None


def write(prefix: Path, contents: Contents) -> None:
    """Write PREFIX.bin and PREFIX.idx."""
    sequences = [ids for document in contents.documents for ids in document]
    width = np.dtype(contents.dtype).itemsize
    lengths = [len(ids) for ids in sequences]
    pointers = [sum(lengths[:i]) * width for i in range(len(sequences))]
    documents = [0]
    for document in contents.documents:
        documents.append(documents[-1] + len(document))
    with Path(f"{prefix}.bin").open("wb") as stream:
        for ids in sequences:
            stream.write(np.array(ids, dtype=contents.dtype).tobytes(order="C"))
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\x00\x00")
        stream.write(struct.pack("<Q", 1))
        stream.write(struct.pack("<B", CODES[contents.dtype]))
        stream.write(struct.pack("<Q", len(sequences)))
        stream.write(struct.pack("<Q", len(documents)))
        stream.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        stream.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
        stream.write(np.array(documents, dtype=np.int64).tobytes(order="C"))
        if contents.modes is not None:
            stream.write(np.array(contents.modes, dtype=np.int8).tobytes(order="C"))


def read(prefix: Path, multimodal: bool = False) -> Contents:
    """Read PREFIX.bin through what PREFIX.idx says about each sequence."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    [dtype] = [name for name, known in CODES.items() if known == code]
    offset = 34
    lengths = np.frombuffer(index, np.int32, num_sequences, offset)
    offset += lengths.nbytes
    pointers = np.frombuffer(index, np.int64, num_sequences, offset)
    offset += pointers.nbytes
    documents = np.frombuffer(index, np.int64, num_documents, offset)
    offset += documents.nbytes
    modes = None
    if multimodal:
        modes = np.frombuffer(index, np.int8, num_sequences, offset).tolist()
        offset += num_sequences
    assert offset == len(index)
    sequences = [
        np.frombuffer(data, dtype, length, pointer).tolist()
        for length, pointer in zip(lengths.tolist(), pointers.tolist(), strict=True)
    ]
    ranges = zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True)
    return Contents([sequences[first:end] for first, end in ranges], dtype, modes)
