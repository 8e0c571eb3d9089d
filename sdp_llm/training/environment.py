"""What a process needs before it computes: threads, log levels, no network."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist


def prepare() -> None:
    """Set up this process; before DeepSpeed is imported."""
    # Training reads local files only.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Launchers start one process per rank with a thread per core each, or with one thread.
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def shut_down() -> None:
    """End torch.distributed, so that no rank leaves while another still needs it."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()
