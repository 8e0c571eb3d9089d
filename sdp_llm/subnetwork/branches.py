"""Which modules of a block put something into the residual stream, found by running the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.adapter import find_blocks
from sdp_llm.subnetwork.cheap import cheap_model

_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_TOKENS = (2, 8)  # samples and tokens of each
_TOLERANCE = 1e-3  # of the largest element; what is not linear is off by about all of it


@dataclass(frozen=True)
class Branch:
    """The last module of a branch: multiplying its output multiplies what enters the stream.

    ``path`` is its name in the block. Multiplying every parameter ``w`` in ``parameters`` by
    ``s`` multiplies its output by ``s`` if ``offset`` is 0; if it is 1, the module computes with
    ``1 + w``, as Gemma's norms do, and that is what must be multiplied.
    """

    path: str
    parameters: tuple[str, ...]
    offset: int


class _Inexact(Exception):
    """Why a block cannot be scaled."""


def find_branches(config: PretrainedConfig) -> tuple[tuple[Branch, ...], ...]:
    """The ends of the branches of each block, by global block index.

    The first block of every kind is run on cheap weights, and its modules are tried from the last
    to the first: an end is a module whose output enters the block's output linearly (twice the
    output, twice the difference). It is set to zero, and what had no effect but through it falls
    silent with it. When the block returns its input, all that it adds has been found. That is
    attention and MLP: their last matrices, or the norms behind these.

    :raises ConfigError: when something else enters the stream, so that no factor is exact.
    """
    where = f"sdp.residual_scale: blocks of model type {config.model_type!r}"
    fix = 'use "none", or another family of models'
    model, kinds = cheap_model(config, "eager")
    try:
        with torch.no_grad():
            found = {b: _Probe(block, *call).branches() for b, block, call in _calls(model, kinds)}
    except _Inexact as error:
        raise ConfigError(f"{where} cannot be scaled exactly: {error}; {fix}") from error
    except Exception as error:  # whatever a model's own code raises for a block run by itself
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where} cannot be run by themselves: {reason}; {fix}") from error
    first_of = {b: kind[0] for kind in kinds for b in kind}
    return tuple(found[first_of[b]] for b in range(len(first_of)))


def _calls(model: PreTrainedModel, kinds: list[list[int]]) -> list[tuple[int, nn.Module, _Call]]:
    """The first block of each kind, by its index, and what the model calls it with."""
    _, blocks = find_blocks(model)
    found: list[tuple[int, nn.Module, _Call]] = []

    def catch(b: int) -> Any:
        return lambda block, args, kwargs: found.append((b, block, (args, kwargs)))

    hooks = [
        blocks[kind[0]].register_forward_pre_hook(catch(kind[0]), with_kwargs=True)
        for kind in kinds
    ]
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.arange(_TOKENS[0] * _TOKENS[1]).view(_TOKENS) % vocab_size
    model.base_model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


class _Probe:
    """A block that is run on one input with the outputs of some of its modules multiplied."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._block = block
        self._args, self._kwargs = args, kwargs
        self._scales: Mapping[nn.Module, float] = {}
        # What each module without children was called with, and what it gave, in that order.
        self._calls: dict[nn.Module, tuple[_Call, Any]] = {}
        self._names = {
            module: name
            for name, module in block.named_modules()
            if not list(module.children()) and list(module.parameters())
        }

    def branches(self) -> tuple[Branch, ...]:
        """See :func:`find_branches`.

        :raises _Inexact: when the block cannot be scaled.
        """
        hooks = [m.register_forward_hook(self._leave, with_kwargs=True) for m in self._names]
        ends = self._ends()
        for hook in hooks:
            hook.remove()
        return tuple(self._branch(module) for module in reversed(ends))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._calls[module] = (args, kwargs), output
        if module not in self._scales:
            return output
        if not isinstance(output, Tensor):
            raise _Inexact(f"{self._names[module]} returns more than a tensor")
        return output * self._scales[module]

    def _ends(self) -> list[nn.Module]:
        stream = self._args[0] if self._args else self._kwargs["hidden_states"]
        ends: list[nn.Module] = []
        output = self._run({})
        for module in reversed(list(self._calls)):
            silent = dict.fromkeys(ends, 0.0)
            zero = self._run({**silent, module: 0.0})
            if torch.equal(zero, output):
                continue
            twice = self._run({**silent, module: 2.0})
            if not _is_close(twice - zero, 2 * (output - zero)):
                raise _Inexact(f"the output of {self._names[module]} does not enter it linearly")
            ends.append(module)
            output = zero
            if torch.equal(output, stream):
                return ends
        raise _Inexact("the residual stream does not pass by them unchanged")

    def _run(self, scales: Mapping[nn.Module, float]) -> Tensor:
        self._scales = scales
        output = self._block(*self._args, **self._kwargs)
        if not isinstance(output, Tensor):
            raise _Inexact("they return more than a tensor")
        return output

    def _branch(self, module: nn.Module) -> Branch:
        (args, kwargs), output = self._calls[module]
        parameters = dict(module.named_parameters())
        for offset in (0, 1):
            halved = {name: (w + offset) / 2 - offset for name, w in parameters.items()}
            half = torch.func.functional_call(module, halved, args, kwargs)
            if _is_close(half, output / 2):
                return Branch(self._names[module], tuple(parameters), offset)
        raise _Inexact(f"no factor in the parameters of {self._names[module]} scales its output")


def _is_close(found: Tensor, expected: Tensor) -> bool:
    distance = (found - expected).abs().max()
    return bool(distance <= _TOLERANCE * expected.abs().max())
