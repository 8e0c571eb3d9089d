"""Where ranks meet: at a free port, and not with another run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from sdp_llm import rendezvous
from sdp_llm.errors import ConfigError
from sdp_llm.launched import _MPI_SIZES
from sdp_llm.processes import ProcessId, this_process
from sdp_llm.rendezvous import be_alone_by_default, connect, launcher_of_this_rank, meet

SECONDS = timedelta(seconds=10)
LAUNCHED = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):  # also what is set within is gone afterwards
        for name in (
            *LAUNCHED,
            *_MPI_SIZES,
            "TORCHELASTIC_USE_AGENT_STORE",
            "TORCHELASTIC_RESTART_COUNT",
        ):
            os.environ.pop(name, None)
        yield


def be(monkeypatch: pytest.MonkeyPatch, launcher: ProcessId | None, **changes: str) -> None:
    """A rank of two that this launcher started; None: another kind of launcher."""
    for name, value in (LAUNCHED | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "launcher_of_this_rank", lambda: launcher)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def port() -> int:
    return int(os.environ["MASTER_PORT"])


def test_only_the_same_user_is_told_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    with here, there:
        assert rendezvous._is_own(here)
        monkeypatch.setattr(os, "getuid", lambda: -1)
        assert not rendezvous._is_own(here)


def test_one_rank_needs_no_store() -> None:
    be_alone_by_default()
    assert meet(SECONDS) is None


def test_ranks_that_mpi_started_are_not_as_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    be_alone_by_default()
    os.environ.pop("RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"^OMPI_COMM_WORLD_SIZE = 8: MPI started the ranks, "):
        be_alone_by_default()
    be(monkeypatch, None)  # as mpirun -x RANK=... may
    be_alone_by_default()


def test_ranks_of_deepspeeds_launcher_take_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, this_process())
    hosted = meet(SECONDS)
    assert hosted is not None
    first = port()
    assert first != 29500
    hosted.set("a", "b")
    be(monkeypatch, this_process(), RANK="1")
    joined = meet(SECONDS)
    assert joined is not None
    assert port() == first
    assert joined.get("a") == b"b"
    # The process group, and a loop of one's own, meet at the same place.
    be(monkeypatch, this_process(), MASTER_PORT=str(first))
    again = meet(SECONDS)
    assert again is not None
    assert again.get("a") == b"b"
    # Another run that starts now does not.
    be(monkeypatch, replace(this_process(), pid=1))
    other = meet(SECONDS)
    assert other is not None
    assert port() not in (first, 29500)
    assert not other.check(["a"])


@pytest.mark.parametrize(
    ("launcher", "is_default", "changes"),
    [
        (this_process(), True, {"LOCAL_SIZE": "1"}),  # more machines
        (this_process(), False, {}),  # a port was given
        (None, True, {}),
    ],
)
def test_otherwise_the_port_is_the_launchers(
    launcher: ProcessId | None,
    is_default: bool,
    changes: dict[str, str],
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_default:
        monkeypatch.setattr(rendezvous, "LAUNCHER_PORT", str(taken))
    be(monkeypatch, launcher, MASTER_PORT=str(taken), **changes)
    with pytest.raises(ConfigError, match=f"MASTER_PORT = {taken}: another process listens there;"):
        meet(SECONDS)


def test_another_run_at_the_same_port_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = str(free.getsockname()[1])
    be(monkeypatch, this_process(), MASTER_PORT=number)
    hosted = meet(SECONDS)
    assert hosted is not None
    be(monkeypatch, replace(this_process(), pid=1), MASTER_PORT=number, RANK="1")
    with pytest.raises(ConfigError, match="another run on this machine meets there; give each run"):
        meet(SECONDS)
    be(monkeypatch, None, MASTER_PORT=number, RANK="1")  # started by hand, say
    assert meet(SECONDS) is not None


def test_a_restarted_rank_finds_nothing_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    rendezvous.prefixed(store).set("a", "b")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous.prefixed(store).check(["a"])


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        be(monkeypatch, None, MASTER_PORT=str(free.getsockname()[1]))
    with pytest.raises(
        ConfigError, match="rank 0 cannot be reached there within 1 s; look whether"
    ):
        connect(timedelta(seconds=1))
    with pytest.raises(ConfigError, match="rank 0 did not come within 0 s"):
        rendezvous._ask_port(replace(this_process(), pid=3), timedelta(seconds=0.2))


def test_the_launcher_is_an_ancestor(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = replace(this_process(), pid=77)
    words = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"]
    shell = (replace(this_process(), pid=78), ["bash", "start.sh"])
    monkeypatch.setattr(rendezvous, "ancestors", lambda: iter([shell, (launcher, words)]))
    assert launcher_of_this_rank() == launcher
    monkeypatch.setattr(rendezvous, "ancestors", lambda: iter([shell]))
    assert launcher_of_this_rank() is None
