"""The start of torch.distributed."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from sdp_llm.activity import ACTIVITY
from sdp_llm.rendezvous import be_alone_by_default, meet


def init_distributed(timeout: timedelta) -> None:
    """Start torch.distributed under any launcher, or for one process without one.

    :raises ConfigError: the ranks cannot meet.
    """
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce, which only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    be_alone_by_default()
    # Before the first collective, which would take the first GPU on every rank.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    # Kept until the process group has its own: rank 0's keeps the server alive.
    store = None if dist.is_initialized() else meet(timeout)
    with ACTIVITY.waiting("process group of all ranks"):
        deepspeed.init_distributed(timeout=timeout, verbose=False)
    del store
    if groups._WORLD_GROUP is None:
        # DeepSpeed's engine would make a copy, which on NCCL has communication buffers of its own.
        groups._WORLD_GROUP = dist.group.WORLD
