"""The memory of this process as the system sees it (Linux)."""

from __future__ import annotations

from pathlib import Path


def resident_now() -> int:
    """The bytes of this process that are in memory."""
    return _field("VmRSS")


def resident_peak() -> int:
    """The most of them so far, or since :func:`reset_resident_peak`."""
    return _field("VmHWM")


def reset_resident_peak() -> bool:
    """Let the peak start again from what is there now; False where this is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _field(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024  # Linux counts in KiB
