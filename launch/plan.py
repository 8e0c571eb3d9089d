"""Print who owns what under a run config and what it costs, without starting any process.

python launch/plan.py --deepspeed_config configs/demo.json --world_size 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdp_llm.config import RunConfig, load_config, require_sections, resolve_batch
from sdp_llm.errors import ConfigError
from sdp_llm.plan import plan_from_config
from sdp_llm.plan.report import plan_report
from sdp_llm.plan.size import setup_from_config


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        config = load_config(args.deepspeed_config, args.set)
        print(report(config, args.world_size, args.backend))
    except ConfigError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(config: RunConfig, world_size: int, backend: str | None) -> str:
    """The card of a run.

    :param backend: "gloo" or "nccl"; None: what this machine would use.
    :raises ConfigError: for a config that cannot run on ``world_size`` ranks.
    """
    require_sections(config, "model")
    assert config.model is not None
    if world_size < 1:
        raise ConfigError(f"--world_size = {world_size}: must be at least 1; start at least a rank")
    batch = resolve_batch(config, world_size)
    # These take seconds to import; a wrong config has failed by now.
    import torch

    from sdp_llm.subnetwork.measure import load_model_config, model_size

    hf_config = load_model_config(config.model.config)
    text = hf_config.get_text_config()
    plan = plan_from_config(config.sdp, world_size, text.num_hidden_layers)
    zero = config.zero_optimization
    size = model_size(
        hf_config,
        batch.micro_batch,
        config.data.sequence_length if config.data else text.max_position_embeddings,
        gradient_checkpointing=config.model.gradient_checkpointing,
        attn_implementation=config.model.attn_implementation,
        dtype=torch.bfloat16 if config.bf16.enabled else torch.float32,
        max_unit_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        document_mask=config.data is not None and config.data.document_mask,
    )
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    setup = setup_from_config(config, batch.accumulation, backend)
    return plan_report(plan, size, setup, model=Path(config.model.config).stem)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plan", description=__doc__)
    parser.add_argument("--deepspeed_config", required=True, help="the run's JSON file")
    parser.add_argument("--world_size", required=True, type=int, help="number of ranks")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of the file, such as sdp.coverage=3/4; may be repeated",
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="whose buffers to predict (default: nccl where there is a GPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
