"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import Pool

# Before DeepSpeed looks: the ranks are on gloo, also where there are GPUs.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Ranks run beside the test; more threads than cores make both many times slower.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """``pools(n)`` is a pool of n gloo ranks, started when first asked for."""
    started: dict[int, Pool] = {}

    def pool(world_size: int) -> Pool:
        if world_size not in started:
            started[world_size] = Pool(world_size, tmp_path_factory.mktemp("pool"))
        return started[world_size]

    yield pool
    for running in started.values():
        running.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with all that a run reads; see ``tests.integration.conftest.Tiny``."""
    from tests.integration.conftest import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Genuine FineWeb text and a tokenizer, where the folder beside the project has them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder
