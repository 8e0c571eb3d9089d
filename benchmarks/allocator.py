"""What torch's CPU allocator hands out during a step, from its own record.

The profiler notes every allocation and every release, also those made in C++ (DDP's reducer) and
those of storages that are resized (FSDP2). Only differences are in it: what was alive before is
counted by :mod:`benchmarks.storages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

_START, _MARK = "benchmarks.allocator: start", "benchmarks.allocator: mark"


@dataclass(frozen=True)
class AllocatedBytes:
    """Bytes above those at the start: at most, and at the first mark."""

    peak: int
    at_mark: int


def record_allocations(action: Callable[[Callable[[], None]], None]) -> AllocatedBytes:
    """Run ``action(mark)`` twice, which calls ``mark()`` where ``at_mark`` is to be taken.

    The second time counts: of what was there before the record starts, releases are not seen.
    """

    def mark() -> None:
        with record_function(_MARK):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action(lambda: None)
        with record_function(_START):
            pass
        action(mark)
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    times = {
        name: min(e.start_ns() for e in events if e.name() == name) for name in (_START, _MARK)
    }
    now = peak = at_mark = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() != "[memory]" or event.start_ns() < times[_START]:
            continue
        now += event.nbytes()
        peak = max(peak, now)
        if event.start_ns() < times[_MARK]:
            at_mark = now
    return AllocatedBytes(peak, at_mark)
