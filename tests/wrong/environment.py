"""Environments that are wrong: what launchers say, devices, versions."""

from __future__ import annotations

from sdp_llm.launched import Launched, check_devices, count_in, launched
from sdp_llm.versions import OLDEST, check_versions
from tests.wrong.scene import Wrong

HERE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def ranks(name: str, changes: dict[str, str | None], *words: str) -> Wrong:
    """What a launcher says, but for the changes; None: it does not say it."""
    environment = {k: v for k, v in (HERE | changes).items() if v is not None}
    return Wrong("environment", name, lambda _: launched(environment), words)


def devices(name: str, environment: dict[str, str], gpus: int, rank: int, *words: str) -> Wrong:
    here = Launched(rank=rank, world_size=8, local_rank=rank)
    return Wrong("environment", name, lambda _: check_devices(here, environment, gpus), words)


def versions(name: str, found: dict[str, str | None], *words: str) -> Wrong:
    return Wrong("environment", name, lambda _: check_versions(OLDEST | found), words)


CASES = [
    ranks(
        "no RANK", {"RANK": None}, "RANK: missing in the environment", "WORLD_SIZE = 2", "torchrun"
    ),
    ranks("no WORLD_SIZE", {"WORLD_SIZE": None}, "WORLD_SIZE: missing", "RANK = 0", "torchrun"),
    ranks("no LOCAL_RANK", {"LOCAL_RANK": None}, "LOCAL_RANK: missing", "start the ranks with"),
    ranks("no MASTER_ADDR", {"MASTER_ADDR": None}, "MASTER_ADDR: missing", "WORLD_SIZE = 2"),
    ranks("no MASTER_PORT", {"MASTER_PORT": None}, "MASTER_PORT: missing", "WORLD_SIZE = 2"),
    ranks("a port in words", {"MASTER_PORT": "http"}, "MASTER_PORT = http", "integer ≥ 0"),
    ranks("a size in words", {"WORLD_SIZE": "two"}, "WORLD_SIZE = two", "integer ≥ 1"),
    ranks("a size of nothing", {"WORLD_SIZE": ""}, "WORLD_SIZE = ", "integer ≥ 1"),
    ranks("a size of 0", {"WORLD_SIZE": "0"}, "WORLD_SIZE = 0", "integer ≥ 1"),
    ranks("a negative rank", {"RANK": "-1"}, "RANK = -1", "integer ≥ 0"),
    ranks("a rank beyond the size", {"RANK": "2"}, "RANK = 2", "below WORLD_SIZE = 2"),
    ranks(
        "ranks of MPI",
        {"RANK": None, "WORLD_SIZE": None, "PMI_SIZE": "8"},
        "PMI_SIZE = 8: MPI started the ranks",
        "start the ranks with deepspeed or torchrun",
    ),
    ranks("a fraction of a device", {"LOCAL_RANK": "0.5"}, "LOCAL_RANK = 0.5", "integer ≥ 0"),
    Wrong(
        "environment",
        "no number of ranks here",
        lambda _: count_in({"LOCAL_SIZE": "all"}, "LOCAL_SIZE", 1),
        ("LOCAL_SIZE = all", "integer ≥ 1"),
    ),
    devices(
        "an accelerator of another kind",
        {"DS_ACCELERATOR": "xpu"},
        0,
        0,
        "DS_ACCELERATOR = xpu",
        "cuda and cpu",
    ),
    devices(
        "CUDA without a GPU", {"DS_ACCELERATOR": "cuda"}, 0, 0, "finds no GPU", "DS_ACCELERATOR=cpu"
    ),
    devices(
        "CUDA with every GPU hidden",
        {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""},
        0,
        0,
        "CUDA_VISIBLE_DEVICES = )",
    ),
    devices(
        "fewer GPUs than ranks", {}, 2, 2, "LOCAL_RANK = 2", "has 2 GPUs", "--num_accelerators 2"
    ),
    devices(
        "fewer visible GPUs than ranks",
        {"CUDA_VISIBLE_DEVICES": "5"},
        1,
        1,
        "has 1 GPU",
        "CUDA_VISIBLE_DEVICES = 5",
    ),
    versions(
        "an old torch", {"torch": "2.9.1+cpu"}, "torch 2.9.1+cpu: 2.13 or newer", "pip install"
    ),
    versions(
        "an old transformers", {"transformers": "4.57.1"}, "transformers 4.57.1: 5.23 or newer"
    ),
    versions("no deepspeed", {"deepspeed": None}, "deepspeed is not installed: 0.19.8 or newer"),
]
