"""Initial values that depend neither on the number of ranks nor on the plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.adapter import ParameterSpec


def module_seed(seed: int, module_name: str) -> int:
    """A 63-bit seed from the run's seed and a global module name, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def bind(model: nn.Module, values: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Make each tensor of ``values`` the storage of the parameter it is named after.

    The parameter is a new object that keeps ``requires_grad``; the further names of a tied
    parameter get the same object.
    """
    names = {name: name for name in values}
    names |= {alias: name for alias, name in aliases.items() if name in values}
    bound: dict[str, nn.Parameter] = {}
    for target, name in names.items():
        if name not in bound:
            trainable = model.get_parameter(name).requires_grad
            bound[name] = nn.Parameter(values[name], requires_grad=trainable)
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = bound[name]


def _modules_within(model: nn.Module, names: Collection[str]) -> list[str]:
    """The modules all of whose parameters are among ``names``, children before parents.

    That is the order of HuggingFace's own initialisation, where a parent may draw again what a
    child has drawn (GPT-2 scales its residual projections from the attention module).
    """
    within = []
    for module_name, module in model.named_modules():
        prefix = module_name + "." if module_name else ""
        inside = [prefix + leaf for leaf, _ in module.named_parameters(remove_duplicate=False)]
        if inside and all(name in names for name in inside):
            within.append(module_name)
    return within[::-1]


@torch.no_grad()
def initialize_unit(
    model: PreTrainedModel,
    specs: Sequence[ParameterSpec],
    aliases: Mapping[str, str],
    seed: int,
) -> dict[str, Tensor]:
    """Draw the initial values of a whole unit by the model's own ``_init_weights``.

    Each module draws from a generator seeded by ``seed`` and its global name, on the CPU, so all
    owners of a block compute the same values without a broadcast, whatever the device.

    :param specs: all parameters of the unit; they are bound to the values.
    :returns: fp32 CPU tensors by global name.
    :raises ConfigError: the model gives a parameter its value where it is made, and not there.
    """
    values = {spec.name: torch.full(spec.shape, math.nan, dtype=torch.float32) for spec in specs}
    bind(model, values, aliases)
    names = set(values) | {alias for alias, name in aliases.items() if name in values}
    with torch.random.fork_rng(devices=[]):
        for module_name in _modules_within(model, names):
            # Not torch.manual_seed, which would seed the GPUs, too: theirs are the user's.
            torch.default_generator.manual_seed(module_seed(seed, module_name))
            model._init_weights(model.get_submodule(module_name))
    for name, value in values.items():
        # A mask would need another quarter of its memory.
        if value.numel() and value.max().isnan():
            raise ConfigError(
                f"model: {type(model).__name__} leaves {name} without an initial value in "
                "_init_weights; start from a checkpoint (model.init_from), or give initialize() a "
                "model instead of a config"
            )
    return values
