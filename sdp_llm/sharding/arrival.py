"""The forward pass waits for weights where it needs them, not where they are sent.

After an optimizer step the weights of every unit travel. Waiting for all of them would leave the
device idle: the first block can run while those of later blocks are still arriving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.adapter import find_blocks


def wait_before_use(model: PreTrainedModel, units: Sequence[Unit]) -> list[RemovableHandle]:
    """Hook ``model`` so that a unit has arrived before anything computes with it.

    A block waits for its own unit. The shared parameters outside the blocks may be used by other
    modules than those they are registered in, so the whole model waits for what comes before its
    blocks, and the last block for what comes after them.

    :returns: the hooks, to be removed when other units take the place of these.
    """
    _, blocks = find_blocks(model)
    hooks = []
    for unit in units:
        waiting = _Waiting(unit)
        names = {spec.name.rpartition(".")[0] for spec in unit.layout.parameters}
        holders = [model.get_submodule(name) for name in sorted(names)]
        for holder in holders:
            hooks.append(holder.register_state_dict_pre_hook(waiting))
        if unit.layout.block is not None:
            users = [blocks[unit.layout.block]]
        else:
            is_head = unit.layout.name.startswith("head")
            users = [*holders, blocks[-1] if is_head else model]
        for user in users:
            # Before hooks of others, which may read weights.
            hooks.append(user.register_forward_pre_hook(waiting, prepend=True))
    return hooks


class _Waiting:
    """The same for every kind of hook."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    def __call__(self, *arguments: Any) -> None:
        self._unit.wait()
