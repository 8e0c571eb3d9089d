"""What is known of a run before its first step: parameters, memory, traffic and FLOPs by rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from sdp_llm.config import RunConfig
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Phase, Schedule
from sdp_llm.plan.change_cost import changes_per_step
from sdp_llm.plan.cost import (
    MemoryCost,
    rank_flops_per_token,
    rank_memory,
    rank_traffic,
    trained_numel,
)
from sdp_llm.plan.size import CostSetup, ModelSize
from sdp_llm.training.budget import run_size
from sdp_llm.training.environment import device_type
from sdp_llm.training.inputs import Inputs


@dataclass(frozen=True)
class Prediction:
    """The closed forms of :mod:`sdp_llm.plan.cost` for a run's model, settings and phases."""

    size: ModelSize
    setup: CostSetup
    schedule: Schedule

    def memory(self, rank: int, step: int) -> MemoryCost:
        """The bytes of a rank in step ``step``, counted from 0."""
        plan, masking = self.schedule.at(step)
        return rank_memory(self.size, plan, replace(self.setup, masking=masking), rank)

    def flops_per_token(self, phase: Phase) -> float:
        """Operations in the mean over the ranks, forward and backward."""
        return sum(self._flops_per_token(phase)) / self.schedule.world_size

    def as_dict(self) -> dict[str, Any]:
        """What the run folder keeps as ``prediction.json``: lists by rank, in each phase."""
        return {
            "device": device_type(),
            "parameters": self.size.numel,
            "zero_stage": self.setup.stage,
            "phases": [self._phase(phase) for phase in self.schedule.phases],
        }

    def _phase(self, phase: Phase) -> dict[str, Any]:
        ranks, plan = range(self.schedule.world_size), phase.plan
        setup = replace(self.setup, masking=phase.masking)
        return {
            "trained_parameters": [trained_numel(self.size, plan, rank) for rank in ranks],
            "memory_bytes": [asdict(self.memory(rank, phase.start)) for rank in ranks],
            "bytes_sent_per_step": [
                round(rank_traffic(self.size, plan, setup, rank)) for rank in ranks
            ],
            "bytes_sent_by_changes_per_step": [
                round(sent)
                for sent in changes_per_step(self.size, self.schedule, phase, self.setup)
            ],
            "flops_per_token": self._flops_per_token(phase),
        }

    def _flops_per_token(self, phase: Phase) -> list[float]:
        setup = replace(self.setup, masking=phase.masking)
        ranks = range(self.schedule.world_size)
        return [rank_flops_per_token(self.size, phase.plan, setup, rank) for rank in ranks]


def predict(run: RunConfig, inputs: Inputs) -> Prediction | ConfigError:
    """The prediction, or why there is none: the cost of some models is not known (experts)."""
    try:
        size, setup = run_size(run, inputs.model, inputs.batch)
    except ConfigError as error:
        return error
    return Prediction(size, setup, inputs.schedule)
