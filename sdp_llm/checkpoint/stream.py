"""A safetensors file written tensor by tensor, in the memory of one of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_llm.checkpoint.together import WrittenFile

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> WrittenFile:
    """Write tensors as ``safetensors.torch.save_file`` would, flush them, and describe the file.

    safetensors' own function makes a copy of everything first. Here one tensor at a time comes to
    the host, and its bytes are hashed while they are written. Views of larger tensors are fine.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors:
        end = offset + tensor.nbytes
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[key] = entry | {"data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = len(text).to_bytes(8, "little") + text
        for content in chain([start], (_bytes(tensor) for _, tensor in tensors)):
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, path.stat().st_size, digest.hexdigest())


def read_header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file: 8 bytes of length, JSON of that length, the data."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
