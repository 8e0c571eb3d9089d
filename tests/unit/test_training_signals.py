"""Helpers of a rank outlive the signals that ask it to stop."""

from __future__ import annotations

import signal
import subprocess
import sys

from sdp_llm.training.signals import kept_from_children

WORKERS = """
import multiprocessing, re, signal, time
import psutil
from sdp_llm.training.signals import kept_from_children

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with kept_from_children():
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
    for child in psutil.Process().children(recursive=True):
        if "resource_tracker" not in " ".join(child.cmdline()):
            blocked = re.search(r"SigBlk:\\t(\\w+)", open(f"/proc/{child.pid}/status").read())[1]
            print(bool(int(blocked, 16) >> signal.SIGTERM - 1 & 1))
    print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    worker.kill()
"""


def test_a_signal_does_not_end_a_child_and_reaches_the_rank_afterwards() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        with kept_from_children():
            child = subprocess.Popen(["sleep", "60"])
            signal.raise_signal(signal.SIGUSR1)
            assert received == []
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        child.send_signal(number)
    try:
        child.wait(0.3)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL


def test_it_holds_for_the_server_of_the_workers_and_for_the_workers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["True", "True", "set()"], done.stderr
