"""What a launcher tells a process in its environment, checked before anything leans on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdp_llm.errors import ConfigError

_START = "start the ranks with deepspeed or torchrun, as in the README"
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_ACCELERATORS = ("cuda", "cpu")


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together; alone it is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launched(environment: Mapping[str, str]) -> Launched:
    """Read RANK, WORLD_SIZE and LOCAL_RANK.

    :raises ConfigError: one is missing beside the others, is no number or contradicts another, or
        MPI started the ranks and set none.
    """
    found = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    given = [f"{name} = {value}" for name, value in found.items() if value is not None]
    # DeepSpeed's runner exports LOCAL_RANK to notebooks too, where nothing was launched.
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        refuse_mpi(environment)
        return Launched()
    for name, value in found.items():
        if value is None:
            raise ConfigError(
                f"{name}: missing in the environment beside {' and '.join(given)}; {_START}, or "
                "unset the others to train on one rank"
            )
    size = count_in(environment, "WORLD_SIZE", 1)
    rank = count_in(environment, "RANK", 0)
    if rank >= size:
        raise ConfigError(
            f"RANK = {rank}: must be below WORLD_SIZE = {size} in the environment; {_START}"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not environment.get(name):
            raise ConfigError(
                f"{name}: missing in the environment beside WORLD_SIZE = {size}; {_START}"
            )
    if size > 1:
        count_in(environment, "MASTER_PORT", 0)
    return Launched(rank, size, count_in(environment, "LOCAL_RANK", 0))


def refuse_mpi(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where MPI started several processes: each would be a run of its own."""
    for name in _MPI_SIZES:
        if name in environment and count_in(environment, name, 1) > 1:
            raise ConfigError(
                f"{name} = {environment[name]}: MPI started the ranks, RANK is not set; {_START}"
            )


def count_in(environment: Mapping[str, str], name: str, minimum: int) -> int:
    """An integer of the environment.

    :raises ConfigError: it is none, or less than ``minimum``.
    """
    text = environment[name]
    if not (text.isascii() and text.isdigit()) or int(text[:10]) < minimum:
        raise ConfigError(
            f"{name} = {text}: the environment must have an integer ≥ {minimum} there; {_START}"
        )
    return int(text[:10])


def check_devices(here: Launched, environment: Mapping[str, str], num_gpus: int) -> None:
    """Check that this rank has a device.

    :param num_gpus: that torch sees on this machine.
    :raises ConfigError: DS_ACCELERATOR names another kind than this project supports, or one that
        is not there; or there are fewer GPUs than ranks.
    """
    kind = environment.get("DS_ACCELERATOR")
    if kind is not None and kind not in _ACCELERATORS:
        raise ConfigError(
            f"DS_ACCELERATOR = {kind}: only {' and '.join(_ACCELERATORS)} are supported; unset it, "
            "or use one of them"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES = {visible})"
    if kind == "cuda" and num_gpus == 0:
        raise ConfigError(
            f"DS_ACCELERATOR = cuda: torch finds no GPU here{seen}; look at nvidia-smi and whether "
            "torch was built for CUDA, or set DS_ACCELERATOR=cpu"
        )
    if kind != "cpu" and 0 < num_gpus <= here.local_rank:
        raise ConfigError(
            f"LOCAL_RANK = {here.local_rank}: this machine has {num_gpus} GPUs{seen}, one for each "
            f"rank; start at most {num_gpus} ranks on it (--num_accelerators {num_gpus}), or set "
            "DS_ACCELERATOR=cpu"
        )
