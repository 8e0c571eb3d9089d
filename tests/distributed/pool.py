"""A pool of gloo ranks, started once per test session.

A test hands over a function of a module; every rank calls it with torch.distributed running and
sends back what it returned. Where a rank raises, the test raises its traceback.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Forked from one process that has imported them: the imports take longer than most tests.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "deepspeed", "sdp_llm.initialization"])

TIMEOUT_S = 120


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import logging
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    while True:
        message = connection.recv()
        if message is None:
            break
        function, arguments, options = message
        try:
            connection.send((function(*arguments, **options), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
        _destroy_owner_groups()
    dist.destroy_process_group()


def _destroy_owner_groups() -> None:
    """End the groups that an engine left: gloo's threads of a group half gone spin for ever."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    gc.collect()
    for group in list(_world.pg_map):
        # DeepSpeed keeps a group of all ranks for every engine to come.
        if group.size() < dist.get_world_size():
            dist.destroy_process_group(group)


class Pool:
    """``world_size`` ranks that wait for work."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size = world_size
        self._connections = []
        self._processes = []
        for rank in range(world_size):
            here, there = _CONTEXT.Pipe()
            arguments = (rank, world_size, str(folder / f"store{world_size}"), there)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What ``function(*arguments, **options)`` returned on each rank."""
        for connection in self._connections:
            connection.send((function, arguments, options))
        outcomes = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT_S + 30):
                raise TimeoutError(f"rank {rank} of {self.world_size} does not answer")
            outcomes.append(connection.recv())
        failures = [f"rank {r}:\n{text}" for r, (_, text) in enumerate(outcomes) if text]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for result, _ in outcomes]

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
