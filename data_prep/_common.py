"""What the data scripts share: exit statuses, progress, outputs that appear complete."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sdp_llm.cli import run_command, say_error
from sdp_llm.errors import ConfigError
from sdp_llm.files import sync

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_MARK = ".data_prep"  # the file that tells a folder of the scripts from anybody else's


def note(message: str) -> None:
    """Print a line on stderr; on a terminal it takes the place of the progress line."""
    _clear_line()
    print(message, file=sys.stderr, flush=True)


def _clear_line() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")


def run_script(
    script: str, run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace
) -> int:
    """:func:`~sdp_llm.cli.run_command` for what also fails when a disk or a network does.

    :returns: the exit status: 1 for a failing disk or network.
    """

    def run_and_clear(arguments: argparse.Namespace) -> None:
        try:
            run(arguments)
        except BaseException:
            _clear_line()
            raise

    try:
        return run_command(script, run_and_clear, arguments)
    except OSError as error:
        if arguments.debug:
            raise
        say_error(script, error)
        return 1


class Progress:
    """One line on stderr: rewritten in place on a terminal, a new line now and then in a pipe."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stream = sys.stderr
        self._live = self._stream.isatty()
        self._interval = 0.2 if self._live else 5.0  # seconds
        self._next = 0.0  # the first call prints, so that a person sees at once that it runs
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, message: str, *, last: bool = False) -> None:
        """Show ``message`` unless a line was shown just before; the ``last`` is always shown."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + self._interval
        line = f"{self._label}: {message}"
        if self._live:
            self._stream.write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def format_size(size: float) -> str:
    """Return bytes with a decimal unit: 5.87 MB, 30.6 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def left_out(dropped: Mapping[str, int]) -> str:
    """Return how many rows were left out for which reason."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def refuse_existing(path: Path) -> None:
    """Raise ConfigError if ``--output`` exists: no script overwrites what may have taken a day."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--output {path}: exists and is not overwritten; remove or rename it")


def partial_of(output: Path) -> Path:
    """Return the folder in which ``output`` is made."""
    return output.with_name(output.name + ".partial")


def is_own(partial: Path) -> bool:
    """Return whether a data script made this folder, so that it may be continued or removed.

    An empty one counts as well: a run may have been killed before it could mark it; and one of
    ``tokenize_fineweb.py`` from before there was a mark.
    """
    if partial.is_symlink() or not partial.is_dir():
        return False
    if (partial / _MARK).is_file() or not any(partial.iterdir()):
        return True
    return (partial / "state.json").is_file() and (partial / "pieces").is_dir()


def remove_own(partial: Path) -> None:
    """Remove a folder that ``is_own``, which it stays wherever this is killed."""
    _clear(partial)
    shutil.rmtree(partial)


def _clear(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _MARK:
            entry.unlink()


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name ``folder`` in the error of a full disk, which does not say where it was."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = str(folder)
        raise


@contextmanager
def locked_folder(output: Path) -> Iterator[Path]:
    """Yield OUTPUT.partial, made if need be and held by this process alone.

    :raises ConfigError: Another run holds it, it is somebody else's, or it cannot be written.
    :raises OSError: The block does; with a path, where the error comes from the disk.
    """
    partial = partial_of(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if not is_own(partial):
            raise ConfigError(
                f"--output {output}: it is made in {partial}, which is there and not from this "
                "script; rename that, or choose another --output"
            )
        (partial / _MARK).touch()
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be written: {partial}: {error.strerror}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--output {output}: another run is writing {partial}") from error
        with _naming(partial):
            yield partial
    finally:
        os.close(handle)


@contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """Yield a path to make a file or a folder at; it becomes OUTPUT when the block ends well.

    It lies in OUTPUT.partial, which is removed at the end. What a killed run left is cleared.

    :raises ConfigError: OUTPUT exists, is being written by another run, or cannot be written.
    """
    refuse_existing(output)
    with locked_folder(output) as partial:
        made = partial / "complete"
        try:
            _clear(partial)
            yield made
            sync_tree(made)
            refuse_existing(output)
            made.rename(output)
        finally:
            with suppress(OSError):  # what went wrong before, or right, is worth more
                remove_own(partial)


def sync_tree(folder: Path) -> None:
    """Make a folder and all in it survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
