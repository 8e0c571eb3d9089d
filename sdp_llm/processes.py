"""Which process is which, on which machine, and what the system says about it (Linux's /proc)."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNING, STOPPED, GONE, ELSEWHERE = "running", "stopped", "gone", "on another machine"


@dataclass(frozen=True)
class ProcessId:
    """A process for as long as it lives: a number alone may be another process's tomorrow.

    ``machine`` tells kernels and their process namespaces apart, ``host`` is its name for people,
    ``started`` the process's start in clock ticks since the machine's.
    """

    machine: str
    host: str
    pid: int
    started: int

    def state(self) -> str:
        """RUNNING, STOPPED (SIGSTOP, a debugger), GONE, or ELSEWHERE: nothing is known here."""
        if self.machine != machine():
            return ELSEWHERE
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.started or fields[0] in "ZXx":
            return GONE
        return STOPPED if fields[0] in "Tt" else RUNNING

    def kill(self) -> bool:
        """End it by SIGKILL, also where it is stopped; False where it is gone or elsewhere."""
        if self.machine != machine():
            return False
        try:
            # The descriptor stays this process's, whatever happens to the number.
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if self.state() == GONE:
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def was_killed(status: Mapping[str, Any]) -> bool:
    """Whether a run that says "running" has no process any more, as its rank 0's machine knows.

    :param status: the content of the run's ``status.json``.
    """
    names = ("machine", "host", "pid", "started")
    if status.get("state") != "running" or any(status.get(name) is None for name in names):
        return False
    return ProcessId(*(status[name] for name in names)).state() == GONE


def machine() -> str:
    """This machine, for as long as it is not started anew; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def this_process() -> ProcessId:
    """This process."""
    found = process(os.getpid())
    return found or ProcessId(machine(), socket.gethostname(), os.getpid(), 0)


def process(pid: int) -> ProcessId | None:
    """The process that has this number on this machine now; None where none has."""
    fields = _stat(pid)
    if fields is None:
        return None
    return ProcessId(machine(), socket.gethostname(), pid, int(fields[19]))


def ancestors() -> Iterator[tuple[ProcessId, list[str]]]:
    """This process's parent, its parent and so on, each with its command line."""
    fields = _stat(os.getpid())
    while fields is not None and int(fields[1]) > 0:
        pid = int(fields[1])
        found = process(pid)
        if found is None:
            return
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            words = []
        yield found, words
        fields = _stat(pid)


def _stat(pid: int) -> list[str] | None:
    """Of proc(5)'s stat the fields after the name: [0] state, [1] parent, [19] start."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name may hold spaces and parentheses.
    return text.rpartition(")")[2].split()
