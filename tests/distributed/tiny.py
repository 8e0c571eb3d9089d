"""Tiny models and batches, and what ranks run on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from sdp_llm.engine import SDPEngine
from sdp_llm.initialization import initialize
from sdp_llm.loss import NextTokenLoss, summed_loss, target_count
from sdp_llm.sharding.unit import Unit

VOCABULARY = 96
SEQUENCE = 12
SAMPLES_PER_RANK = 3


@dataclass(frozen=True)
class Case:
    """One configuration of a run."""

    world_size: int = 4
    masking: str = "forward"
    stage: int = 2
    owners_per_block: int = 2
    accumulation: int = 1
    is_tied: bool = False
    is_bf16: bool = False
    overlap: bool = True
    under_way: int = 1
    bucket: int = 500_000_000
    communication: str | None = None
    optimizer: str = "AdamW"
    clip: float = 0.5
    eos_id: int | None = None
    loss_chunk: int | None = None
    residual_scale: str = "none"
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        default = Case()
        names = [n for n in self.__dict__ if getattr(self, n) != getattr(default, n)]
        return ",".join(f"{n}={getattr(self, n)}" for n in names) or "default"

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def loss(self) -> NextTokenLoss:
        return NextTokenLoss(self.eos_id, self.loss_chunk)

    @property
    def optimizer_params(self) -> dict[str, Any]:
        params: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
        if self.optimizer in ("Adam", "AdamW"):
            params["eps"] = 1e-6
        return params

    @property
    def deepspeed_params(self) -> dict[str, Any]:
        # DeepSpeed's "Adam" decays like AdamW unless told otherwise.
        return self.optimizer_params | ({"adam_w_mode": False} if self.optimizer == "Adam" else {})


def llama(is_tied: bool = False, layers: int = 6) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
    )


def run_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": SAMPLES_PER_RANK * case.world_size,
        "gradient_accumulation_steps": case.accumulation,
        "optimizer": {"type": case.optimizer, "params": case.deepspeed_params},
        "gradient_clipping": case.clip,
        "bf16": {"enabled": case.is_bf16},
        "zero_optimization": {
            "stage": case.stage,
            "overlap_comm": case.overlap,
            "reduce_bucket_size": case.bucket,
        },
        "sdp": {
            "masking": case.masking,
            "owners_per_block": case.owners_per_block,
            "reductions_under_way": case.under_way,
            "residual_scale": case.residual_scale,
        },
        "training": {"seed": 7},
    }
    if case.communication:
        config["communication_data_type"] = case.communication
    return config | dict(case.extra)


def batch(step: int, world_size: int, eos_id: int | None = None) -> torch.Tensor:
    """The global batch of a step, ``[samples, SEQUENCE + 1]``; a fifth of it ``eos_id``."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (SAMPLES_PER_RANK * world_size, SEQUENCE + 1)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    return tokens if eos_id is None else tokens.where(tokens % 5 != 0, eos_id)


def build(case: Case, total_steps: int | None = None) -> SDPEngine:
    """An engine of the tiny Llama; ``total_steps`` is the budget of its schedule."""
    return initialize(llama(case.is_tied), run_config(case), total_num_steps=total_steps)[0]


def hf_loss(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The loss that the model itself computes, in nats per token."""
    return engine(input_ids=tokens, labels=tokens).loss


def my_slice(step: int, eos_id: int | None = None) -> torch.Tensor:
    """This rank's part of the global batch of a step."""
    return batch(step, dist.get_world_size(), eos_id).chunk(dist.get_world_size())[dist.get_rank()]


def forward_backward(engine: SDPEngine, step: int, loss: NextTokenLoss = summed_loss) -> float:
    """The passes of one step on this rank's slice, up to where ``engine.step()`` is due."""
    mine = my_slice(step, loss.eos_id)
    parts = mine.chunk(engine.gradient_accumulation_steps())
    total = 0.0
    for i, part in enumerate(parts):
        mean = loss(engine, part) / target_count(mine)
        engine.backward(mean, scale_wrt_gas=False)
        total += mean.item()
        if i + 1 < len(parts):
            engine.step()
    return total


def weights(engine: SDPEngine) -> dict[str, np.ndarray]:
    """What this rank stores, by global name, as fp32."""
    return {
        name: view.detach().float().numpy().copy()
        for unit in engine.sharded.units
        for name, view in unit.views().items()
    }


def masters(units: tuple[Unit, ...]) -> list[tuple[str, int, int, np.ndarray]]:
    """Name, range and values of every slice this rank optimises."""
    return [
        (s.name, s.start, s.stop, s.tensor.detach().numpy().copy()) for u in units for s in u.slices
    ]


def gradients(units: tuple[Unit, ...]) -> list[tuple[str, int, int, np.ndarray]]:
    """Name, range and reduced gradient of every slice this rank optimises."""
    found = []
    for unit in units:
        for piece in unit.slices:
            assert piece.tensor.grad is not None
            found.append((piece.name, piece.start, piece.stop, piece.tensor.grad.numpy().copy()))
    return found


def train(case: Case, steps: int) -> list[dict[str, Any]]:
    """Run on a rank: train a tiny Llama; what each step started from and what it computed."""
    engine = build(case, steps)
    trace = []
    for step in range(steps):
        entry: dict[str, Any] = {"weights": weights(engine)}
        entry["masters"] = masters(engine.sharded.owned)
        entry["loss"] = forward_backward(engine, step, case.loss)
        entry["gradients"] = gradients(engine.sharded.owned)
        engine.step()
        entry["norm"] = engine.get_global_grad_norm()
        trace.append(entry)
    trace.append({"weights": weights(engine), "masters": masters(engine.sharded.owned)})
    return trace
