"""Where a HuggingFace decoder keeps its blocks, and which of its parameters form a unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.tokenizer import said_by_transformers


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model: its global name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class UnitLayout:
    """The parameters that one owner set keeps in sync together (DESIGN: unit).

    ``block`` is the global block index, or None for the shared parameters outside the blocks.
    """

    name: str
    block: int | None
    parameters: tuple[ParameterSpec, ...]

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class ModelLayout:
    """Every parameter of the whole model, grouped into units in forward order.

    It is the same on every rank, whatever that rank owns. ``aliases`` maps the further names of a
    tied parameter to the one name it has in ``units``.
    """

    blocks_path: str
    num_blocks: int
    units: tuple[UnitLayout, ...]
    aliases: dict[str, str]

    @property
    def parameters(self) -> Iterator[ParameterSpec]:
        return (parameter for unit in self.units for parameter in unit.parameters)

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)


def empty_model(
    config: PretrainedConfig,
    attn_implementation: str | None = "sdpa",
    make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config,
) -> PreTrainedModel:
    """The whole model with every parameter on the meta device and every buffer in place.

    Buffers (rotary frequencies) are small and computed by the constructor, so they are real.

    :param config: the model has a copy of it, which building and running it may change.
    :param attn_implementation: transformers' name of an attention; None lets it choose.
    :param make: from a config to a model, with transformers' own options.
    :raises ConfigError: when transformers has no causal language model for this config.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = make(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=attn_implementation,
            )
    except Exception as error:  # whatever wrong numbers lead to in a model's own code
        reason = said_by_transformers(error)
        raise ConfigError(
            f"model.config: transformers cannot build a causal language model of type "
            f"{config.model_type!r} with model.attn_implementation = {attn_implementation!r}: "
            f"{reason}; mend the config, or use another attention"
        ) from error
    # Parameters moved to meta one by one lose the tie that the constructor made.
    model.tie_weights()
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the transformer blocks.

    :raises ConfigError: unless exactly one ModuleList has ``config.num_hidden_layers`` entries.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if depth < 1:
        raise ConfigError(f"model.config: num_hidden_layers = {depth}: must be at least 1")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise ConfigError(
            f"model.config: {type(model).__name__} has {len(lists)} module lists with "
            f"num_hidden_layers={depth} entries ({found}); SDP needs exactly one, the blocks: "
            "use a decoder-only model with one list of blocks"
        )
    return lists[0]


def _storage_key(parameter: nn.Parameter) -> tuple[int, int, tuple[int, ...]]:
    # Tied parameters may be one object or two views of one storage; both count as one.
    storage = parameter.untyped_storage()._cdata
    return storage, int(parameter.storage_offset()), tuple(parameter.shape)


def _distinct_parameters(model: nn.Module) -> tuple[list[ParameterSpec], dict[str, str]]:
    first_names: dict[tuple[int, int, tuple[int, ...]], str] = {}
    specs: list[ParameterSpec] = []
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(_storage_key(parameter), name)
        if first == name:
            specs.append(ParameterSpec(name, tuple(parameter.shape)))
        else:
            aliases[name] = first
    return specs, aliases


def _split(unit: UnitLayout, max_numel: int) -> Iterable[UnitLayout]:
    """Cut a unit at parameter boundaries; a single larger parameter stays whole."""
    parts: list[list[ParameterSpec]] = [[]]
    for parameter in unit.parameters:
        size = sum(p.numel for p in parts[-1])
        if parts[-1] and size + parameter.numel > max_numel:
            parts.append([])
        parts[-1].append(parameter)
    if len(parts) == 1:
        return [unit]
    return [
        UnitLayout(f"{unit.name}[{i}]", unit.block, tuple(part)) for i, part in enumerate(parts)
    ]


def model_layout(model: PreTrainedModel, max_unit_numel: int | None = None) -> ModelLayout:
    """Group the parameters of the whole ``model`` into units, in forward order.

    The units are the embedding (what the model registers before its blocks), each block, and the
    head with the final norm (what it registers after them). When a parameter of the one is tied
    to a parameter of the other, both are one unit in the embedding's place, because its gradient
    is complete only at the end of the backward pass.

    :param max_unit_numel: units with more elements are split (``reduce_bucket_size``).
    """
    blocks_path, blocks = find_blocks(model)
    prefix = blocks_path + "."
    specs, aliases = _distinct_parameters(model)
    names = [spec.name for spec in specs]
    in_blocks = [i for i, name in enumerate(names) if name.startswith(prefix)]
    for alias, name in aliases.items():
        if alias.startswith(prefix) or name.startswith(prefix):
            raise ConfigError(
                f"model.config: {alias} shares its storage with {name}; SDP cannot give a "
                "parameter that blocks share to one owner set: untie it"
            )
    if not in_blocks:
        raise ConfigError(f"model.config: the blocks at {blocks_path} have no parameters")
    before = [s for s in specs[: in_blocks[0]] if not s.name.startswith(prefix)]
    after = [s for s in specs[in_blocks[0] :] if not s.name.startswith(prefix)]
    by_block: list[list[ParameterSpec]] = [[] for _ in range(len(blocks))]
    for i in in_blocks:
        by_block[int(names[i][len(prefix) :].split(".", 1)[0])].append(specs[i])

    if aliases:
        before, after = before + after, []
    units = [UnitLayout("embedding", None, tuple(before))]
    units += [UnitLayout(f"block {b}", b, tuple(params)) for b, params in enumerate(by_block)]
    units += [UnitLayout("head", None, tuple(after))]
    pieces = [
        piece
        for unit in units
        if unit.parameters
        for piece in (_split(unit, max_unit_numel) if max_unit_numel else [unit])
    ]
    return ModelLayout(blocks_path, len(blocks), tuple(pieces), aliases)


def unsplit(layout: ModelLayout) -> list[tuple[UnitLayout, ...]]:
    """The units in forward order, with the pieces of a split unit together.

    A module may have parameters in several pieces but is initialised once, with all of them.
    """
    groups: dict[str, list[UnitLayout]] = {}
    for unit in layout.units:
        groups.setdefault(unit.name.partition("[")[0], []).append(unit)
    return [tuple(group) for group in groups.values()]
