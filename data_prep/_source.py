"""The files that a source stands for: on the disk, or in a dataset on the HuggingFace hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep._hub import HubUnreachable, one_line, patiently
from sdp_llm.errors import ConfigError

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_HUB = "hf://"


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


def find_source(
    source: str, name: str | None, flag: str = "--source", revision: str | None = None
) -> Source:
    """Find the files that a path, a folder, a glob or the name of a hub dataset stands for.

    A folder stands for every file below it with a known suffix; files are sorted by path. Of a
    hub dataset it is the train split, in the dataset's own order.

    :param name: Configuration of the hub dataset.
    :param revision: Commit of the hub dataset; None: the newest.
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
    return _find_on_hub(source, name, flag, revision)


def refuse_output_within(output: Path, source: str, flag: str = "--source") -> None:
    """Raise ConfigError where a folder of text would hold ``--output``.

    The next run over the folder would take the JSON files in it for text.
    """
    folder = Path(source)
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--output {output}: lies within {flag} {source}, where its own files would be read as "
            f"text by the next run; name a folder outside of it, or give {flag} as a glob"
        )


def _find_on_hub(source: str, name: str | None, flag: str, wanted: str | None) -> Source:
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    def look() -> Iterator[tuple[list[str], list[int], Any, str | None]]:
        builder = load_dataset_builder(source, name=name, revision=wanted)
        paths = list((builder.config.data_files or {}).get("train", []))
        filesystem = HfFileSystem()  # the instance that the builder used: it knows the files
        # Without the hub `datasets` may find a copy in its cache, which is not these files.
        is_remote = bool(paths) and all(path.startswith(_HUB) for path in paths)
        sizes = [filesystem.info(path)["size"] for path in paths] if is_remote else []
        yield paths, sizes, filesystem, builder.hash

    try:
        paths, sizes, filesystem, revision = next(patiently(look, source))
    except HubUnreachable:
        raise
    except Exception as error:  # datasets raises ValueError, FileNotFoundError and more
        begun = f" at commit {wanted}, with which --output was begun; for the newest, remove that"
        raise ConfigError(
            f"{flag} {source}: no such file, and not readable from the hub"
            f"{begun if wanted else ''}: {one_line(error)}"
        ) from error
    unknown = [path for path in paths if _format_of(path) is None]
    if unknown or not sizes:
        reason = f"{unknown[0]} has an unknown suffix" if unknown else "no files in a train split"
        raise ConfigError(f"{flag} {source}: {reason}; use a dataset of .parquet or .jsonl files")
    files = tuple(SourceFile(path, size) for path, size in zip(paths, sizes, strict=True))
    return Source(files, filesystem, revision)
