"""Pretrain a language model with Subnetwork Data Parallelism.

deepspeed --num_accelerators 4 launch/pretrain.py --deepspeed_config configs/demo.json
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

from sdp_llm.cli import config_of, config_parser, run_command, until_checked
from sdp_llm.launched import launched
from sdp_llm.training.signals import StopRequest
from sdp_llm.versions import check_versions, versions


def pretrain(arguments: argparse.Namespace) -> None:
    """Parse, build, train."""
    stop = StopRequest()
    with until_checked():
        here = launched(os.environ)
        run = config_of(arguments)
        check_versions(versions())

        # The imports take seconds; a wrong config has failed by now.
        from sdp_llm.training.environment import prepare, shut_down

        prepare(here)

        from sdp_llm.training.inputs import load_inputs

        inputs = load_inputs(run, here.world_size, here.rank)

        from sdp_llm.distributed import init_distributed
        from sdp_llm.rendezvous import meet
        from sdp_llm.training.backends import EngineBackend
        from sdp_llm.training.exhausted import out_of_memory_explained
        from sdp_llm.training.run_folder import RunFolder
        from sdp_llm.training.session import train
        from sdp_llm.training.start import agree_on_start, facts_of
        from sdp_llm.training.watchdog import FIRST_STEP_FACTOR, Watchdog

        facts = facts_of(run, inputs, arguments.resume, here.world_size)

    assert run.training.run_dir is not None
    patience = timedelta(seconds=run.training.step_timeout * FIRST_STEP_FACTOR)
    store = meet(patience)
    processes = agree_on_start(store, here.rank, here.world_size, facts, patience)
    run_dir = Path(run.training.run_dir)
    with Watchdog(run.training.step_timeout, here.rank, processes, run_dir) as watchdog:
        init_distributed(timedelta(minutes=run.training.timeout_minutes))
        stop.hear_sigterm()
        folder = RunFolder(run, inputs.schedule, here.rank == 0, resume=arguments.resume)
        # Building the model and reading a checkpoint may take too much as well.
        with out_of_memory_explained(run, inputs, here.rank):
            backend = EngineBackend(run, inputs, stop.is_set)
            train(run, inputs, backend, folder, arguments.resume, watchdog)
        stop.settle()
        shut_down()


if __name__ == "__main__":
    parser = config_parser(__doc__ or "")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="continue from the run folder's newest whole checkpoint where it has one, else from "
        "what its run was begun from (auto, the default), never (none), or from a checkpoint, or "
        "the newest in a folder (PATH)",
    )
    sys.exit(run_command("pretrain", pretrain, parser.parse_args()))
