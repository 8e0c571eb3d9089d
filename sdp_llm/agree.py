"""What all ranks do or know alike, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from sdp_llm.activity import ACTIVITY
from sdp_llm.errors import ConfigError


def agree(step: Callable[[], Any]) -> list[Any]:
    """Run ``step`` on every rank; every rank raises when it failed on one, none waits for it.

    :returns: what it returned on each rank.
    :raises ConfigError: on every rank, when on one of them ``step`` raised it, or an OSError; a
        :class:`DamagedCheckpoint` where that was the first rank's reason.
    """
    result: Any = None
    failure: ConfigError | None = None
    try:
        result = step()
    except ConfigError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = ConfigError(
            f"cannot read or write: {error}; name files that all ranks reach, and folders with "
            "enough space"
        )
    if not dist.is_initialized():
        outcomes: list[Any] = [(result, failure)]
    else:
        outcomes = [None] * dist.get_world_size()
        with ACTIVITY.waiting("agreement"):
            dist.all_gather_object(outcomes, (result, failure))
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            raise type(reason)(f"rank {rank}: {reason}")
    return [value for value, _ in outcomes]


def check_agreement(what: str, fingerprint: Callable[[], str]) -> None:
    """Compare a fingerprint between all ranks.

    :raises ConfigError: on every rank, naming the ranks that differ from rank 0, or as
        :func:`agree` does.
    """
    found = agree(fingerprint)
    different = [rank for rank, value in enumerate(found) if value != found[0]]
    if different:
        raise ConfigError(
            f"{what} on ranks {different} differs from rank 0's ({found[different[0]]} against "
            f"{found[0]}): start every rank with the same files and arguments"
        )
