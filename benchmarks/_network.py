"""Networks of their own for measurements: namespaces that exist only while a measurement runs.

All of it takes Linux, root and the commands `ip` and `tc`. Nothing outside the namespaces made
here is touched, and they are removed whatever happens.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"  # of every rank, in its namespace
# What a link may send at once after a pause. A TCP packet that the kernel has not yet cut up has
# 64 KiB, and a timer that fires late by 2 ms must not cost rate.
MIN_BURST = 2**17
BURST_S = 0.002
# What waits for a link before packets are dropped: several ranks may send to one at a time.
MIN_QUEUE = 2**23
QUEUE_S = 0.2
_CLONE_NEWNET = 0x40000000


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this process's network namespace has sent."""
    return interface_bytes("lo")


def interface_bytes(interface: str = INTERFACE) -> int:
    """Bytes that an interface of this process's network namespace has sent, with all headers."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    counters = next(line for line in lines if line.lstrip().startswith(f"{interface}:"))
    return int(counters.split(":")[1].split()[8])  # 8 columns of what was received, then the sent


def why_no_namespace(commands: Sequence[str] = ("ip",)) -> str | None:
    """None where a network namespace can be made; otherwise the reason, one line.

    :param commands: what must be installed for it.
    """
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for command in commands:
        if shutil.which(command) is None:
            return (
                f"network namespaces need the command {command} (package iproute2), which is not "
                "installed"
            )
    try:
        with network_namespace() as name:
            subprocess.run(["ip", "netns", "exec", name, "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"no network namespace: {_first_line(error)}"
    return None


def why_no_star() -> str | None:
    """None where :func:`star_network` can be made and limited; otherwise the reason, one line."""
    reason = why_no_namespace(("ip", "tc"))
    if reason is not None:
        return reason
    try:
        with star_network(1) as network:
            network.limit(0, gbits=1)
    except subprocess.CalledProcessError as error:
        return f"no network with limited links: {_first_line(error)}"
    return None


@contextmanager
def network_namespace() -> Iterator[str]:
    """The name of a new network namespace whose loopback interface is up; removed at the end."""
    name = f"sdp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        with _undisturbed():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextmanager
def counted_network(program: str) -> Iterator[str | None]:
    """A namespace for ranks whose bytes :func:`loopback_bytes` counts; see :func:`enter_loopback`.

    :param program: for the line that is printed where there can be none, and None is given.
    """
    reason = why_no_namespace()
    if reason is not None:
        print(f"{program}: {reason}; counting at the collectives", file=sys.stderr)
        yield None
        return
    with network_namespace() as name:
        yield name


def enter_loopback(name: str | None, rank: int) -> None:
    """Move this process into a namespace; all ranks share one."""
    if name is not None:
        _join(name)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


@dataclass(frozen=True)
class Network:
    """Ranks in namespaces of their own, each with one link to a bridge in one more namespace.

    ``why_no_delay`` is None where packets are delayed as asked; otherwise the reason.
    """

    hub: str
    namespaces: tuple[str, ...]
    why_no_delay: str | None

    def enter(self, rank: int) -> None:
        """Move this process into a rank's namespace; before it starts threads or sockets.

        :raises OSError: when it may not.
        """
        _join(self.namespaces[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def limit(self, rank: int, gbits: float) -> None:
        """Limit a rank's link in both directions, also when it is limited already.

        :param gbits: 10^9 bits per second, headers included.
        :raises subprocess.CalledProcessError: when the kernel has no token bucket filter.
        """
        rate = gbits * 1e9
        burst = burst_bytes(gbits)
        queue = max(MIN_QUEUE, round(rate / 8 * QUEUE_S))
        bucket = ["tbf", "rate", f"{rate:.0f}bit", "burst", f"{burst}b", "limit", f"{queue}b"]
        parent = ["root"] if self.why_no_delay is not None else ["parent", "1:1"]
        replace = ["qdisc", "replace", "dev"]
        _run("tc", "-n", self.namespaces[rank], *replace, INTERFACE, *parent, *bucket)
        _run("tc", "-n", self.hub, *replace, _port(rank), "root", *bucket)


def congestion_control() -> str:
    """The name of this machine's algorithm for TCP, which new namespaces take over."""
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return path.read_text(encoding="utf-8").strip() if path.exists() else "unknown"


def burst_bytes(gbits: float) -> int:
    """What a link that :meth:`Network.limit` limits may send at once after a pause."""
    return max(MIN_BURST, round(gbits * 1e9 / 8 * BURST_S))


@contextmanager
def star_network(size: int, delay_ms: float = 0.0) -> Iterator[Network]:
    """A new network of ``size`` ranks whose links are not limited yet; removed at the end.

    :param delay_ms: that every packet takes longer, one way, where the kernel can delay packets.
    :raises subprocess.CalledProcessError: when it cannot be made.
    """
    with ExitStack() as stack:
        hub = stack.enter_context(network_namespace())
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "addrgenmode", "none", "up")
        names = tuple(stack.enter_context(network_namespace()) for _ in range(size))
        for rank, name in enumerate(names):
            port = _port(rank)
            peer = ["peer", "name", INTERFACE, "netns", name]
            _run("ip", "-n", hub, "link", "add", port, "type", "veth", *peer)
            # Without addresses of IPv6 nothing but the ranks sends.
            up = ["addrgenmode", "none", "up"]
            _run("ip", "-n", hub, "link", "set", port, "master", "bridge", *up)
            _run("ip", "-n", name, "addr", "add", _address(rank), "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, *up)
        yield Network(hub, names, _delay(names, delay_ms))


def _delay(names: Sequence[str], delay_ms: float) -> str | None:
    """Delay what the ranks send; the reason where that was not asked for or is not possible."""
    if not delay_ms:
        return "none was asked for"
    netem = ["netem", "delay", f"{delay_ms}ms", "limit", "1000000"]
    for name in names:
        try:
            _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", *netem)
        except subprocess.CalledProcessError as error:
            return f"tc netem: {_first_line(error)}"
    return None


def _port(rank: int) -> str:
    return f"rank{rank}"


def _address(rank: int) -> str:
    """Of the network that RFC 2544 sets aside for benchmarks."""
    high, low = divmod(rank + 1, 256)
    return f"198.18.{high}.{low}/15"


def _join(name: str) -> None:
    handle = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    try:
        if sys.version_info >= (3, 12):
            os.setns(handle, os.CLONE_NEWNET)
        elif ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"network namespace {name} cannot be joined")
    finally:
        os.close(handle)


def _run(*command: str) -> None:
    # In a session of its own, Ctrl-C does not reach it half way.
    subprocess.run(command, check=True, capture_output=True, start_new_session=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end this process wait until the block ends."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first_line(error: subprocess.CalledProcessError) -> str:
    lines = error.stderr.decode().strip().splitlines()
    return lines[0] if lines else f"{error.cmd[0]} ended with status {error.returncode}"
