"""What the benchmarks compare: data parallelism of several kinds, and what each should cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from benchmarks._case import Case
from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError
from sdp_llm.plan.cost import Cost, sdp_cost
from sdp_llm.plan.peers import peer_cost
from sdp_llm.subnetwork.measure import model_size

SDP = "SDP"
CHECKPOINTING = "DDP, checkpointing"
UNSHARDED = "FSDP2, no resharding"

_NAMES = {
    "ddp": "DDP",
    "ddp_checkpointing": CHECKPOINTING,
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
    "fsdp2_unsharded": UNSHARDED,
}
PEERS = tuple(_NAMES)


@dataclass(frozen=True)
class System:
    """One way to train; all but ``kind`` is of SDP only.

    ``under_way`` is ``sdp.reductions_under_way``.
    """

    kind: str
    coverage: str = "1"
    masking: str = "forward"
    stage: int = 2
    under_way: int = 1

    def __str__(self) -> str:
        if self.kind != SDP:
            return self.kind
        # At C = 1 there is nothing to mask.
        masking = "" if self.coverage == "1" else f", {self.masking}"
        under_way = f", {self.under_way} under way" if self.under_way > 1 else ""
        return f"SDP, C = {self.coverage}{masking}, stage {self.stage}{under_way}"


@dataclass(frozen=True)
class Workload:
    """What every system of a run gets: one sample per rank and micro-batch, AdamW, clipping at 1.

    With ``is_bf16`` weights and what travels are bf16, and the masters fp32.
    ``sequence_length`` counts tokens.
    """

    world_size: int
    sequence_length: int
    is_bf16: bool = False
    accumulation: int = 1

    @property
    def dtype(self) -> str:
        return "bf16" if self.is_bf16 else "fp32"

    def case(self, system: System) -> Case:
        """The same for SDP, with its own settings."""
        return Case(
            self.world_size,
            system.coverage,
            system.stage,
            system.masking,
            self.is_bf16,
            self.accumulation,
            self.sequence_length,
            system.under_way,
        )


def parse_system(text: str) -> System:
    """From the command line: a peer, or ``sdp:COVERAGE[:MASKING[:STAGE[:REDUCTIONS_UNDER_WAY]]]``.

    :raises ConfigError: when it is neither.
    """
    if text in _NAMES:
        return System(_NAMES[text])
    kind, *rest = text.split(":")
    if kind == "sdp" and 1 <= len(rest) <= 4:
        coverage, masking, *numbers = [*rest, *("forward", "2", "1")[len(rest) - 1 :]]
        stage, under_way = (int(number) if number.isdigit() else -1 for number in numbers)
        sdp = {"coverage": coverage, "masking": masking, "reductions_under_way": under_way}
        run = parse_config({"sdp": sdp, "zero_optimization": {"stage": stage}})
        return System(SDP, coverage, run.sdp.masking, run.zero_optimization.stage, under_way)
    raise ConfigError(
        f"system {text!r}: unknown; give {', '.join(PEERS)}, or sdp:COVERAGE:MASKING:STAGE such as "
        "sdp:1/2:forward:2"
    )


def closed_form(system: System, workload: Workload, model: PretrainedConfig) -> Cost:
    """What the system should cost; see :mod:`sdp_llm.plan.cost` and :mod:`sdp_llm.plan.peers`."""
    size, plan, setup = workload.case(system).closed_form(model)
    if system.kind == SDP:
        return sdp_cost(size, plan, setup)
    if system.kind == CHECKPOINTING:
        size = model_size(
            model,
            micro_batch=1,
            sequence_length=workload.sequence_length,
            gradient_checkpointing=True,
        )
        return peer_cost(
            size, workload.world_size, replace(setup, gradient_checkpointing=True), "DDP"
        )
    return peer_cost(size, workload.world_size, setup, system.kind)
