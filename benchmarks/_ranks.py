"""Gloo ranks for one measurement: processes of their own, which end with it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# Forked from one process that has imported them: the imports take longer than most cases.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "deepspeed", "sdp_llm.initialization"])

TIMEOUT_S = 600


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    prepare: Callable[[int], None] | None = None,
    timeout_s: int = TIMEOUT_S,
) -> list[Any]:
    """What ``function(*arguments)`` returned on each of ``world_size`` new gloo ranks.

    :param prepare: called on each rank with its number before it starts threads or sockets.
    :param timeout_s: how long a collective may take, and all ranks together without an answer.
    :raises RuntimeError: with the traceback of the first rank that failed; the others are ended.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[int, Any] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            waiting: dict[Connection, int] = {}
            group = (world_size, f"{folder}/store", timeout_s)
            for rank in range(world_size):
                here, there = _CONTEXT.Pipe(duplex=False)
                details = (rank, group, there, prepare, function, arguments)
                process = _CONTEXT.Process(target=_serve, args=details, daemon=True)
                process.start()
                there.close()
                processes.append(process)
                waiting[here] = rank
            while waiting:
                for connection in _ready(list(waiting), timeout_s):
                    rank = waiting.pop(connection)
                    results[rank] = _received(connection, rank)
            for process in processes:
                process.join(timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]


def _ready(connections: list[Connection], timeout_s: int) -> list[Connection]:
    ready = [c for c in wait(connections, timeout_s) if isinstance(c, Connection)]
    if not ready:
        raise RuntimeError(f"{len(connections)} ranks do not answer for {timeout_s} s")
    return ready


def _received(connection: Connection, rank: int) -> Any:
    try:
        result, failure = connection.recv()
    except EOFError:
        failure = "the process ended without an answer; was it killed for its memory?"
    if failure is not None:
        raise RuntimeError(f"rank {rank}: {failure}")
    return result


def _serve(
    rank: int,
    group: tuple[int, str, int],
    connection: Connection,
    prepare: Callable[[int], None] | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    world_size, store, timeout_s = group
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # gloo, also where there are GPUs
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # FSDP2 and DeepSpeed call torch's collectives by names that it has given up.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        if prepare is not None:
            prepare(rank)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        connection.send((function(*arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        connection.send((None, traceback.format_exc()))
