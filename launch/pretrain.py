"""Pretrain a language model with Subnetwork Data Parallelism.

deepspeed --num_accelerators 4 launch/pretrain.py --deepspeed_config configs/demo.json
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta

from sdp_llm.cli import config_of, config_parser, run_command, until_checked


def pretrain(arguments: argparse.Namespace) -> None:
    """Parse, build, train."""
    with until_checked():
        run = config_of(arguments)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))

        # The imports take seconds; a wrong config has failed by now.
        from sdp_llm.training.environment import prepare, shut_down

        prepare()

        from sdp_llm.training.inputs import load_inputs

        inputs = load_inputs(run, world_size, int(os.environ.get("RANK", "0")))

        from sdp_llm.engine import init_distributed
        from sdp_llm.training.backends import EngineBackend
        from sdp_llm.training.budget import total_steps
        from sdp_llm.training.run_folder import RunFolder
        from sdp_llm.training.summary import closing_lines, summary_card
        from sdp_llm.training.trainer import Trainer

        steps = total_steps(run, inputs)
    init_distributed(timedelta(minutes=run.training.timeout_minutes))
    folder = RunFolder(run, inputs.plan, is_writer=os.environ["RANK"] == "0")
    backend = EngineBackend(run, inputs, steps)
    trainer = Trainer(run, inputs, backend, folder, steps)
    if trainer.backend.rank == 0:
        print(summary_card(run, inputs, steps), flush=True)
    trainer.fit()
    trainer.say(closing_lines(trainer))
    shut_down()


if __name__ == "__main__":
    parser = config_parser(__doc__ or "")
    sys.exit(run_command("pretrain", pretrain, parser.parse_args()))
