"""What a process needs before it computes: threads, log levels, no network."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from sdp_llm.activity import ACTIVITY, END
from sdp_llm.launched import Launched, check_devices, count_in


def device_type() -> str:
    """``cuda`` or ``cpu``: what DeepSpeed uses, which DS_ACCELERATOR=cpu keeps off the GPU."""
    is_off = os.environ.get("DS_ACCELERATOR") == "cpu"
    return "cuda" if torch.cuda.is_available() and not is_off else "cpu"


def prepare(here: Launched | None = None) -> None:
    """Set up this process; before transformers and DeepSpeed are imported.

    :param here: the rank that this process is going to be; None: none, nothing was launched.
    :raises ConfigError: when it has no device, or the environment has no number where one must be.
    """
    check_devices(here or Launched(), os.environ, torch.cuda.device_count())
    # Training reads local files only.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Launchers start one process per rank with a thread per core each, or with one thread.
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        name = next((n for n in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if os.environ.get(n)), None)
        ranks_here = count_in(os.environ, name, 1) if name else 1
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    # DeepSpeed sets its level when it is imported; a filter outlives that.
    logging.getLogger("DeepSpeed").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    """DeepSpeed's errors, and the timings that ``wall_clock_breakdown`` asks for."""
    return record.levelno >= logging.ERROR or "time (ms)" in record.getMessage()


def shut_down() -> None:
    """End torch.distributed, so that no rank leaves while another still needs it."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            ACTIVITY.enter(END)
            with ACTIVITY.waiting("end of all ranks"):
                dist.barrier()
        dist.destroy_process_group()
