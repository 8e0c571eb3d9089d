"""Files that survive a crash, and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_here(path: str | Path) -> str:
    """Where a relative path was looked for, for a message that it is not there; "" for others."""
    return "" if Path(path).is_absolute() else f" (looked for in {Path.cwd()})"


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Append to a file, which is as before where the disk is full."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        data = text.encode()
        try:
            # A full disk takes a part without an error, and none of the rest.
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old or the new text."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
