"""A safetensors file written tensor by tensor, in the memory of one of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_llm.activity import ACTIVITY
from sdp_llm.checkpoint.shared_folder import WrittenFile

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that a file is going to have."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> WrittenFile:
    """Write tensors as ``safetensors.torch.save_file`` would, flush them, and describe the file.

    Other than there, one tensor at a time comes to the host, its bytes are hashed while they are
    written, and views of larger tensors are fine.
    """
    entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors]
    return write_stream(path, entries, (tensor for _, tensor in tensors))


def split_files(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """The entries of each file, none larger than ``max_bytes`` unless it has a single tensor."""
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return files


def write_stream(
    path: Path,
    entries: Sequence[Entry],
    contents: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Write a safetensors file whose tensors come one after the other, in parts or whole.

    :param contents: the elements of ``entries``, in their order and types.
    :param metadata: of the file, such as the framework that its tensors are for.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        description = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape)}
        header[entry.key] = description | {"data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = len(text).to_bytes(8, "little") + text
        for content in chain([start], map(_bytes, contents)):
            digest.update(content)
            file.write(content)
            ACTIVITY.beat()
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, path.stat().st_size, digest.hexdigest())


def read_part(path: Path, key: str, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of a flattened tensor, 1-D, read into memory of their own.

    safetensors itself maps the file, and every page that was read counts as this process's memory
    until the file is closed.
    """
    entry = read_header(path)[key]
    dtype = next(dtype for dtype, name in _DTYPES.items() if name == entry["dtype"])
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little") + entry["data_offsets"][0]
        file.seek(data + start * dtype.itemsize)
        content = bytearray((stop - start) * dtype.itemsize)
        file.readinto(content)
    return torch.frombuffer(content, dtype=dtype)


def read_header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file: 8 bytes of length, JSON of that length, the data."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
