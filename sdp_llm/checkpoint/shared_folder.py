"""A folder that all ranks write and that appears complete or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sdp_llm.agree import agree
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of, sync

# <fcntl.h> and <linux/fs.h>
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Of a checkpoint's folder, which holds nothing else.
RANK_FILES = "rank-*.safetensors"
# How the hidden name ends that a folder has while another takes its name.
REPLACED = ".replaced"


@dataclass(frozen=True)
class WrittenFile:
    """A file of a folder: its name, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


def written(path: Path) -> WrittenFile:
    """Flush a file to the disk and describe it."""
    sync(path)
    return WrittenFile(path.name, path.stat().st_size, sha256_of(path))


def write_json(path: Path, content: Any) -> WrittenFile:
    """Write ``content`` as JSON and describe the file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return written(path)


class SharedFolder:
    """A folder that every rank writes into, on a shared file system.

    Collective over the world (or alone, without torch.distributed). The files go to a hidden
    folder beside it, ``partial``, that takes the final name last; an existing one is replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.partial = folder.with_name(f".{folder.name}.partial")
        self._folder = folder
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0

    def prepare(self) -> None:
        """Make the hidden folder, empty, and mend what a killed process left. Collective.

        :raises ConfigError: on every rank, when that fails.
        """

        def make() -> None:
            if self._is_first:
                put_back(self._folder)
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)

        self._agree(make)

    def complete(
        self,
        write: Callable[[], list[WrittenFile]],
        finish: Callable[[Path, list[WrittenFile]], None],
    ) -> None:
        """Write, and give the folder its name. Collective.

        :param write: called on every rank, writes this rank's files and describes them.
        :param finish: called on rank 0 with the files of all, writes what describes the whole.
        :raises ConfigError: on every rank, when one of them could not write; nothing is left.
        """
        files = [file for part in self._agree(write) for file in part]

        def give_name() -> None:
            if not self._is_first:
                return
            for file in files:
                if not (self.partial / file.name).exists():
                    path = self.partial / file.name
                    raise OSError(f"{path} is not there: not a shared file system")
            finish(self.partial, files)
            sync(self.partial)
            _move_into_place(self.partial, self._folder)

        self._agree(give_name)

    def _agree(self, step: Callable[[], Any]) -> list[Any]:
        try:
            return agree(step)
        except ConfigError:
            # All ranks are here: nobody writes any more.
            if self._is_first:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise


def write_together(
    folder: Path,
    write: Callable[[Path], list[WrittenFile]],
    finish: Callable[[Path, list[WrittenFile]], None],
    is_replaced: Callable[[str], bool],
) -> None:
    """Let every rank write its files into ``folder``; see :class:`SharedFolder`.

    :param is_replaced: which entries of a folder that is there are of what is written, by name;
        the others stay.
    :raises ConfigError: on every rank, when one of them could not write, or works in the folder.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name
    agree(lambda: _check_elsewhere(folder))
    shared = SharedFolder(folder)
    shared.prepare()

    def finish_beside_others(partial: Path, files: list[WrittenFile]) -> None:
        finish(partial, files)
        if folder.is_dir():
            _link_entries(folder, partial, is_replaced)

    shared.complete(lambda: write(shared.partial), finish_beside_others)


def _check_elsewhere(folder: Path) -> None:
    if Path.cwd().is_relative_to(folder):
        raise ConfigError(
            f"{folder}: the working directory, which cannot be replaced in one step; name a folder "
            "inside it"
        )
    if any(folder.glob(RANK_FILES)):
        raise ConfigError(f"{folder}: holds a checkpoint, which must stay; name another folder")


def _link_entries(source: Path, target: Path, is_left_out: Callable[[str], bool]) -> None:
    """Give the entries of a folder a second name in another, where possible without copies."""
    for entry in source.iterdir():
        if is_left_out(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, target / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _move_into_place(partial: Path, folder: Path) -> None:
    """Give ``partial`` its final name at once, also where a folder has it already."""
    replaced = partial
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        replaced = _replaced(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        try:
            partial.rename(folder)
        except OSError:
            put_back(folder)
            raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Give a folder its name again that had to make way for one that did not come."""
    if _replaced(folder).exists() and not folder.exists():
        _replaced(folder).rename(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
