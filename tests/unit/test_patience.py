"""Waiting for a hub: what is read twice comes once, and what does not pass is not waited for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_prep import _hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    slept: list[float] = []
    monkeypatch.setattr(_hub.time, "sleep", slept.append)
    return slept


def test_values_come_once_and_in_order(
    waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    breaks = [2, 2, 0, 5]

    def read() -> Iterator[int]:
        stop = breaks.pop(0) if breaks else 7
        yield from range(stop)
        if stop < 7:
            raise ConnectionError("gone")

    assert list(_hub.patiently(read, "a.parquet")) == list(range(7))
    # After every new value the patience is new.
    assert waits == [5, 10, 20, 5]
    assert capsys.readouterr().err.count("for the hub to give a.parquet: ConnectionError") == 4


def test_patience_ends(waits: list[float]) -> None:
    def read() -> Iterator[int]:
        yield 1
        raise TimeoutError("no answer")

    values = _hub.patiently(read, "a.parquet")
    assert next(values) == 1
    with pytest.raises(_hub.HubUnreachable, match=r"did not give a\.parquet for half an hour"):
        next(values)
    assert 25 * 60 < sum(waits) < 35 * 60


@pytest.mark.parametrize("error", [ValueError("corrupt"), FileNotFoundError("a"), OSError("b")])
def test_what_does_not_pass_is_not_waited_for(waits: list[float], error: Exception) -> None:
    def read() -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(type(error)):
        list(_hub.patiently(read, "a.parquet"))
    assert waits == []
