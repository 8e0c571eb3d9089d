"""Which process is meant, and that no other one is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sdp_llm.processes import (
    ELSEWHERE,
    GONE,
    RUNNING,
    STOPPED,
    ProcessId,
    ancestors,
    process,
    this_process,
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


def wait_until(state: str, which: ProcessId) -> None:
    end = time.monotonic() + 10
    while which.state() != state:
        assert time.monotonic() < end, which.state()
        time.sleep(0.01)


def test_the_states_of_a_process(child: subprocess.Popen[bytes]) -> None:
    found = process(child.pid)
    assert found is not None
    assert found.state() == RUNNING
    child.send_signal(signal.SIGSTOP)
    wait_until(STOPPED, found)
    assert found.kill()  # also a stopped one
    wait_until(GONE, found)  # though nobody has waited for it yet
    assert not found.kill()
    assert child.wait() == -signal.SIGKILL
    assert found.state() == GONE
    assert process(child.pid) is None


def test_another_process_of_the_same_number_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    found = process(child.pid)
    assert found is not None
    before = replace(found, started=found.started - 1)
    assert before.state() == GONE
    assert not before.kill()
    there = replace(found, machine="another")
    assert there.state() == ELSEWHERE
    assert not there.kill()
    assert child.poll() is None
    assert found.state() == RUNNING


def test_this_process_and_its_ancestors() -> None:
    assert this_process().pid == os.getpid()
    assert this_process() == process(os.getpid())
    code = "from sdp_llm.processes import ancestors; print([p.pid for p, _ in ancestors()][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == os.getpid()
    parent, words = next(ancestors())
    assert parent.pid == os.getppid()
    assert words
