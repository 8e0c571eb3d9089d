"""How a run learns that it should stop: SIGTERM or SIGUSR1, at any moment of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

# A scheduler and a launcher may both pass on one request to stop; what comes within this is one.
SAME_REQUEST_S = 1.0


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started within do not get the signals that ask to stop.

    Launchers signal a rank's helpers too, which must go on until the rank has stopped. The signals
    are blocked, which children inherit; one that comes meanwhile arrives here afterwards.
    """
    # It would unblock them when multiprocessing starts it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Notes the first signal for the training loop; a second one ends the process at once.

    SIGUSR1 is heard from the start, SIGTERM from :meth:`hear_sigterm` on: until the ranks have met,
    a launcher sends it because one of them failed, and waiting for that one would be in vain.

    The main thread may be inside a collective for long, where Python runs no handler. So the
    signals arrive, through Python's wake-up pipe, in a thread of their own.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._is_over = False
        self._heard = {int(signal.SIGUSR1)}
        # The pipe's writing end must not block; forked children must not write into it.
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, _leave_it_to_the_thread)
        os.register_at_fork(after_in_child=_ignore_in_children)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def hear_sigterm(self) -> None:
        """From now on SIGTERM asks to stop, too."""
        self._heard.add(int(signal.SIGTERM))
        signal.signal(signal.SIGTERM, _leave_it_to_the_thread)

    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self._first is not None

    def settle(self) -> None:
        """All is saved and the process is about to end: further signals do not matter."""
        self._is_over = True

    def _watch(self) -> None:
        while True:
            for number in os.read(self._read, 16):
                if number in self._heard:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
        elif now - self._first[1] > SAME_REQUEST_S and not self._is_over:
            os._exit(128 + number)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Only a signal with a handler in Python reaches the wake-up pipe."""


def _ignore_in_children() -> None:
    """What a rank forks is not asked to stop, nor does it pass a signal on."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
