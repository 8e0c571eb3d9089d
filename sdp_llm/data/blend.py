"""Several corpora read as one, in fixed proportions: still a function of the samples consumed.

A run is cut into blocks of ``BLOCK`` samples. Corpus ``i`` has ``b_i`` of them in every block, at
the same places of each block, so that before the ``g``-th sample of the run it has been read

    ``(g // BLOCK) * b_i + (places of i before g % BLOCK)``

times. This is the position in the corpus, which :func:`~sdp_llm.data.sampler.samples_at` turns
into a sample: every sample of a corpus comes once per epoch of that corpus. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from sdp_llm.data.sampler import CorpusUse, PackedDataset, Place
from sdp_llm.errors import ConfigError

BLOCK = 1000


def samples_per_block(weights: Sequence[float]) -> list[int]:
    """Return how many samples of a block each corpus has: at least 1, in sum ``BLOCK``.

    Weights are rounded to multiples of ``1 / BLOCK`` by largest remainder, the earlier corpus
    where remainders are equal. What is given to a corpus whose weight is smaller than that comes
    from those that are the furthest above their weight.

    :param weights: Positive, in any unit.
    :raises ConfigError: There are more corpora than samples in a block.
    """
    if len(weights) > BLOCK:
        raise ConfigError(f"{len(weights)} corpora: at most {BLOCK} can be blended; join some")
    # Exact numbers, so that every machine rounds alike.
    exact = [Fraction(weight) for weight in weights]
    quotas = [BLOCK * weight / sum(exact) for weight in exact]
    counts = [max(1, int(quota)) for quota in quotas]
    while (missing := BLOCK - sum(counts)) != 0:
        lack = [quota - count for quota, count in zip(quotas, counts, strict=True)]
        if missing > 0:
            counts[lack.index(max(lack))] += 1
        else:
            counts[min((i for i, c in enumerate(counts) if c > 1), key=lack.__getitem__)] -= 1
    return counts


def interleave(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return which corpus each place of a block reads, int64 of shape [sum of counts].

    Each place goes to the corpus that lags furthest behind its proportion, the earlier one where
    two lag alike. No corpus gets more than its count: one that lags is below it.
    """
    total = sum(counts)
    proportions = np.array(counts, dtype=np.int64)
    lag = np.zeros_like(proportions)
    pattern = np.empty(total, dtype=np.int64)
    for place in range(total):
        lag += proportions
        pattern[place] = lag.argmax()
        lag[pattern[place]] -= total
    return pattern


class BlendedDataset:
    """The samples of several corpora in the proportions of their weights.

    :param corpora: One or more, at the same sequence length. A corpus has an order of its own,
        which depends on its position in this list and not on where its files are.
    :param weights: Positive, one for each corpus; see :func:`samples_per_block`.
    :raises ConfigError: There are too many corpora for a block.
    :raises ValueError: The sequence lengths differ.
    """

    def __init__(self, corpora: Sequence[PackedDataset], weights: Sequence[float]) -> None:
        lengths = {corpus.sequence_length for corpus in corpora}
        if len(lengths) != 1:
            raise ValueError(f"corpora of one sequence length are needed, not of {sorted(lengths)}")
        [self.sequence_length] = lengths
        self.corpora = tuple(corpora)
        counts = samples_per_block(weights)
        self._counts = np.array(counts, dtype=np.int64)
        self._pattern = interleave(counts)
        # before[place, i]: samples of corpus i at earlier places of the block
        is_at = self._pattern[:, None] == np.arange(len(counts))
        self._before = np.zeros((BLOCK + 1, len(counts)), dtype=np.int64)
        self._before[1:] = is_at.cumsum(axis=0)

    def positions(self, sample: int) -> npt.NDArray[np.int64]:
        """Return how often each corpus is read before the ``sample``-th of a run, [corpora]."""
        blocks, place = divmod(sample, BLOCK)
        return blocks * self._counts + self._before[place]

    def read(self, seed: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return samples number ``first`` to ``first + count - 1`` of a run.

        :returns: int64 of shape [count, S + 1].
        :raises ValueError: ``first`` or ``count`` is negative.
        """
        if first < 0 or count < 0:
            raise ValueError(f"first {first} and count {count} must not be negative")
        batch = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        places = self._pattern[np.arange(first, first + count) % BLOCK]
        for i, (corpus, start, length) in enumerate(self._parts(first, count)):
            batch[places == i] = corpus.read(seed, start, length, i)
        return batch

    def locate(self, seed: int, first: int, count: int) -> list[Place]:
        """Return where the samples lie that :meth:`read` returns."""
        parts = [
            iter(corpus.locate(seed, start, length, i))
            for i, (corpus, start, length) in enumerate(self._parts(first, count))
        ]
        places = self._pattern[np.arange(first, first + count) % BLOCK]
        return [next(parts[i]) for i in places.tolist()]

    def _parts(self, first: int, count: int) -> list[tuple[PackedDataset, int, int]]:
        """Each corpus with the position where it is read, and how many samples are."""
        starts, ends = self.positions(first), self.positions(first + count)
        lengths = (ends - starts).tolist()
        return list(zip(self.corpora, starts.tolist(), lengths, strict=True))

    def require_batch(self, global_batch_size: int) -> None:
        """Check that no step inside an epoch reads a sample twice, wherever in a block it starts.

        :raises ConfigError: A corpus is smaller than its part of one global batch.
        """
        blocks, rest = divmod(global_batch_size, BLOCK)
        twice = np.concatenate([self._before, self._before[1:] + self._counts])
        in_rest = twice[rest : rest + BLOCK] - twice[:BLOCK]
        most = blocks * self._counts + in_rest.max(axis=0)
        for corpus, needed in zip(self.corpora, most.tolist(), strict=True):
            if corpus.num_samples < needed:
                raise ConfigError(
                    f"{corpus.dataset.prefix}: {corpus.num_samples} samples of "
                    f"{self.sequence_length} tokens are less than its part of one global batch, "
                    f"{needed} of {global_batch_size}; use a larger corpus, a smaller weight, "
                    "shorter sequences or a smaller train_batch_size"
                )

    def usage(self, num_samples: int) -> list[CorpusUse]:
        """What the first ``num_samples`` samples of a run read of each corpus."""
        read = self.positions(num_samples).tolist()
        return [
            CorpusUse(corpus.dataset.prefix, corpus.num_samples, int(b) / BLOCK, count)
            for corpus, b, count in zip(self.corpora, self._counts, read, strict=True)
        ]
