"""What the ranks tell each other beside the collectives, through a store that may hang."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sdp_llm.errors import ConfigError
from sdp_llm.rendezvous import connect, prefixed

INTERVAL_S = 1.0
# A store that does not answer for so long is dead: its process is stopped or gone.
DEAD_S = 3.0
_CONNECT = timedelta(seconds=30)


@dataclass(frozen=True)
class Notice:
    """Why the run ends, from the first rank to know.

    ``is_stall`` says that no step ended in time; ``silent`` are the ranks that cannot act.
    """

    rank: int
    reason: str
    is_stall: bool = False
    silent: tuple[int, ...] = ()


class Board:
    """Publishes this rank's state, and knows the others' and the notice that ends the run.

    All calls of the store are made in one thread, which is lost when one of them hangs: nothing
    here waits for it longer than ``DEAD_S``.

    :param state: what to publish, JSON only; called in that thread.
    """

    def __init__(self, rank: int, world_size: int, state: Callable[[int], dict[str, Any]]) -> None:
        self._rank = rank
        self._world_size = world_size
        self._state = state
        self._sent = 0
        self._own: Notice | None = None
        self._notice: Notice | None = None
        self._must_read = False
        self._read: dict[int, dict[str, Any]] | None = None
        self._changed = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Say nothing more, and end the thread, unless the store hangs.

        Were it to come back from the store while Python ends, the process would abort: status 134
        of a run that has finished.
        """
        self._is_closed = True
        self._changed.set()
        self._thread.join(DEAD_S)

    @property
    def notice(self) -> Notice | None:
        """The run's, which is perhaps not this rank's."""
        return self._notice

    @property
    def is_open(self) -> bool:
        """Whether the store has not gone yet; one that hangs looks open."""
        return self._thread.is_alive()

    def post(self, notice: Notice) -> None:
        """Tell all ranks why the run ends, unless one has done so."""
        self._own = notice
        self._until(lambda: self._own is None)

    def read(self) -> dict[int, dict[str, Any]]:
        """What each rank has published last; none where the store does not answer."""
        self._read, self._must_read = None, True
        self._until(lambda: self._read is not None)
        return self._read or {}

    def _until(self, is_so: Callable[[], bool]) -> None:
        self._changed.set()
        end = time.monotonic() + DEAD_S
        while time.monotonic() < end and self._thread.is_alive() and not is_so():
            time.sleep(0.05)

    def _run(self) -> None:
        try:
            store = prefixed(connect(_CONNECT))
            while not self._is_closed:
                self._exchange(store)
                self._changed.wait(INTERVAL_S)
                self._changed.clear()
        except (dist.DistError, ConfigError):  # it is gone, and nothing is read any more
            return

    def _exchange(self, store: dist.Store) -> None:
        self._sent += 1
        store.set(f"state/{self._rank}", json.dumps(self._state(self._sent)))
        if self._own is not None:
            text = json.dumps(vars(self._own))
            store.compare_set("notice", "", text)
            self._own = None
        if self._notice is None and store.check(["notice"]):
            fields = json.loads(store.get("notice"))
            self._notice = Notice(**fields | {"silent": tuple(fields["silent"])})
        if self._must_read:
            self._read = dict(self._states(store))
            self._must_read = False

    def _states(self, store: dist.Store) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = {rank: f"state/{rank}" for rank in range(self._world_size)}
        if not store.check([*keys.values()]):  # some have not begun
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        for rank, text in zip(keys, store.multi_get([*keys.values()]), strict=True):
            yield rank, json.loads(text)
