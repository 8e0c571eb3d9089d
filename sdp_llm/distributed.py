"""The start of torch.distributed."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed


def init_distributed(timeout: timedelta) -> None:
    """Start torch.distributed under any launcher, or for one process without one."""
    # DeepSpeed would compile a shared-memory all-reduce, which only its inference on CPUs uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed would look for MPI otherwise.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", "0")
    deepspeed.init_distributed(timeout=timeout, verbose=False)
