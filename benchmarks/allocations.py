"""What torch allocates while it computes: live bytes and peaks, by who allocated.

Storages that live for a moment, or in C++ alone, are missed by a walk between steps. Here every
operator is seen, of the backward pass too, and every storage from its first tensor to its end.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdp_llm.sharding import optimizer, reducer

BACKWARD = "activations"  # the phase in which autograd makes gradients
TRANSIENT = "transient"
STEP = "step"
_PHASE_OF_FILE = {reducer.__file__: TRANSIENT, optimizer.__file__: STEP}


class AllocationTracker(TorchDispatchMode):
    """Within it, counts the bytes of storages by the phase that allocated them.

    The phase is what :meth:`phase` says. What ``sharding/reducer.py`` allocates, and the gradients
    that autograd hands to it, are of the phase :data:`TRANSIENT`; what the optimizer allocates in
    its step, of :data:`STEP`.

    :ivar live: bytes alive now, by phase.
    :ivar peak: most bytes alive at a time, by phase, since :meth:`reset_peaks`.
    :ivar total_peak: most bytes alive at a time, of all phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.total_peak = 0
        self._phase = "other"
        self._known: dict[int, tuple[str, int]] = {}  # by the address of the storage's C++ object

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is allocated within belongs to ``name``."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def reset_peaks(self) -> None:
        """Forget the peaks: they start again from what is alive."""
        self.peak = self.live.copy()
        self.total_peak = self.live.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        phase = _phase_of(sys._getframe()) or self._phase
        inputs = set()
        for tensor in _tensors((args, kwargs)):
            inputs.add(_address(tensor))
            if phase == TRANSIENT:
                self._hand_over(tensor)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            # The result of an operation in place, or a view, is nothing new.
            if _address(tensor) not in inputs:
                self._add(tensor, phase)
        return result

    def _add(self, tensor: Tensor, phase: str) -> None:
        address = _address(tensor)
        if address in self._known:
            return
        storage = tensor.untyped_storage()
        self._known[address] = (phase, storage.nbytes())
        weakref.finalize(storage, self._remove, address).atexit = False
        self._count(phase, storage.nbytes())

    def _remove(self, address: int) -> None:
        phase, size = self._known.pop(address)
        self.live[phase] -= size

    def _hand_over(self, tensor: Tensor) -> None:
        """A gradient that autograd made reaches the reducer."""
        address = _address(tensor)
        phase, size = self._known.get(address, (TRANSIENT, 0))
        if phase == BACKWARD:
            self._known[address] = (TRANSIENT, size)
            self.live[phase] -= size
            self._count(TRANSIENT, size)

    def _count(self, phase: str, size: int) -> None:
        self.live[phase] += size
        self.peak[phase] = max(self.peak[phase], self.live[phase])
        self.total_peak = max(self.total_peak, self.live.total())


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.layout == torch.strided:
            yield leaf


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _phase_of(frame: FrameType | None) -> str | None:
    """The phase of the innermost caller that has one."""
    while frame is not None:
        phase = _PHASE_OF_FILE.get(frame.f_code.co_filename)
        if phase is not None:
            return phase
        frame = frame.f_back
    return None
