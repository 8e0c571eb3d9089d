"""What a HuggingFace checkpoint on this machine stores, found without reading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from sdp_llm.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The name that safetensors gives to what can be converted to fp32 without a scale beside it.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is: file, key, shape, and safetensors' name of its dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def named(source: str) -> str:
    """How errors begin that are about ``model.init_from``."""
    return f"model.init_from = {json.dumps(source)}"


def local_folder(source: str) -> Path | None:
    """The folder of a checkpoint: ``source`` itself, or the hub's local cache of that name.

    :returns: None when there is neither. The hub is never asked.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def existing_folder(source: str) -> Path:
    """What :func:`local_folder` finds.

    :raises ConfigError: when there is none.
    """
    folder = local_folder(source)
    if folder is None:
        raise ConfigError(
            f"{named(source)}: no such folder, nor in the hub's local cache, and training fetches "
            f"nothing; name a folder, or run before: hf download {source}"
        )
    return folder


def stored_tensors(source: str) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint ``source``, by its key.

    The headers of all files are read, which also finds files that were cut short.

    :raises ConfigError: when there is no such checkpoint, a file is missing or damaged, or the
        weights are pickles or quantised.
    """
    folder = existing_folder(source)
    found: dict[str, StoredTensor] = {}
    for file in _files(source, folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(key)
                    shape = tuple(part.get_shape())
                    found[key] = StoredTensor(file, key, shape, part.get_dtype())
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{named(source)}: {file.name} cannot be read: {reason}; download it again"
            ) from error
    for tensor in found.values():
        if tensor.dtype not in FLOATS:
            raise ConfigError(
                f"{named(source)}: {tensor.key} is stored as {tensor.dtype}; only "
                f"{', '.join(FLOATS)} can be trained: use a checkpoint that is not quantised"
            )
    return found


def _files(source: str, folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            paths = [Path(name) for name in names]
        except (
            LookupError,
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ConfigError(
                f"{named(source)}: {INDEX} is not an index of safetensors; download it again"
            ) from error
        strange = [p for p in paths if p.name != str(p) or p.suffix != ".safetensors"]
        if strange:
            raise ConfigError(
                f"{named(source)}: {INDEX} names {str(strange[0])!r}, which is no safetensors file "
                "beside it; download it again"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{named(source)}: {missing[0]} is missing ({len(missing)} of {len(names)} files); "
                "download it again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ConfigError(f"{named(source)}: {_why_nothing(source, folder)}")


def _why_nothing(source: str, folder: Path) -> str:
    """Why a folder has no safetensors of a model, and what to do."""
    if (folder / "latest").is_file() or (folder / "manifest.json").is_file():
        return (
            "a training checkpoint, not a HuggingFace one; export it before: "
            f"python launch/export.py {source} --output DIR"
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"has {pickles[0]} and no safetensors; unpickling runs what the file says, so it is "
            "not read: write it again with transformers' from_pretrained and save_pretrained"
        )
    return f"has no {SINGLE} or {INDEX}; name the folder of a model, or download it whole"
