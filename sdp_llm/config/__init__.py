"""The run config: one JSON file, DeepSpeed's keys plus `sdp`, `model`, `data` and `training`.

Imports neither torch nor deepspeed nor transformers, so that a wrong file fails at once.
"""

from sdp_llm.config.batch import BatchSizes, resolve_batch
from sdp_llm.config.describe import describe_keys, markdown_table
from sdp_llm.config.emit import (
    check_warmup,
    deepspeed_dict,
    keys_without_effect,
    optimizer_dict,
    require_pretraining,
    require_sections,
    scheduler_dict,
    to_dict,
)
from sdp_llm.config.parse import load_config, parse_config
from sdp_llm.config.schema import (
    BF16Config,
    DataConfig,
    FileMonitorConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
    TrainingConfig,
    WandbConfig,
    ZeroConfig,
)
from sdp_llm.config.sdp_section import PhaseConfig, SDPConfig

__all__ = [
    "BF16Config",
    "BatchSizes",
    "DataConfig",
    "FileMonitorConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RunConfig",
    "SDPConfig",
    "SchedulerConfig",
    "TrainingConfig",
    "WandbConfig",
    "ZeroConfig",
    "check_warmup",
    "deepspeed_dict",
    "describe_keys",
    "keys_without_effect",
    "load_config",
    "markdown_table",
    "optimizer_dict",
    "parse_config",
    "require_pretraining",
    "require_sections",
    "resolve_batch",
    "scheduler_dict",
    "to_dict",
]
