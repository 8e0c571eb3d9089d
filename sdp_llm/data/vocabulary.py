"""Whether every token id of a corpus is one of the model's; else training fails hours later."""

from __future__ import annotations

from sdp_llm.data.indexed import IndexedDataset

_SLICE = 1 << 22  # tokens in memory at a time, as int64: 32 MiB


def id_outside(dataset: IndexedDataset, vocab_size: int, start: int, stop: int) -> int | None:
    """Return an id of the tokens ``[start, stop)`` that is not in ``[0, vocab_size)``, or None.

    It reads the files from the start of the range until it finds one, at most :data:`_SLICE`
    tokens at a time.
    """
    for position in range(start, stop, _SLICE):
        ids = dataset.tokens(position, min(position + _SLICE, stop))
        if ids.max() >= vocab_size:
            return int(ids.max())
        if ids.min() < 0:
            return int(ids.min())
    return None
