"""When the reduction of each unit starts."""

from __future__ import annotations

from collections.abc import Sequence


class LaunchCursor:
    """Orders the reductions of one backward pass.

    Gradients of different units may become complete in an order that differs between ranks. So a
    unit that is complete waits until all later units in forward order have been launched; what is
    incomplete at the end goes in the same order. Every rank then launches its units in descending
    order, and two ranks that share units launch those in the same order.

    :param sizes: the number of parameters of each of this rank's units, in forward order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self.reset()

    def reset(self) -> None:
        """Forget the pass before."""
        self._arrived: list[set[int]] = [set() for _ in self._sizes]
        self._next = len(self._sizes) - 1

    def arrive(self, unit: int, parameter: int) -> list[int]:
        """Note that the gradient of a parameter is there.

        :returns: the units that are to be launched now, in this order.
        :raises RuntimeError: when it arrives for the second time in one pass.
        """
        if parameter in self._arrived[unit]:
            raise RuntimeError("a parameter got two gradients in one backward pass")
        self._arrived[unit].add(parameter)
        ready = []
        while self._next >= 0 and len(self._arrived[self._next]) == self._sizes[self._next]:
            ready.append(self._next)
            self._next -= 1
        return ready

    def missing(self, unit: int) -> list[int]:
        """The parameters of a unit whose gradients have not arrived."""
        return [p for p in range(self._sizes[unit]) if p not in self._arrived[unit]]

    def finish(self) -> list[int]:
        """The units that have not been launched, in the order to launch them."""
        rest = list(range(self._next, -1, -1))
        self._next = -1
        return rest
