"""Which texts a run has already had, by a 128-bit hash of each."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

HASH = np.dtype("S16")  # numpy compares and sorts it byte by byte


def hash_text(text: bytes) -> bytes:
    """Return the 16 bytes that stand for a text: BLAKE2b of its UTF-8."""
    return hashlib.blake2b(text, digest_size=HASH.itemsize).digest()


def in_validation(hashes: npt.NDArray[Any], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which texts belong to validation: those with hashes in the lowest ``fraction``.

    :param hashes: ``HASH`` of shape [n].
    :param fraction: In [0, 1).
    """
    high = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2)[:, 0]
    return high < np.uint64(fraction * 2.0**64)


class SeenTexts:
    """A set of hashes, 16 bytes each, that grows by batches.

    Sorted runs whose sizes at least double from the last to the first: a batch looks into few
    runs, and each hash is merged only log2(n) times. Merging holds the largest run twice.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[Any]] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, hashes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Add ``hashes`` (``HASH``, [n]) and return which of them are new, bool [n].

        Of equal ones within the batch, the first is new.
        """
        values, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(values), dtype=bool)
        for run in self._runs:
            at = np.searchsorted(run, values)
            inside = at < len(run)
            known[inside] |= run[at[inside]] == values[inside]
        new = np.zeros(len(hashes), dtype=bool)
        new[first[~known]] = True
        self._push(values[~known])
        return new

    def _push(self, values: npt.NDArray[Any]) -> None:
        if len(values):
            self._runs.append(values)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            joined = np.concatenate([self._runs.pop(), self._runs.pop()])
            joined.sort(kind="stable")  # which merges sorted runs instead of starting over
            self._runs.append(joined)
