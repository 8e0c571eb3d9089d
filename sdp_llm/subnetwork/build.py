"""What one rank's model is: its structure first, its values unit by unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakSet

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan
from sdp_llm.subnetwork.adapter import (
    ModelLayout,
    UnitLayout,
    empty_model,
    find_blocks,
    model_layout,
    unsplit,
)
from sdp_llm.subnetwork.init import bind, initialize_unit
from sdp_llm.subnetwork.masking import mask_blocks
from sdp_llm.subnetwork.pretrained import PretrainedWeights
from sdp_llm.subnetwork.residual import ResidualScale

# Models that were given to an engine, which has changed them.
_TAKEN: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class Subnetwork:
    """One rank's model before it has values.

    ``model`` holds what this rank runs, on the meta device. ``absent`` holds the blocks it skips,
    by global index, also on the meta device: structure only, for whole-model evaluation.
    ``given`` holds the values of a model that the caller had built, by global name, until
    :func:`initial_values` hands them over; ``pretrained`` knows where a checkpoint stores them.
    ``config`` is the model's config as the caller gave it, for the export. ``residual_scale``
    follows the plan in force, and reaches into ``model`` and ``absent``.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    layout: ModelLayout
    plan: Plan
    rank: int
    masking: str
    absent: dict[int, nn.Module]
    given: dict[str, Tensor] | None
    pretrained: PretrainedWeights | None
    residual_scale: ResidualScale

    def owners(self, unit: UnitLayout) -> tuple[int, ...]:
        """The ranks that train ``unit``, ascending."""
        return self.plan.owners(unit.block)

    def holds(self, unit: UnitLayout) -> bool:
        """Whether this rank stores the weights of ``unit``: it owns it, or runs it frozen."""
        return self.masking == "backward" or self.rank in self.owners(unit)


def build_subnetwork(
    source: PretrainedConfig | PreTrainedModel,
    plan: Plan,
    rank: int,
    *,
    masking: str = "forward",
    max_unit_numel: int | None = None,
    attn_implementation: str | None = "sdpa",
    gradient_checkpointing: bool = False,
    pretrained: PretrainedWeights | None = None,
    residual_scale: str = "none",
) -> Subnetwork:
    """The structure of ``rank``'s subnetwork of the model that ``source`` describes.

    :param source: a config, from which nothing but the structure is built, or a model whose
        values are kept in :attr:`Subnetwork.given` and whose modules are taken over.
    :param max_unit_numel: units with more elements are split (``reduce_bucket_size``).
    :param pretrained: where to read the initial values of a config's model.
    :param residual_scale: ``sdp.residual_scale``.
    :raises ConfigError: when the model has no single list of blocks, or a frozen parameter, or
        ``residual_scale`` is not exact for it.
    """
    given = None
    if isinstance(source, PreTrainedModel):
        if source in _TAKEN:
            raise ConfigError(
                "model: another engine has taken its values and blocks; make the model anew, or "
                "give a config"
            )
        model = source.train()  # transformers loads models for evaluation
        _check_trainable(model)
        layout = model_layout(model, max_unit_numel)
        given = {spec.name: model.get_parameter(spec.name).data for spec in layout.parameters}
        bind(model, {name: value.to("meta") for name, value in given.items()}, layout.aliases)
        _TAKEN.add(source)
    else:
        model = empty_model(source, attn_implementation)
        layout = model_layout(model, max_unit_numel)
    config = type(model.config).from_dict(model.config.to_dict())
    # The key-value cache of generation would be filled, and kept, in every training forward.
    model.config.use_cache = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    scale = ResidualScale(residual_scale, model, plan, masking)  # while all blocks are there
    owned = set(plan.owned_blocks(rank))
    _, blocks = find_blocks(model)
    absent = mask_blocks(blocks, owned, masking)
    return Subnetwork(model, config, layout, plan, rank, masking, absent, given, pretrained, scale)


def _check_trainable(model: PreTrainedModel) -> None:
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise ConfigError(
            f"model: {frozen[0]} is frozen ({len(frozen)} parameters are); SDP trains all of them "
            "and decays their weights: call model.requires_grad_(True) before"
        )


def initial_values(
    subnetwork: Subnetwork, seed: int
) -> Iterator[tuple[tuple[UnitLayout, ...], dict[str, Tensor]]]:
    """The fp32 CPU values of what this rank holds, one unit at a time in forward order.

    The caller must copy what it keeps and :func:`~sdp_llm.subnetwork.init.bind` it before it asks
    for the next: so no more than one unit exists twice.

    :returns: the pieces of a unit (one, unless it was split) and its values by global name.
    """
    model, aliases = subnetwork.model, subnetwork.layout.aliases
    is_given = subnetwork.given is not None or subnetwork.pretrained is not None
    folds = subnetwork.residual_scale.folds() if is_given else {}
    if subnetwork.given is not None:
        held = filter(subnetwork.holds, subnetwork.layout.units)
        names = {spec.name for unit in held for spec in unit.parameters}
        for name in subnetwork.given.keys() - names:
            del subnetwork.given[name]
    for pieces in unsplit(subnetwork.layout):
        if not subnetwork.holds(pieces[0]):
            continue
        specs = [spec for unit in pieces for spec in unit.parameters]
        if subnetwork.given is not None:
            values = {s.name: subnetwork.given.pop(s.name).float().cpu() for s in specs}
        elif subnetwork.pretrained is not None:
            values = {s.name: subnetwork.pretrained.read(s.name) for s in specs}
        else:
            values = initialize_unit(model, specs, aliases, seed)
        values |= {name: folds[name].undo(v) for name, v in values.items() if name in folds}
        yield pieces, values
        del values
