"""The resident set of this process, and its peak since a moment of one's choice (Linux)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024  # Linux counts in KiB


def reset_peak() -> bool:
    """Forget the peak so far, and give back what was freed; False where the system does not let."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):
        return False
    return True
