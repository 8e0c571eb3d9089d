"""Say what a checkpoint holds, and whether it is what was saved.

python launch/inspect_checkpoint.py runs/demo

The status is 0 when it is, 1 when it is not, 2 when there is no checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdp_llm.cli import Parser, run_command
from sdp_llm.errors import ConfigError


def inspect(arguments: argparse.Namespace) -> int:
    """Parse, read, print."""
    from sdp_llm.checkpoint.find import find_checkpoint
    from sdp_llm.checkpoint.inspection import inspect_checkpoint
    from sdp_llm.checkpoint.save import MANIFEST, STATE
    from sdp_llm.training.status import describe_status, read_status

    folder = Path(arguments.checkpoint)
    path = find_checkpoint(folder)
    if not any((path / name).exists() for name in (MANIFEST, STATE)):
        raise ConfigError(
            f"{path}: no checkpoint there; name a run that has saved one, or a step's folder"
        )
    found = inspect_checkpoint(path)
    run = describe_status(read_status(folder))
    if run:
        print(f"{'run':<12}  {run}")
    print(found.report)
    for problem in found.problems:
        print(f"inspect_checkpoint: error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, or a run folder or folder of checkpoints, whose latest one is read",
    )
    sys.exit(run_command("inspect_checkpoint", inspect, parser.parse_args()))
