"""The watchdog's thread and the ranks' board, in one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sdp_llm.activity import ACTIVITY, DATA, SAVE, Activity, Wait
from sdp_llm.errors import ConfigError, RankLost
from sdp_llm.processes import ProcessId, this_process
from sdp_llm.training import board, watchdog
from sdp_llm.training.board import Board, Notice
from sdp_llm.training.watchdog import Watchdog


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, names in ((watchdog, ("TICK_S", "SETTLE_S", "LAUNCHER_LOOKS_S")), (board, ())):
        for name in names:
            monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(watchdog, "LEAVE_S", 0.3)
    monkeypatch.setattr(watchdog, "LEARN_S", 1.0)
    monkeypatch.setattr(watchdog, "FIRST_STEP_FACTOR", 2)
    monkeypatch.setattr(watchdog, "TEARDOWN_S", 3600.0)
    monkeypatch.setattr(board, "INTERVAL_S", 0.02)
    before = dict(vars(ACTIVITY))
    vars(ACTIVITY).update(vars(Activity()))
    yield
    watchdog.faulthandler.cancel_dump_traceback_later()
    vars(ACTIVITY).update(before)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    made = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    return made


def until(is_so: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def alone(folder: Path, timeout: float) -> tuple[Watchdog, list[int]]:
    statuses: list[int] = []
    return Watchdog(timeout, 0, [this_process()], folder, statuses.append), statuses


# -- what is noted --------------------------------------------------------------------------------


def test_a_wait_is_over_or_stays_after_an_error() -> None:
    activity = Activity()
    with activity.waiting("outer"):
        with activity.waiting("inner", [1, 2]):
            assert activity.wait == Wait("inner", (1, 2))
        assert activity.wait == Wait("outer", None)
    assert activity.wait is None
    with pytest.raises(RuntimeError), activity.waiting("torn"):
        raise RuntimeError
    assert activity.wait == Wait("torn", None)
    activity.enter(DATA)
    assert activity.wait is None


def test_helpers_count_only_while_a_save_may_wait_for_them() -> None:
    activity = Activity()

    def beat_elsewhere() -> int:
        thread = threading.Thread(target=activity.beat)
        thread.start()
        thread.join()
        return activity.beats

    assert beat_elsewhere() == 0
    activity.enter(SAVE)
    assert beat_elsewhere() == 1
    activity.enter(DATA)
    activity.beat()
    activity.end_step(7)
    assert (activity.beats, activity.step, activity.steps_ended) == (3, 7, 1)


# -- one rank -------------------------------------------------------------------------------------


def test_a_rank_that_does_not_go_on_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dog, statuses = alone(tmp_path, 0.2)
    reasons: list[str] = []
    dog.on_failure = reasons.append
    with dog:
        ACTIVITY.enter(DATA)
        until(lambda: statuses)
    assert statuses == [4]
    pid = this_process().pid
    [reason] = reasons
    assert reason.startswith("no step ended within 0 s (training.step_timeout): rank 0 (pid ")
    assert reason.endswith("last in data after step 0")
    printed = capfd.readouterr().err
    assert f"error: {reason}\n" in printed.replace(" [rank 0]", "")
    stacks = (tmp_path / "stacks-rank-0.txt").read_text()
    assert stacks in printed
    assert stacks.startswith(f"stacks of rank 0 (pid {pid}), ")
    assert "test_a_rank_that_does_not_go_on_ends" in stacks


def test_a_run_folder_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    dog, statuses = alone(tmp_path / "never", 0.1)
    with dog:
        until(lambda: statuses)
    assert statuses == [4]
    assert not (tmp_path / "never").exists()


def test_beats_keep_it_alive_and_the_first_step_may_take_longer(tmp_path: Path) -> None:
    dog, statuses = alone(tmp_path, 0.5)
    with dog:
        time.sleep(0.7)  # less than the timeout times the factor
        ACTIVITY.end_step(1)
        for _ in range(8):
            time.sleep(0.1)
            ACTIVITY.beat()
    time.sleep(0.7)  # nobody watches any more
    assert statuses == []


def test_time_in_which_the_process_did_not_run_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog, statuses = alone(tmp_path, 2.0)
    started = time.monotonic()
    times = iter([started, *(started + 1000 * i for i in range(1, 10_000))])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(times))
    with dog:
        threading.Event().wait(0.5)
    assert statuses == []


def test_an_error_of_ones_own_passes(tmp_path: Path) -> None:
    dog, statuses = alone(tmp_path, 10)
    with pytest.raises(ZeroDivisionError), dog:
        raise ZeroDivisionError
    assert statuses == []


# -- several ranks --------------------------------------------------------------------------------


# Not this machine's: a rank that does not answer is killed.
AFAR = replace(this_process(), machine="another", pid=5)


def pair(
    tmp_path: Path, other: ProcessId = AFAR, timeout: float = 0.3
) -> tuple[Watchdog, list[int]]:
    """Rank 1 of two."""
    statuses: list[int] = []
    processes = [other, this_process()]
    return Watchdog(timeout, 1, processes, tmp_path, statuses.append), statuses


def publish(store: dist.TCPStore, state: dict[str, Any]) -> None:
    dist.PrefixStore("sdp_llm/0", store).set("state/0", json.dumps(state))


def state_of(dog: Watchdog, **changes: Any) -> dict[str, Any]:
    return vars(replace(dog._state(), rank=0, **changes))


def test_a_rank_that_says_nothing_more_is_named(
    store: dist.TCPStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dog, statuses = pair(tmp_path)
    publish(store, state_of(dog, pid=5, is_overdue=True, sent=3, phase="data"))
    with dog:
        until(lambda: statuses)
    assert statuses == [4]
    printed = capfd.readouterr().err
    assert "rank 0 (pid 5 on " in printed
    assert "does not answer, last in data after step 0\n" in printed
    shared = dist.PrefixStore("sdp_llm/0", store)
    notice = json.loads(shared.get("notice"))
    assert (notice["rank"], notice["is_stall"], notice["silent"]) == (1, True, [0])


def test_while_another_rank_goes_on_nothing_ends(store: dist.TCPStore, tmp_path: Path) -> None:
    dog, statuses = pair(tmp_path)
    with dog:
        for sent in range(100):
            publish(store, state_of(dog, is_overdue=False, sent=sent))
            time.sleep(0.015)
    assert statuses == []


def test_what_another_rank_found_ends_this_one(
    store: dist.TCPStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dog, statuses = pair(tmp_path)
    notice = Notice(0, "rank 7 broke", is_stall=False)
    with dog:
        dist.PrefixStore("sdp_llm/0", store).set("notice", json.dumps(vars(notice)))
        until(lambda: statuses)
    assert statuses == [4]
    assert "rank 7 broke\n" in capfd.readouterr().err


def test_an_error_while_waiting_is_the_others(store: dist.TCPStore, tmp_path: Path) -> None:
    dog, _ = pair(tmp_path, timeout=60)
    shared = dist.PrefixStore("sdp_llm/0", store)

    def torn() -> None:
        with dog, ACTIVITY.waiting("gradient"):
            shared.set("notice", json.dumps(vars(Notice(0, "rank 7 broke"))))
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RankLost, match="rank 7 broke"):
        torn()


@pytest.mark.parametrize("is_waiting", [False, True])
def test_an_error_of_this_rank_is_told(
    is_waiting: bool, store: dist.TCPStore, tmp_path: Path
) -> None:
    dog, _ = pair(tmp_path, timeout=60)
    ACTIVITY.wait = Wait("gradient") if is_waiting else None  # nobody else knows why it was torn
    with pytest.raises(RuntimeError, match="this"), dog:
        raise RuntimeError("this\nand that")
    notice = json.loads(dist.PrefixStore("sdp_llm/0", store).get("notice"))
    assert notice["reason"] == "rank 1 failed in start after step 0: RuntimeError: this"


def test_a_process_that_is_gone_ends_the_run(
    store: dist.TCPStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = replace(this_process(), pid=2**22 + 5)
    dog, statuses = pair(tmp_path, gone, timeout=60)
    with dog:
        ACTIVITY.end_step(1)
        until(lambda: statuses)
    assert f"rank 0 (pid {gone.pid} on {gone.host}) is gone, killed or crashed" in (
        capfd.readouterr().err
    )


def test_a_store_that_is_dead_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(board, "connect", lambda _: (_ for _ in ()).throw(ConfigError("no store")))
    dog, statuses = pair(tmp_path)
    with dog:
        until(lambda: statuses)
    assert statuses == [4]
    assert "the ranks' store does not answer; look at rank 0" in capfd.readouterr().err


def test_no_call_of_the_store_is_under_way_when_python_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow:
        def set(self, key: str, value: str) -> None:
            called.set()
            time.sleep(0.5)

        def check(self, keys: list[str]) -> bool:
            return False

    called = threading.Event()
    monkeypatch.setattr(board, "connect", lambda _: Slow())
    monkeypatch.setattr(board, "prefixed", lambda store: store)
    one = Board(0, 2, lambda sent: {})
    one.start()
    assert called.wait(10)
    one.close()
    assert not one.is_open


def test_the_first_notice_counts(store: dist.TCPStore) -> None:
    boards = [Board(rank, 2, lambda sent, rank=rank: {"r": rank, "sent": sent}) for rank in (0, 1)]
    for one in boards:
        one.start()
    boards[0].post(Notice(0, "first", silent=(1,)))
    boards[1].post(Notice(1, "second"))
    until(lambda: all(one.notice for one in boards))
    assert [one.notice for one in boards] == [Notice(0, "first", silent=(1,))] * 2
    assert {rank: entry["r"] for rank, entry in boards[0].read().items()} == {0: 0, 1: 1}
    for one in boards:
        one.close()
