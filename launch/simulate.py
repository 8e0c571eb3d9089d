"""Train with Subnetwork Data Parallelism on one device: all workers in turn in one process.

python launch/simulate.py --deepspeed_config configs/demo.json --world_size 4
"""

from __future__ import annotations

import argparse
import sys

from sdp_llm.cli import config_of, config_parser, run_command
from sdp_llm.errors import ConfigError
from sdp_llm.versions import check_versions, versions


def simulate(arguments: argparse.Namespace) -> None:
    """Parse, build, train."""
    run = config_of(arguments)
    if arguments.world_size < 1:
        raise ConfigError(f"--world_size {arguments.world_size}: must be at least 1; give more")
    check_versions(versions())

    # The imports take seconds; a wrong config has failed by now.
    from sdp_llm.training.environment import device_type, prepare

    prepare()

    from sdp_llm.training.inputs import load_inputs

    inputs = load_inputs(run, arguments.world_size)

    import torch

    from sdp_llm.training.backends import SimulationBackend
    from sdp_llm.training.prediction import predict
    from sdp_llm.training.run_folder import RunFolder
    from sdp_llm.training.summary import closing_lines, summary_card
    from sdp_llm.training.trainer import Trainer

    steps = inputs.schedule.total_steps
    folder = RunFolder(run, inputs.schedule, is_writer=True)
    prediction = predict(run, inputs)
    folder.begin(0, prediction)
    device = torch.device(device_type())
    backend = SimulationBackend(run, inputs, device)
    trainer = Trainer(run, inputs, backend, folder, steps, prediction=prediction)
    trainer.say(summary_card(run, inputs, steps, prediction, trainer.position))
    trainer.fit()
    trainer.say(closing_lines(trainer))


if __name__ == "__main__":
    parser = config_parser(__doc__ or "")
    parser.add_argument(
        "--world_size", type=int, required=True, metavar="N", help="workers to simulate"
    )
    sys.exit(run_command("simulate", simulate, parser.parse_args()))
