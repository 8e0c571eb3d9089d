"""Token corpora on disk and the order in which training reads them."""

from __future__ import annotations

from sdp_llm.data.blend import BlendedDataset
from sdp_llm.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from sdp_llm.data.sampler import (
    CorpusUse,
    PackedDataset,
    Place,
    TrainingData,
    batch_for_rank,
    rank_slice,
    samples_at,
    validation_samples,
)

__all__ = [
    "BlendedDataset",
    "CorpusUse",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PackedDataset",
    "Place",
    "TrainingData",
    "batch_for_rank",
    "best_dtype",
    "rank_slice",
    "samples_at",
    "validation_samples",
]
