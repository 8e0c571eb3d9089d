"""The sizes of a model that decide what training it costs, without weights and without memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sdp_llm.config import ModelConfig
from sdp_llm.errors import ConfigError
from sdp_llm.files import from_here
from sdp_llm.loss import NextTokenLoss, summed_loss
from sdp_llm.plan.size import FP32_BYTES, BlockSize, ModelSize, UnitSize
from sdp_llm.subnetwork.adapter import ModelLayout, empty_model, find_blocks, model_layout
from sdp_llm.subnetwork.init import bind
from sdp_llm.subnetwork.masking import freeze_blocks, skip_blocks
from sdp_llm.subnetwork.stored import existing_folder, local_folder
from sdp_llm.tokenizer import said_by_transformers


@dataclass(frozen=True)
class SavedBytes:
    """What autograd saves in one forward pass, in bytes; each storage counts where it came first.

    ``shared`` is everything outside the blocks, ``head`` the part of it after the last block.
    """

    shared: int
    head: int
    blocks: dict[int, int]


def load_model_config(path: str | Path, key: str = "model.config") -> PretrainedConfig:
    """Read ``model.config``: a HuggingFace config.json, a folder or a cached model that has one.

    :param key: what names ``path``, for the message.
    :raises ConfigError: when there is no such file, transformers cannot read it, or it names an
        attention whose code would be fetched. The hub is never asked.
    """
    fix = "give a HuggingFace config such as configs/model/llama_10m.json"
    file = Path(path)
    if not file.exists():
        file = local_folder(str(path)) or file
    if not (file.is_file() or (file / "config.json").is_file()):
        raise ConfigError(
            f"{key} = {str(path)!r}: no such file, nor a folder with a config.json"
            f"{from_here(path)}; {fix}"
        )
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, TypeError and more
        raise ConfigError(
            f"{key} = {str(path)!r}: transformers cannot read it as a model config: "
            f"{said_by_transformers(error)}; {fix}"
        ) from error
    attention = config._attn_implementation
    if attention is not None and "/" in attention:
        raise ConfigError(
            f"{key} = {str(path)!r}: its attn_implementation = {attention!r} names code on the "
            "hub, which is never run; remove it from the config"
        )
    return config


def run_model_config(model: ModelConfig) -> PretrainedConfig:
    """The HuggingFace config that a run config names.

    :raises ConfigError: as :func:`load_model_config`; where it is that of ``model.init_from``, when
        that is not there.
    """
    if model.config == model.init_from:
        existing_folder(model.init_from)
    return load_model_config(model.config)


def model_size(
    config: PretrainedConfig,
    micro_batch: int,
    sequence_length: int,
    *,
    gradient_checkpointing: bool = False,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    max_unit_numel: int | None = None,
    document_mask: bool = False,
    loss_chunk: int | None = None,
) -> ModelSize:
    """Count the parameters of the model and measure the activations of one micro-batch.

    The model's own code runs forward on tensors without data, so what is counted is what autograd
    saves, including the loss. The kernels are those of the CPU; fused attention saves the same
    tensors on GPUs, so kernels other than "eager" are measured as "sdpa".

    :param micro_batch: samples per forward pass.
    :param sequence_length: tokens per sample.
    :param dtype: of weights and activations.
    :param max_unit_numel: where units are split, the smaller of ``reduce_bucket_size`` and
        ``allgather_bucket_size``.
    :param document_mask: whether documents are kept apart, which takes a mask in memory.
    :param loss_chunk: how many tokens have logits at a time; None: all.
    :raises ConfigError: for a model whose cost depends on the data (mixture of experts), whose
        blocks cannot be skipped, or whose loss cannot be computed in pieces.
    """
    attention = "eager" if attn_implementation == "eager" else "sdpa"
    model = empty_model(config, attention)
    model.config.use_cache = False
    layout = model_layout(model, max_unit_numel)
    text = config.get_text_config()
    heads = text.num_attention_heads
    shared_matmul, block_matmul = _matmul_numel(model, layout)
    groups = kinds_of_blocks(model, layout)
    _bind_fakes(model, layout, dtype)
    tokens = torch.zeros(micro_batch, sequence_length + 1, dtype=torch.int64)
    # To the ids, which are all 0, every token is a document.
    loss = NextTokenLoss(0 if document_mask else None, loss_chunk)
    blocks, shared, recomputed = _activations(
        model, layout, groups, tokens, gradient_checkpointing, loss
    )
    return ModelSize(
        units=tuple(
            UnitSize(unit.block, unit.numel, max(p.numel for p in unit.parameters))
            for unit in layout.units
        ),
        blocks=tuple(
            BlockSize(matmul, *saved) for matmul, saved in zip(block_matmul, blocks, strict=True)
        ),
        shared_matmul_numel=shared_matmul,
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        shared_activations=shared,
        recomputed_activations=recomputed,
        loss_activations=_loss_activations(
            model, micro_batch * sequence_length, dtype.itemsize, loss_chunk
        ),
    )


def saved_bytes(
    model: PreTrainedModel, tokens: Tensor, loss: NextTokenLoss = summed_loss
) -> SavedBytes:
    """Run one forward pass of the loss and count what autograd saves besides the parameters.

    A storage counts once and whole; parameters and buffers do not count.

    :param tokens: ids ``[batch, sequence + 1]``, int64.
    :param loss: what the forward pass computes.
    """
    _, blocks = find_blocks(model)
    seen = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    counts: dict[int | str, int] = defaultdict(int)
    where: int | str = "embedding"
    kept: list[Tensor] = []  # so that no storage is freed and its address used again

    def enter(b: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal where
            where = b

        return hook

    def leave(*_: Any) -> None:
        nonlocal where
        where = "head"

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            kept.append(tensor)
            counts[where] += tensor.untyped_storage().nbytes()
        return tensor

    hooks = [block.register_forward_pre_hook(enter(b)) for b, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    by_block = {b: counts[b] for b in range(len(blocks))}
    return SavedBytes(counts["embedding"] + counts["head"], counts["head"], by_block)


def _loss_activations(
    model: PreTrainedModel, tokens: int, weight_bytes: int, chunk: int | None
) -> int:
    """Bytes beside those that autograd saves, when the loss needs most.

    At once, two fp32 gradients of the size of the logits: of the log-probabilities, which are
    saved, and of the logits. In pieces, either the logits of one in fp32 and in the type of the
    weights, or its contribution to the gradient of the head, which is summed in fp32 and saved in
    the type of the weights.
    """
    ids, width = model.get_output_embeddings().weight.shape
    if chunk is None:
        return 2 * FP32_BYTES * tokens * ids
    logits, head = min(chunk, tokens) * ids, ids * width
    copy = 0 if weight_bytes == FP32_BYTES else weight_bytes
    making = (FP32_BYTES + copy) * logits + (FP32_BYTES - weight_bytes) * head
    adding = weight_bytes * logits + FP32_BYTES * head
    return max(making, adding)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _matmul_numel(model: PreTrainedModel, layout: ModelLayout) -> tuple[int, list[int]]:
    """Parameters of the matrices that multiply every token: outside the blocks, and per block."""
    shared, blocks = 0, [0] * layout.num_blocks
    prefix = layout.blocks_path + "."
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise ConfigError(
                    f"model.config: {path}.{name} has {parameter.ndim} dimensions; only the cost "
                    "of dense decoders can be predicted, not that of experts or convolutions"
                )
            if parameter.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            if path.startswith(prefix):
                blocks[int(path[len(prefix) :].split(".", 1)[0])] += parameter.numel()
            else:
                shared += parameter.numel()
    return shared, blocks


def kinds_of_blocks(model: PreTrainedModel, layout: ModelLayout) -> list[list[int]]:
    """The blocks, grouped by kind: the same shapes, and the same entry of ``layer_types``."""
    shapes: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for unit in layout.units:
        if unit.block is not None:
            shapes[unit.block] += [parameter.shape for parameter in unit.parameters]
    types = getattr(model.config.get_text_config(), "layer_types", None)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for b in range(layout.num_blocks):
        groups[tuple(shapes[b]), types[b] if types else None].append(b)
    return list(groups.values())


def _bind_fakes(model: PreTrainedModel, layout: ModelLayout, dtype: torch.dtype) -> None:
    """Give the parameters a dtype and a device but no memory.

    What is computed from them is fake too; positions and masks, which are computed from nothing
    but shapes, stay real, so that the model's code sees whether samples are packed.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {spec.name: torch.empty(spec.shape, dtype=dtype) for spec in layout.parameters}
        bind(model, fakes, layout.aliases)


def _activations(
    model: PreTrainedModel,
    layout: ModelLayout,
    groups: list[list[int]],
    tokens: Tensor,
    gradient_checkpointing: bool,
    loss: NextTokenLoss,
) -> tuple[list[tuple[int, int]], int, int]:
    """Bytes per block, trained and frozen; of what is shared; and what is recomputed on top.

    Only two blocks of each kind run: the first saves what all blocks share too (rotary factors,
    masks), so the second tells what one block more costs.
    """
    _, blocks = find_blocks(model)
    skip_blocks(blocks, {b for group in groups for b in group[:2]})
    model.train()
    try:
        whole = saved_bytes(model, tokens, loss)
    except ConfigError:
        raise
    except Exception as error:  # whatever a skipped block leads to in a model's own code
        raise ConfigError(
            f"model.config: {type(model).__name__} does not run where blocks are skipped: "
            f"{said_by_transformers(error)}; use a decoder whose blocks return one tensor, the "
            "hidden states, as Llama's do"
        ) from error
    stored = whole
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        stored = saved_bytes(model, tokens, loss)
    freeze_blocks(blocks, ())
    frozen = saved_bytes(model, tokens, loss)

    sizes = [(0, 0)] * layout.num_blocks
    shared, recomputed = stored.shared, 0
    for group in groups:
        first, typical = group[0], group[:2][-1]
        shared += stored.blocks[first] - stored.blocks[typical]
        for b in group:
            sizes[b] = (stored.blocks[typical], frozen.blocks[typical])
        # A checkpointed block is recomputed when what the head saved is free again.
        again = whole.blocks[typical] - stored.blocks[typical] - stored.head
        recomputed = max(recomputed, again)
    return sizes, shared, recomputed
