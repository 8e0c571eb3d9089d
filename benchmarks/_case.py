"""One configuration of a run that a benchmark measures, and a step of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from sdp_llm.config import RunConfig, parse_config
from sdp_llm.engine import SDPEngine
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import Plan, plan_from_config
from sdp_llm.plan.size import CostSetup, ModelSize, setup_from_config
from sdp_llm.subnetwork.measure import model_size

LEARNING_RATE = 1e-4
MAX_NORM = 1.0


@dataclass(frozen=True)
class Case:
    """How a model is trained, one sample per rank and micro-batch.

    ``coverage`` is a fraction such as "1/2"; ``sequence_length`` counts tokens.
    """

    world_size: int
    coverage: str
    stage: int
    masking: str
    is_bf16: bool = False
    accumulation: int = 1
    sequence_length: int = 32
    under_way: int = 1

    @property
    def dtype(self) -> str:
        return "bf16" if self.is_bf16 else "fp32"

    def __str__(self) -> str:
        accumulation = f", {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        under_way = f", {self.under_way} under way" if self.under_way > 1 else ""
        return f"stage {self.stage}, {self.masking}, {self.dtype}{accumulation}{under_way}"

    def run_config(self) -> RunConfig:
        """The run config of this case; everything that is not named has its default."""
        return parse_config(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": self.accumulation,
                "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
                "gradient_clipping": MAX_NORM,
                "bf16": {"enabled": self.is_bf16},
                "zero_optimization": {"stage": self.stage},
                "sdp": {
                    "masking": self.masking,
                    "coverage": self.coverage,
                    "reductions_under_way": self.under_way,
                },
            }
        )

    def closed_form(self, model: PretrainedConfig) -> tuple[ModelSize, Plan, CostSetup]:
        """What the functions of :mod:`sdp_llm.plan.cost` take, on gloo."""
        run = self.run_config()
        zero = run.zero_optimization
        size = model_size(
            model,
            micro_batch=1,
            sequence_length=self.sequence_length,
            dtype=torch.bfloat16 if self.is_bf16 else torch.float32,
            max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        )
        depth = model.get_text_config().num_hidden_layers
        plan = plan_from_config(run.sdp, self.world_size, depth)
        return size, plan, setup_from_config(run, self.accumulation, "gloo")


def tokens_of_step(case: Case, vocabulary: int, step: int) -> Tensor:
    """This rank's random token ids of a step, ``[accumulation, sequence + 1]``, int64."""
    generator = torch.Generator().manual_seed(step * case.world_size + dist.get_rank())
    shape = (case.accumulation, case.sequence_length + 1)
    return torch.randint(0, vocabulary, shape, generator=generator)


def train_step(engine: SDPEngine, tokens: Tensor) -> None:
    """One optimizer step, one sample per micro-batch."""
    targets = target_count(tokens)
    for sample in tokens.split(1):
        loss = summed_loss(engine, sample) / targets
        engine.backward(loss, scale_wrt_gas=False)
        del loss
        engine.step()
