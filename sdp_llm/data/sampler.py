"""Which tokens a training step reads: a pure function of (seed, samples consumed).

The corpus is one stream of tokens, packed without padding: sample ``k`` of sequence length ``S``
is tokens ``[k S, (k + 1) S + 1)``, so that inputs are its first ``S`` and labels its last ``S``
tokens, and every token but the first is predicted exactly once per epoch.

Samples are counted over the whole run. The ``g``-th one is number ``g % N`` of epoch ``g // N``,
and within an epoch they are visited in an order that a keyed permutation computes on the fly.
Nothing is stored, so that a run resumes in O(1), exactly, and at any world size. Several corpora
are read as one by :class:`~sdp_llm.data.blend.BlendedDataset`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sdp_llm.data.indexed import IndexedDataset
from sdp_llm.errors import ConfigError

_ROUNDS = 8  # a Feistel network needs 4 to look random; 8 keep small domains well mixed


@dataclass(frozen=True)
class CorpusUse:
    """What a run reads of one corpus.

    ``num_samples`` is what the corpus has, ``share`` its part of all samples that are read, and
    ``read`` how many of its samples that is.
    """

    prefix: str
    num_samples: int
    share: float
    read: int

    @property
    def epochs(self) -> float:
        """How often the run goes through the corpus."""
        return self.read / self.num_samples


@dataclass(frozen=True)
class Place:
    """Where a sample lies: its number in its corpus, and the documents it has tokens of."""

    prefix: str
    sample: int
    first_document: int
    last_document: int

    def __str__(self) -> str:
        documents = f"document {self.first_document}"
        if self.last_document > self.first_document:
            documents = f"documents {self.first_document} to {self.last_document}"
        return f"sample {self.sample} of {self.prefix} ({documents})"


class TrainingData(Protocol):
    """Samples in the order of a run: of one corpus, or of a blend."""

    sequence_length: int

    def read(self, seed: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return samples number ``first`` to ``first + count - 1`` of a run, [count, S + 1]."""
        ...

    def locate(self, seed: int, first: int, count: int) -> list[Place]:
        """Return where the samples lie that :meth:`read` returns."""
        ...

    def require_batch(self, global_batch_size: int) -> None:
        """Raise ConfigError where one global batch needs more samples of a corpus than it has."""
        ...

    def usage(self, num_samples: int) -> list[CorpusUse]:
        """What the first ``num_samples`` samples of a run read of each corpus."""
        ...


class PackedDataset:
    """The samples of one corpus at one sequence length.

    :param dataset: The token stream.
    :param sequence_length: ``S``, the tokens a model reads at a time.
    :raises ConfigError: ``sequence_length`` is below 1 or the corpus is shorter than one sample.
    """

    def __init__(self, dataset: IndexedDataset, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ConfigError(f"sequence length {sequence_length}: must be at least 1")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.num_samples = max(dataset.num_tokens - 1, 0) // sequence_length
        if self.num_samples == 0:
            raise ConfigError(
                f"{dataset.prefix}: {dataset.num_tokens} tokens are less than one sample of "
                f"{sequence_length} + 1; shorten the sequences or use a larger corpus"
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return sample ``index``, int64 of shape [S + 1]; IndexError outside ``[0, len)``."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.dataset.prefix}")
        start = index * self.sequence_length
        return self.dataset.tokens(start, start + self.sequence_length + 1)

    def batch(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples ``indices`` [batch] as int64 of shape [batch, S + 1]."""
        batch = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        for row, index in zip(batch, indices.tolist(), strict=True):
            row[:] = self[index]
        return batch

    def read(self, seed: int, first: int, count: int, corpus: int = 0) -> npt.NDArray[np.int64]:
        """Return samples number ``first`` to ``first + count - 1`` of a run.

        :param corpus: The position in a blend, see :func:`samples_at`.
        :returns: int64 of shape [count, S + 1].
        """
        return self.batch(samples_at(seed, first, count, self.num_samples, corpus))

    def locate(self, seed: int, first: int, count: int, corpus: int = 0) -> list[Place]:
        """Return where the samples lie that :meth:`read` returns."""
        indices = samples_at(seed, first, count, self.num_samples, corpus).tolist()
        return [self._place(index) for index in indices]

    def _place(self, sample: int) -> Place:
        first = sample * self.sequence_length
        last = first + self.sequence_length  # the last target
        document_of = self.dataset.document_of
        return Place(self.dataset.prefix, sample, document_of(first), document_of(last))

    def require_batch(self, global_batch_size: int) -> None:
        """Check that no step inside an epoch reads a sample twice.

        :raises ConfigError: The corpus is smaller than one global batch.
        """
        if self.num_samples < global_batch_size:
            raise ConfigError(
                f"{self.dataset.prefix}: {self.num_samples} samples of {self.sequence_length} "
                f"tokens are less than one global batch of {global_batch_size}; use a larger "
                "corpus, shorter sequences or a smaller train_batch_size"
            )

    def usage(self, num_samples: int) -> list[CorpusUse]:
        """What ``num_samples`` samples are of this corpus: all."""
        return [CorpusUse(self.dataset.prefix, self.num_samples, 1.0, num_samples)]


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, element by element, modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int, corpus: int) -> npt.NDArray[np.uint64]:
    # A hash and not a random generator: its stream is the same in every numpy release.
    text = f"sdp_llm sample order {seed} {epoch}" + (f" {corpus}" if corpus else "")
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    return np.array(struct.unpack(f"<{_ROUNDS}Q", digest), dtype=np.uint64)


def permute(
    positions: npt.NDArray[np.int64], num_samples: int, seed: int, epoch: int, corpus: int = 0
) -> npt.NDArray[np.int64]:
    """Map positions in an epoch to samples by a bijection of ``[0, num_samples)``.

    A balanced Feistel network permutes the smallest ``[0, 4**h)`` that holds all samples; values
    that land outside ``[0, num_samples)`` walk on along their cycle until they are inside
    ("cycle walking", Black and Rogaway 2002), less than four passes on average.

    :param positions: int64 of any shape, values in ``[0, num_samples)``.
    :param num_samples: Samples per epoch, at least 1.
    :param seed: Seed of the run.
    :param epoch: Number of the epoch; every epoch has an order of its own.
    :param corpus: Position in a blend; corpora of one size must not share an order.
    :returns: int64 of the same shape.
    """
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _round_keys(seed, epoch, corpus)
    values = positions.astype(np.uint64).ravel()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= np.uint64(num_samples)
    return values.astype(np.int64).reshape(positions.shape)


def samples_at(
    seed: int, first: int, count: int, num_samples: int, corpus: int = 0
) -> npt.NDArray[np.int64]:
    """Return the sample indices number ``first`` to ``first + count - 1`` of a run.

    Each epoch of ``num_samples`` visits every sample once; a range may span several epochs.

    :param corpus: Position of the corpus in a blend: each has an order of its own. The first one's
        is that of a run that reads it alone.
    :returns: int64 of shape [count], values in ``[0, num_samples)``.
    :raises ValueError: ``first`` or ``count`` is negative, or ``num_samples`` is below 1.
    """
    if first < 0 or count < 0 or num_samples < 1:
        raise ValueError(f"first {first}, count {count} >= 0 and num_samples {num_samples} >= 1")
    order = np.empty(count, dtype=np.int64)
    for epoch in range(first // num_samples, (first + count - 1) // num_samples + 1):
        start = max(first, epoch * num_samples)
        stop = min(first + count, (epoch + 1) * num_samples)
        positions = np.arange(start, stop, dtype=np.int64) - epoch * num_samples
        order[start - first : stop - first] = permute(positions, num_samples, seed, epoch, corpus)
    return order


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """Return rank ``rank``'s part of the global batch: the rank-th contiguous slice.

    :raises ConfigError: The world size does not divide the global batch, or there is no such rank.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of world size {world_size}: must be in [0, world size)")
    if global_batch_size < 1 or global_batch_size % world_size:
        raise ConfigError(
            f"global batch of {global_batch_size} samples: must be a positive multiple of the "
            f"world size {world_size}; change train_batch_size or the number of ranks"
        )
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def batch_for_rank(
    data: TrainingData,
    seed: int,
    samples_consumed: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
) -> npt.NDArray[np.int64]:
    """Return what one rank reads in the step that follows ``samples_consumed`` samples.

    Together the ranks read samples number ``samples_consumed`` to
    ``samples_consumed + global_batch_size - 1`` of the run, in rank order, at any world size.

    :returns: int64 of shape [global_batch_size / world_size, S + 1].
    :raises ConfigError: The world size does not divide the global batch, or a corpus is smaller
        than its part of one global batch (a step would read a sample twice).
    """
    part = rank_slice(global_batch_size, rank, world_size)
    data.require_batch(global_batch_size)
    return data.read(seed, samples_consumed + part.start, part.stop - part.start)


def validation_samples(dataset: PackedDataset, limit: int) -> npt.NDArray[np.int64]:
    """Return at most ``limit`` sample indices, evenly spaced over the corpus, ascending.

    Deterministic and without a seed, so that every run and every rank evaluates the same text.

    :returns: int64 of shape [min(limit, num_samples)], no index twice.
    :raises ConfigError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"limit of {limit} validation samples: must be at least 1")
    count = min(limit, dataset.num_samples)
    return np.arange(count, dtype=np.int64) * dataset.num_samples // count
