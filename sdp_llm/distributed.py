"""The start of torch.distributed."""

from __future__ import annotations

from datetime import timedelta

import deepspeed
import torch.distributed as dist

from sdp_llm.rendezvous import be_alone_by_default, meet


def init_distributed(timeout: timedelta) -> None:
    """Start torch.distributed under any launcher, or for one process without one.

    :raises ConfigError: the ranks cannot meet.
    """
    # DeepSpeed would compile a shared-memory all-reduce, which only its inference on CPUs uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    be_alone_by_default()
    # Kept until the process group has its own: rank 0's keeps the server alive.
    store = None if dist.is_initialized() else meet(timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    del store
