"""Make a HuggingFace checkpoint from a training checkpoint, in one process on the CPU.

python launch/export.py runs/demo --output model --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdp_llm.cli import Parser, run_command
from sdp_llm.errors import ConfigError


def export(arguments: argparse.Namespace) -> None:
    """Parse, write, print."""
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint}: no such folder; name a checkpoint")

    from sdp_llm.training.environment import prepare

    prepare()
    import torch

    from sdp_llm.checkpoint.convert import export_checkpoint
    from sdp_llm.checkpoint.find import find_checkpoint
    from sdp_llm.subnetwork.measure import load_model_config

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    found = find_checkpoint(checkpoint)
    output = Path(arguments.output)
    export_checkpoint(
        found,
        output,
        dtype=dtypes[arguments.dtype],
        config=load_model_config(arguments.model_config) if arguments.model_config else None,
        tokenizer=Path(arguments.tokenizer) if arguments.tokenizer else None,
    )
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"exported {found} to {output} ({size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, or a run folder or folder of checkpoints, whose latest one is taken",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder to create")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the weights (default: as they were trained)"
    )
    parser.add_argument(
        "--model_config", metavar="PATH", help="config of the model (default: the saved one)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer to copy into the export")
    sys.exit(run_command("export", export, parser.parse_args()))
