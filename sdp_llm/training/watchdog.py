"""A thread on every rank that ends the run, and says why, when it does not go on.

torch.distributed's own timeout says that a collective hangs, half an hour later and not because of
whom. A Python thread runs while the main thread is in a collective, reads a file or waits for a
GPU, as these release Python's lock. C code that keeps it, such as a long regular expression, stops
this thread too: then faulthandler's thread, which needs no lock, still prints the stacks, and the
other ranks treat this one as one that does not answer.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from sdp_llm.activity import ACTIVITY, END
from sdp_llm.cli import STATUS, say_error
from sdp_llm.errors import RankLost
from sdp_llm.processes import GONE, STOPPED, ProcessId
from sdp_llm.training.board import INTERVAL_S, Board, Notice
from sdp_llm.training.lookout import (
    RankState,
    accusation,
    is_alive,
    rank_state,
    table,
    with_silence,
)
from sdp_llm.training.stacks import in_time, write_stacks

TICK_S = 1.0
# Between two looks at who has said something since: some publications of each rank that lives.
SETTLE_S = 3.0
# What the first step prepares may take this much longer than a step: kernels, buffers, loading.
FIRST_STEP_FACTOR = 3
# A rank that another one's end has torn out of a collective learns in this time whose it was.
LEARN_S = 8.0
# How long the main thread may take to end by itself, once it is known that the run ends.
LEAVE_S = 5.0
# How long Python may take to end after an error.
TEARDOWN_S = 10.0
# Looks at a process that is gone until that is why the run ends.
TIMES_GONE = 3
# Launchers look at their ranks once a second.
LAUNCHER_LOOKS_S = 1.5


class Watchdog:
    """Watches this rank from ``with`` on until the end of the block.

    When no rank has had a beat for ``timeout`` seconds (``FIRST_STEP_FACTOR`` times that before
    the end of the first step), every rank that can prints its stacks, the lowest one the table of
    all ranks, and all end with status 4; those that cannot are killed by one on their machine.
    When a rank fails or is gone, the others end too.

    :param timeout: ``training.step_timeout``.
    :param processes: of every rank.
    :param run_dir: where the stacks go, too, when it exists.
    :param leave: ends this process.
    """

    def __init__(
        self,
        timeout: float,
        rank: int,
        processes: Sequence[ProcessId],
        run_dir: Path,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._timeout = timeout
        self._rank = rank
        self._processes = processes
        self._run_dir = run_dir
        self._leave = leave
        # Takes the reason of a failure; set once there is a status file.
        self.on_failure: Callable[[str], None] | None = None
        self._quiet = 0.0
        self._times_gone: Counter[int] = Counter()
        self._next_look = 0.0
        self._verdict: Notice | None = None
        # What this rank ends for, and the same where another one is to blame.
        self._reason: str | None = None
        self._lost: str | None = None
        self._stopped = threading.Event()
        here = processes[rank].machine
        self._neighbours = {
            r: process
            for r, process in enumerate(processes)
            if r != rank and process.machine == here
        }
        world_size = len(processes)
        self._board = Board(rank, world_size, self._published) if world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._board is not None:
            self._board.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self.reason_of(error)
        self._stopped.set()
        self._thread.join(LEAVE_S)
        faulthandler.cancel_dump_traceback_later()
        if error is not None:
            # Collectives that are under way may keep a process from ending.
            faulthandler.dump_traceback_later(TEARDOWN_S, exit=True, file=2)
        if self._board is not None:
            self._board.close()
        if self._lost is not None:
            raise RankLost(self._lost) from error

    def reason_of(self, error: BaseException) -> str:
        """Why this rank ends with an error: another rank, if that tore it out of a collective.

        Otherwise the other ranks are told.
        """
        if self._reason is None:
            self._lost = self._learn() if ACTIVITY.wait is not None else None
            self._reason = self._lost or f"{type(error).__name__}: {error}"
            if self._lost is None and self._board is not None:
                where = f"rank {self._rank} failed in {ACTIVITY.phase} after step {ACTIVITY.step}"
                self._board.post(Notice(self._rank, f"{where}: {self._reason.splitlines()[0]}"))
                if not isinstance(error, tuple(STATUS)):  # else its command leaves them time
                    time.sleep(2 * INTERVAL_S)  # rank 0 takes the store with it
        return self._reason

    def _learn(self) -> str | None:
        end = time.monotonic() + LEARN_S
        while time.monotonic() < end and self._board is not None:
            notice = self._verdict or self._board.notice
            if notice is not None:
                return notice.reason
            time.sleep(0.1)
        return None

    # -- the thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        beats, before = -1, time.monotonic()
        while not self._stopped.wait(TICK_S):
            now = time.monotonic()
            # Time in which this process was stopped, with all of the run perhaps, does not count.
            self._quiet += min(now - before, 2 * TICK_S)
            before = now
            if ACTIVITY.beats != beats:
                beats, self._quiet = ACTIVITY.beats, 0.0
            # For a rank whose Python stands still from here on, whatever its first step did before.
            faulthandler.dump_traceback_later(self._timeout + 2 * TICK_S, file=2)
            self._verdict = self._find_verdict()
            if self._verdict is not None:
                faulthandler.cancel_dump_traceback_later()
                self._end(self._verdict)
                return

    @property
    def _limit(self) -> float:
        return self._timeout * (1 if ACTIVITY.steps_ended else FIRST_STEP_FACTOR)

    def _published(self, sent: int) -> dict[str, Any]:
        return vars(self._state(sent))

    def _state(self, sent: int = 0) -> RankState:
        process, wait = self._processes[self._rank], ACTIVITY.wait
        return RankState(
            self._rank,
            process.host,
            process.pid,
            ACTIVITY.phase,
            ACTIVITY.step,
            self._quiet,
            self._quiet > self._limit,
            sent,
            wait.what if wait else None,
            wait.owners if wait else None,
        )

    def _find_verdict(self) -> Notice | None:
        if self._board is not None and self._board.notice is not None:
            return self._board.notice
        gone = self._find_gone()
        if gone is not None:
            return gone
        if self._quiet > self._limit and time.monotonic() > self._next_look:
            stalled = self._find_stall()
            self._next_look = time.monotonic() + SETTLE_S
            return stalled
        return None

    def _find_gone(self) -> Notice | None:
        """A process of this machine that has ended before its time."""
        if ACTIVITY.phase == END:
            return None
        for rank, process in self._neighbours.items():
            self._times_gone[rank] += process.state() == GONE
        # Not at once: it may have failed, and then it has told why.
        if max(self._times_gone.values(), default=0) < TIMES_GONE:
            return None
        return Notice(self._rank, self._account())

    def _find_stall(self) -> Notice | None:
        """The verdict, when no rank goes on; None while one does."""
        beats = ACTIVITY.beats
        states = self._look_around()
        if self._stopped.is_set() or ACTIVITY.beats != beats:
            return None
        if not states:
            return Notice(
                self._rank,
                f"{self._no_step()}: the ranks' store does not answer; {self._account()}",
                is_stall=True,
            )
        if any(is_alive(s) and not s.is_overdue for s in states):
            return None
        if self._rank != min(s.rank for s in states if is_alive(s)):
            end = time.monotonic() + 2 * SETTLE_S
            while self._board is not None and self._board.is_open and time.monotonic() < end:
                if self._board.notice is not None:
                    return self._board.notice
                time.sleep(0.1)
        sys.stderr.write(f"what the ranks said last, when no step ended:\n{table(states)}\n")
        silent = tuple(s.rank for s in states if not is_alive(s))
        reason = f"{self._no_step()}: {accusation(states)}"
        return Notice(self._rank, reason, is_stall=True, silent=silent)

    def _no_step(self) -> str:
        return f"no step ended within {self._limit:.0f} s (training.step_timeout)"

    def _look_around(self) -> list[RankState]:
        """What is known of each rank; nothing where the store does not answer."""
        if self._board is None:
            return [self._state()]
        before = self._board.read()
        if not before:
            return []
        self._stopped.wait(SETTLE_S)
        now = self._board.read()
        states = [self._state()]
        for rank, process in enumerate(self._processes):
            if rank != self._rank:
                entries = (rank_state(rank, process, e.get(rank)) for e in (before, now))
                states.append(replace(with_silence(*entries), process=process.state()))
        return sorted(states, key=lambda state: state.rank)

    def _account(self) -> str:
        """What this rank alone can tell: which processes of its machine are stopped or gone."""
        states = {rank: process.state() for rank, process in self._neighbours.items()}
        parts = [
            f"rank {rank} (pid {self._processes[rank].pid} on {self._processes[rank].host}) is "
            + (STOPPED if state == STOPPED else "gone, killed or crashed")
            for rank, state in states.items()
            if state in (STOPPED, GONE)
        ]
        return "; ".join(parts) or "look at rank 0, which keeps it, and at its machine"

    # -- the end ------------------------------------------------------------------------------

    def _end(self, verdict: Notice) -> None:
        if self._board is not None and verdict.rank == self._rank:
            self._board.post(verdict)
        if verdict.is_stall:
            write_stacks(self._rank, self._run_dir)
            if self._board is not None and self._board.is_open and verdict.rank == self._rank:
                time.sleep(2 * INTERVAL_S)  # until the others have read it: the store may be ours
        elif self._stopped.wait(LEAVE_S):
            return  # the main thread ends by itself, and says why
        if self.on_failure is not None:
            in_time(partial(self.on_failure, verdict.reason))
        say_error("pretrain", verdict.reason)
        self._kill(verdict.silent)
        sys.stdout.flush()
        self._leave(STATUS[RankLost])

    def _kill(self, silent: Sequence[int]) -> None:
        """End the ranks of this machine that cannot end themselves; the lowest other one does."""
        states = {rank: process.state() for rank, process in self._neighbours.items()}
        doomed = [rank for rank, state in states.items() if rank in silent or state == STOPPED]
        others = [rank for rank, state in states.items() if rank not in doomed and state != GONE]
        if not doomed or any(rank < self._rank for rank in others):
            return
        # The launcher returns the status of the first rank that it sees ended: not a killed one's.
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end and any(
            self._neighbours[rank].state() != GONE for rank in others
        ):
            time.sleep(0.1)
        if others:
            time.sleep(LAUNCHER_LOOKS_S)
        for rank in doomed:
            self._neighbours[rank].kill()
