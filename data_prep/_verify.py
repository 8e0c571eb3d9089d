"""Token files and the manifest that describes them: what is there, and whether the two agree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep._common import Progress
from sdp_llm.data.indexed import IndexedDataset
from sdp_llm.errors import ConfigError

MANIFEST = "manifest.json"
SUFFIX = "_text_document"  # what Megatron's tools and ours put behind the name of a split
_CHUNK_BYTES = 4 << 20  # read at a time for a checksum

# What is used of a manifest; {str: x} is an object of x's, [x] a list of them.
_SHAPE: dict[str, Any] = {
    "settings": {str: object},
    "tokenizer": {str: object},
    "dtype": str,
    "documents_read": int,
    "dropped": {str: int},
    "failed_files": [{str: object}],
    "splits": {str: {str: int}},
    "files": {str: {str: object}},
}


def printable(text: str) -> str:
    """Return ``text`` on one line, with what a terminal could obey or hide as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Corpora:
    """What the command line names.

    Attributes:
        folder: Where the files are.
        names: Their prefixes in that folder.
        manifest: What ``manifest.json`` says; None for a foreign corpus.
    """

    folder: Path
    names: list[str]
    manifest: dict[str, Any] | None

    def files(self) -> list[str]:
        """The names of the files, two for each prefix."""
        return [name + suffix for name in self.names for suffix in (".bin", ".idx")]

    def described(self, file: str) -> dict[str, Any]:
        """What the manifest says of a file; empty where it does not list it."""
        files: dict[str, dict[str, Any]] = self.manifest["files"] if self.manifest else {}
        return files.get(file, {})


def split_of(name: str) -> str:
    """The split that a prefix stands for."""
    return name.removesuffix(SUFFIX)


def find_corpora(path: Path) -> Corpora:
    """Find the token files of a folder, or those with a prefix.

    :raises ConfigError: There are none, or the manifest beside them is unreadable.
    """
    if path.is_dir():
        manifest = _read_manifest(path)
        files = map(Path, manifest["files"]) if manifest else path.iterdir()
        names = sorted({file.stem for file in files if file.suffix == ".idx"})
        if not names:
            raise ConfigError(f"{path}: no .idx file in this folder")
        return Corpora(path, names, manifest)
    name = path.name.removesuffix(".bin").removesuffix(".idx")
    if not any((path.parent / f"{name}{suffix}").is_file() for suffix in (".bin", ".idx")):
        raise ConfigError(f"{path}: no such folder, and no files {name}.bin and {name}.idx")
    manifest = _read_manifest(path.parent)
    if manifest and f"{name}.bin" not in manifest["files"]:
        manifest = None  # it describes others
    return Corpora(path.parent, [name], manifest)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    for key, shape in _SHAPE.items():
        if not isinstance(manifest, dict) or not _fits(manifest.get(key), shape):
            raise ConfigError(
                f"{path}: {key!r} is not what tokenize_fineweb.py writes there; make the corpus "
                "again with it, or move this file away to see the rest without it"
            )
    return manifest


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(inner, shape[0]) for inner in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(v, shape[str]) for v in value.values())
    return isinstance(value, shape)


def wrong_sizes(corpora: Corpora) -> dict[str, str]:
    """Compare the sizes of the files with the manifest.

    :returns: File -> what is wrong with it.
    """
    wrong = {}
    for file in corpora.files() if corpora.manifest else ():
        path, expected = corpora.folder / file, corpora.described(file).get("bytes")
        if not path.is_file():
            wrong[file] = f"{path}: no such file, but {MANIFEST} lists it"
        elif (size := path.stat().st_size) != expected:
            wrong[file] = f"{path}: {size} bytes, {expected} in {MANIFEST}"
    return wrong


def wrong_sums(corpora: Corpora, files: list[str], progress: Progress) -> list[str]:
    """Compare the SHA-256 of ``files`` with the manifest; returns what is wrong."""
    total = sum((corpora.folder / file).stat().st_size for file in files)
    wrong, done = [], 0
    for file in files:
        path, digest = corpora.folder / file, hashlib.sha256()
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    speed = done / max(progress.seconds, 1e-3)
                    progress.update(
                        f"verifying {printable(file)}, {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, "
                        f"{speed / 1e9:.2f} GB/s"
                    )
        except OSError as error:  # such as a disk that cannot read a sector
            wrong.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if digest.hexdigest() != corpora.described(file).get("sha256"):
            wrong.append(f"{path}: its SHA-256 is not that in {MANIFEST}: its content changed")
    progress.update(f"read {len(files)} files in {progress.seconds:.0f} s", last=True)
    return wrong


def wrong_counts(
    corpora: Corpora, opened: dict[str, IndexedDataset], longest: dict[str, int]
) -> list[str]:
    """Compare what the manifest counts with what the index files hold; returns what is wrong.

    :param opened: Prefix -> what it names.
    :param longest: Prefix -> tokens of its longest document.
    """
    if corpora.manifest is None:
        return []
    wrong = []
    for name, data in opened.items():
        counted = corpora.manifest["splits"].get(split_of(name), {})
        held = {
            "documents": data.num_documents,
            "tokens": data.num_tokens,
            "longest_document": longest[name],
        }
        differ = [f"{k} {n}, not {counted.get(k)}" for k, n in held.items() if n != counted.get(k)]
        if data.dtype.name != corpora.manifest["dtype"]:
            differ.append(f"dtype {data.dtype.name}, not {corpora.manifest['dtype']}")
        if differ:
            path = corpora.folder / f"{name}.idx"
            wrong.append(f"{path}: unlike what {MANIFEST} counts: {'; '.join(differ)}")
    return wrong
