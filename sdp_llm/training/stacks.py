"""Where every thread of this process is."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_PATIENCE_S = 3.0


def write_stacks(rank: int, folder: Path) -> None:
    """Print this process's Python stacks to stderr, and append them to a file in ``folder``."""
    memory = os.memfd_create("stacks")
    faulthandler.dump_traceback(memory, all_threads=True)
    os.lseek(memory, 0, os.SEEK_SET)
    with os.fdopen(memory, encoding="utf-8", errors="replace") as file:
        stacks = file.read()
    text = f"stacks of rank {rank} (pid {os.getpid()}), {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    text += f"{stacks}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    in_time(partial(_append, folder, rank, text))


def in_time(action: Callable[[], Any]) -> None:
    """Do something for a few seconds at most: a file system that hangs may never end it."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)


def _append(folder: Path, rank: int, text: str) -> None:
    path = folder / f"stacks-rank-{rank}.txt"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        sys.stderr.write(f"{path}: cannot write: {error}\n")
