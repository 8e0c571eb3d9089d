"""What the ranks hold, put together and compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def assembled(parts: list[list[tuple[str, int, int, np.ndarray]]], like: dict[str, Any]) -> Any:
    """Whole tensors from the ranks' slices, and how many ranks hold each element."""
    values = {name: np.zeros(master.numel(), np.float32) for name, master in like.items()}
    counts = {name: np.zeros(master.numel(), int) for name, master in like.items()}
    for slices in parts:
        for name, start, stop, value in slices:
            values[name][start:stop] = value
            counts[name][start:stop] += 1
    return values, counts


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The norm of the difference over the norm, of all tensors together."""
    difference = sum(np.square(found[n].ravel() - expected[n].ravel()).sum() for n in expected)
    return float(np.sqrt(difference / sum(np.square(e).sum() for e in expected.values())))


def whole(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The union of what the ranks store; who stores the same stores equal bits."""
    whole: dict[str, np.ndarray] = {}
    for part in parts:
        for name, value in part.items():
            np.testing.assert_array_equal(whole.setdefault(name, value), value, err_msg=name)
    return whole


def to_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
