"""The run config as frozen dataclasses: every key with its type, default, unit and meaning.

This and `sdp_section.py` declare all keys: parsing, writing and the table of keys read the metadata
of these fields.
"""

# `key` and `section` return dataclasses.field, which is what RUF009 cannot see.
# ruff: noqa: RUF009

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdp_llm.config import named
from sdp_llm.config.declare import key, section
from sdp_llm.config.kinds import (
    ANY_STRING,
    BOOLEAN,
    COMMUNICATION_DTYPE,
    CORPORA,
    COUNT,
    POSITIVE,
    STRING,
    Kind,
    integer,
    is_number,
    number,
    wrong,
)
from sdp_llm.config.sdp_section import SDPConfig
from sdp_llm.errors import ConfigError

BUDGETS = ("steps", "tokens", "flops_of_dense_steps")


_OPTIMIZER_TYPE = Kind("string", named.parse_optimizer_type)
_SCHEDULER_TYPE = Kind("string", named.parse_scheduler_type)
_MINUTES = integer(1, 525_600)  # a year
_WORKERS = integer(0, 256)


def _parse_stage(path: str, value: Any) -> int:
    if is_number(value) and value == 3:
        raise wrong(path, value, "valid in DeepSpeed but not supported together with SDP; use 2")
    if not is_number(value) or value not in (0, 1, 2):
        raise wrong(path, value, "expected 0, 1 or 2")
    return int(value)


def _parse_attention(path: str, value: Any) -> str:
    name: str = STRING.parse(path, value)
    if "/" in name:
        rule = 'names code on the hub, which is never fetched or run; use "sdpa" or another name'
        raise wrong(path, value, rule)
    return name


_ATTENTION = Kind("string", _parse_attention)


@dataclass(frozen=True)
class ModelConfig:
    """The model to pretrain. ``config`` is that of ``init_from`` where only the latter is given."""

    config: str = key(
        STRING,
        "path of a HuggingFace config.json, or of a folder that has one",
        "",
        shown="that of init_from",
    )
    init_from: str | None = key(
        STRING,
        "HuggingFace checkpoint to start from, instead of random weights: a folder, or a name in "
        "the hub's local cache",
        None,
    )
    gradient_checkpointing: bool = key(BOOLEAN, "recompute activations in the backward pass", False)
    attn_implementation: str = key(
        _ATTENTION,
        'attention kernel of transformers, such as "eager" or "flash_attention_2"',
        "sdpa",
    )

    def __post_init__(self) -> None:
        if self.config:
            return
        if self.init_from is None:
            raise ConfigError(
                "model.config: missing; name a HuggingFace config.json such as "
                "configs/model/llama_10m.json, or a checkpoint to start from as model.init_from"
            )
        object.__setattr__(self, "config", self.init_from)


@dataclass(frozen=True)
class DataConfig:
    """The tokenized corpora, and how samples are made of them."""

    train: str | Mapping[str, float] = key(
        CORPORA,
        "path of the training corpus without .bin and .idx; or several, with the weight of each",
    )
    sequence_length: int = key(POSITIVE, "tokens per sample")
    validation: str | None = key(STRING, "path of the validation corpus, likewise", None)
    tokenizer: str | None = key(STRING, "folder of the tokenizer, copied into the export", None)
    document_mask: bool = key(
        BOOLEAN,
        "attend within documents only, with positions from 0 in each; false: across them",
        False,
    )
    num_workers: int = key(
        _WORKERS, "processes per rank that read batches ahead; 0: the rank reads them itself", 0
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The budget, and what happens beside the optimizer steps.

    All optional here, because a user's own loop needs no budget; see `require_pretraining`.
    """

    run_dir: str | None = key(
        STRING, "folder for logs, checkpoints and the export, which a run needs", None
    )
    steps: int | None = key(
        POSITIVE, "budget in optimizer steps; a run needs one of the three budgets", None
    )
    tokens: int | None = key(POSITIVE, "budget in tokens", None)
    flops_of_dense_steps: int | None = key(
        POSITIVE, "budget as the FLOPs of that many steps at coverage 1", None
    )
    seed: int = key(COUNT, "seed of the initial weights and of the order of samples", 1234)
    eval_interval: int = key(COUNT, "steps between validations; 0: only at the end", 0)
    eval_samples: int = key(POSITIVE, "sequences per validation", 256)
    eval_micro_batch_size: int | None = key(
        POSITIVE,
        "sequences per rank and forward pass in validation",
        None,
        shown="train_micro_batch_size_per_gpu",
    )
    save_interval: int = key(
        COUNT, "steps between checkpoints; 0: only when the run is stopped", 1000
    )
    keep_last: int = key(POSITIVE, "newest checkpoints that are kept", 2)
    keep_every: int = key(
        COUNT, "also keep those of every so many steps, a multiple of save_interval; 0: none", 0
    )
    async_save: bool = key(
        BOOLEAN, "write checkpoints while training goes on, from a copy in host memory", False
    )
    export: bool = key(BOOLEAN, "write a HuggingFace checkpoint at the end", True)
    decay_all: bool = key(BOOLEAN, "weight decay also on norms and biases", False)
    gradient_interval: int = key(
        COUNT,
        "steps between measurements of each unit's gradient: its norm, and the cosine similarity "
        "of its owners'; such a step sends gradients twice; 0: none",
        0,
    )
    step_timeout: int = key(
        POSITIVE,
        "seconds without the end of a step until the run ends and names the rank that hangs; three "
        "times as many for the first step; each forward pass of a validation, and each tensor that "
        "is written or read, counts as a step",
        600,
    )
    timeout_minutes: int = key(_MINUTES, "minutes until a collective that hangs is an error", 30)
    max_skipped_steps: int = key(
        POSITIVE, "steps in a row with non-finite loss or gradients until training stops", 20
    )
    check_interval: int = key(
        COUNT, "steps between comparisons of the weights that ranks have in common; 0: none", 0
    )
    loss_chunk: int | None = key(
        POSITIVE,
        "tokens whose logits exist at a time, as they are often a rank's largest tensor; none: all "
        "of a micro-batch",
        None,
    )
    spike_factor: float | None = key(
        number(above=1),
        "report a rank's loss that is more than this times its median of 128 steps, and what it "
        "read",
        None,
    )

    def __post_init__(self) -> None:
        given = self.budgets()
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(f'training.{name}' for name in given)}: exactly one of "
                f"{', '.join(BUDGETS)} must be given; set the others to null"
            )
        if self.keep_every and (not self.save_interval or self.keep_every % self.save_interval):
            raise wrong(
                "training.keep_every",
                self.keep_every,
                f"expected a multiple of training.save_interval = {self.save_interval}, or 0",
            )

    def budgets(self) -> list[str]:
        """The names of the budget keys that are given."""
        return [name for name in BUDGETS if getattr(self, name) is not None]


@dataclass(frozen=True)
class OptimizerConfig:
    """DeepSpeed's optimizer section."""

    type: str = key(_OPTIMIZER_TYPE, f"one of {named.OPTIMIZER_NAMES}")
    params: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "params": named.parse_optimizer_params,
            "help": "parameters of the optimizer: lr, betas, eps, weight_decay, ...",
        },
    )


@dataclass(frozen=True)
class SchedulerConfig:
    """DeepSpeed's scheduler section."""

    type: str = key(
        _SCHEDULER_TYPE, f"one of {named.SCHEDULER_NAMES}, or a class of torch.optim.lr_scheduler"
    )
    params: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "params": named.parse_scheduler_params,
            "help": 'parameters of the scheduler; total_num_steps may be "auto"',
        },
    )


@dataclass(frozen=True)
class BF16Config:
    """DeepSpeed's bf16 section."""

    enabled: bool = key(BOOLEAN, "weights and activations in bf16, master weights in fp32", False)


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's zero_optimization section; stages apply inside owner sets."""

    stage: int = key(
        Kind("0, 1 or 2", _parse_stage),
        "what the owners of a block partition: 1 optimizer state, 2 also gradients",
        0,
    )
    overlap_comm: bool = key(
        BOOLEAN,
        "reduce gradients during the backward pass, gather weights during the next forward pass",
        True,
    )
    reduce_bucket_size: int = key(POSITIVE, "elements per reduction at most", 500_000_000)
    allgather_bucket_size: int = key(POSITIVE, "elements per gather at most", 500_000_000)
    contiguous_gradients: bool | None = key(BOOLEAN, "without effect", None, no_effect=True)
    allgather_partitions: bool | None = key(BOOLEAN, "without effect", None, no_effect=True)
    reduce_scatter: bool | None = key(BOOLEAN, "without effect", None, no_effect=True)
    round_robin_gradients: bool | None = key(BOOLEAN, "without effect", None, no_effect=True)


@dataclass(frozen=True)
class FileMonitorConfig:
    """DeepSpeed's tensorboard and csv_monitor sections."""

    enabled: bool = key(BOOLEAN, "write metrics there", False)
    output_path: str = key(ANY_STRING, "folder for the files", "")
    job_name: str = key(ANY_STRING, "subfolder", "DeepSpeedJobName")


@dataclass(frozen=True)
class WandbConfig:
    """DeepSpeed's wandb section."""

    enabled: bool = key(BOOLEAN, "write metrics there", False)
    group: str | None = key(STRING, "group of runs", None)
    team: str | None = key(STRING, "team", None)
    project: str = key(STRING, "project", "deepspeed")


@dataclass(frozen=True)
class RunConfig:
    """One run: DeepSpeed's keys at the top level, and the sections of this project.

    Batch sizes are None where the file says "auto" or nothing; see `resolve_batch`.
    """

    train_batch_size: int | None = key(
        POSITIVE, "samples per optimizer step", None, auto=True, shown="auto"
    )
    train_micro_batch_size_per_gpu: int | None = key(
        POSITIVE, "samples per rank and forward pass", None, auto=True, shown="auto"
    )
    gradient_accumulation_steps: int | None = key(
        POSITIVE, "micro-batches per optimizer step", None, auto=True, shown="auto"
    )
    optimizer: OptimizerConfig | None = section(OptimizerConfig, optional=True)
    scheduler: SchedulerConfig | None = section(SchedulerConfig, optional=True)
    bf16: BF16Config = section(BF16Config, optional=False)
    # The default is DeepSpeed's.
    gradient_clipping: float = key(number(0), "largest norm of the gradient; 0: no clipping", 1.0)
    zero_optimization: ZeroConfig = section(ZeroConfig, optional=False)
    communication_data_type: str | None = key(
        COMMUNICATION_DTYPE, "dtype in which gradients travel", None, shown="that of the weights"
    )
    steps_per_print: int = key(POSITIVE, "steps between log lines", 10)
    wall_clock_breakdown: bool = key(BOOLEAN, "time the phases of a step", False)
    tensorboard: FileMonitorConfig | None = section(FileMonitorConfig, optional=True)
    csv_monitor: FileMonitorConfig | None = section(FileMonitorConfig, optional=True)
    wandb: WandbConfig | None = section(WandbConfig, optional=True)
    sdp: SDPConfig = section(SDPConfig, optional=False)
    model: ModelConfig | None = section(ModelConfig, optional=True)
    data: DataConfig | None = section(DataConfig, optional=True)
    training: TrainingConfig = section(TrainingConfig, optional=False)
