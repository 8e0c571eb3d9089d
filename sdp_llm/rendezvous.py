"""Where the ranks of a run meet, before any process group exists.

The store is the one that torch.distributed uses then: under torchrun the agent's, else rank 0's at
MASTER_ADDR and MASTER_PORT. DeepSpeed's launcher names port 29500 for every run unless it is told
another one, and a second run on the machine would meet the first. So on one machine the ranks that
it started take a port that is free instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from sdp_llm.errors import ConfigError
from sdp_llm.launched import refuse_mpi
from sdp_llm.processes import ProcessId, ancestors, machine

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
LAUNCHER, LAUNCHER_PORT = "deepspeed.launcher.launch", "29500"


def meet(timeout: timedelta) -> dist.Store | None:
    """The store that the ranks of this run share; None for one rank alone.

    Other ranks need not be there yet, except rank 0, which is waited for. A second
    call returns the same store. It must be kept until a process group exists.

    :raises ConfigError: the port is taken or belongs to another run, or rank 0 does not come.
    """
    be_alone_by_default()
    environment = os.environ
    if not {*ALONE} <= {*environment}:
        return None  # DeepSpeed says what is missing
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if world_size == 1:
        return None
    has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    launcher = launcher_of_this_rank()
    # The launcher by which ranks that take a free port find each other.
    common = launcher if launcher is not None and _is_port_left_open(environment) else None
    if rank == 0 and not has_agent:
        store = _host(int(environment["MASTER_PORT"]) if common is None else 0, timeout)
        environment["MASTER_PORT"] = str(store.port)
        if common is not None:
            _tell_port(common, store.port, world_size - 1)
    else:
        if common is not None:
            environment["MASTER_PORT"] = str(_ask_port(common, timeout))
        store = connect(timeout)
    shared = prefixed(store)
    _check_leader(shared, rank, launcher, timeout)
    return shared


def be_alone_by_default() -> None:
    """Without a launcher this process is rank 0 of 1; DeepSpeed would look for MPI otherwise.

    :raises ConfigError: MPI has started several processes, which would be as many runs.
    """
    if "RANK" in os.environ:
        return
    if not dist.is_initialized():  # else they have met
        refuse_mpi(os.environ)
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)


def connect(timeout: timedelta) -> dist.TCPStore:
    """A connection of its own to the store at MASTER_ADDR and MASTER_PORT.

    :raises ConfigError: nobody answers there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(host, port, None, False, timeout, False)
    except dist.DistError as error:
        raise ConfigError(
            f"MASTER_ADDR = {host}, MASTER_PORT = {port}: rank 0 cannot be reached there within "
            f"{timeout.total_seconds():.0f} s; look whether it has started and no firewall is "
            "between"
        ) from error


def prefixed(store: dist.Store) -> dist.Store:
    """The part of a store that is this run's: a launcher that restarts ranks keeps the store."""
    return dist.PrefixStore(f"sdp_llm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_port_left_open(environment: Mapping[str, str]) -> bool:
    """Whether no port was chosen, and none need be: all ranks of DeepSpeed's launcher are here."""
    is_one_machine = environment.get("LOCAL_SIZE") == environment["WORLD_SIZE"]
    return is_one_machine and environment["MASTER_PORT"] == LAUNCHER_PORT


def launcher_of_this_rank() -> ProcessId | None:
    """DeepSpeed's launcher on this machine, which all ranks here have in common; None: another."""
    for process, command in ancestors():
        if LAUNCHER in command:
            return process
    return None


def _host(port: int, timeout: timedelta) -> dist.TCPStore:
    try:
        # Multi-tenant: the process group finds the same server in this process.
        return dist.TCPStore(
            os.environ["MASTER_ADDR"], port, None, True, timeout, False, multi_tenant=True
        )
    except dist.DistError as error:
        raise _not_this_run("another process listens there") from error


def _socket_name(launcher: ProcessId) -> str:
    """Of a socket that has a name only while it is open: nothing stays, however the ranks end."""
    return f"\0sdp_llm {launcher.pid} {launcher.started}"


def _tell_port(launcher: ProcessId, port: int, count: int) -> None:
    """Tell ``count`` ranks of this launcher the port, in a thread."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(_socket_name(launcher))
    listening.listen(count)

    def answer() -> None:
        with listening:
            told = 0
            while told < count:
                with listening.accept()[0] as asking:
                    if _is_own(asking):
                        asking.sendall(str(port).encode())
                        told += 1

    threading.Thread(target=answer, name="port", daemon=True).start()


def _is_own(peer: socket.socket) -> bool:
    """Whether the same user is at the other end: any may guess the socket's name."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


def _ask_port(launcher: ProcessId, timeout: timedelta) -> int:
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(OSError):
            asking.connect(_socket_name(launcher))
            if _is_own(asking):
                return int(asking.recv(16))
        time.sleep(0.1)
    raise ConfigError(
        f"rank 0 did not come within {timeout.total_seconds():.0f} s; look what became of it"
    )


def _check_leader(
    store: dist.Store, rank: int, launcher: ProcessId | None, timeout: timedelta
) -> None:
    """Check that rank 0 is of this run: two runs may have been given one port."""
    own = {"machine": machine(), "launcher": launcher and asdict(launcher)}
    if rank == 0:
        store.set("leader", json.dumps(own))
        return
    try:
        leader = json.loads(store.get("leader"))
    except dist.DistError as error:
        raise _not_this_run(
            f"no rank 0 came there within {timeout.total_seconds():.0f} s"
        ) from error
    launchers = (own["launcher"], leader["launcher"])
    if (
        own["machine"] == leader["machine"]
        and None not in launchers
        and len({*map(str, launchers)}) > 1
    ):
        raise _not_this_run("another run on this machine meets there")


def _not_this_run(reason: str) -> ConfigError:
    return ConfigError(
        f"MASTER_PORT = {os.environ['MASTER_PORT']}: {reason}; give each run a port of its own "
        "(--master_port), or none on a single machine under the deepspeed launcher"
    )
