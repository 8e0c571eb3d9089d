"""What the commands in ``launch/`` share: their arguments, and how they fail."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from sdp_llm.config import RunConfig, load_config
from sdp_llm.errors import ConfigError, TrainingStopped


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that name and change the run config."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the run config")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the config, such as --set training.steps=100 sdp.coverage=1",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # Launchers add these by themselves.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The run config that the command line names."""
    return load_config(arguments.deepspeed_config, arguments.set)


def run_command(
    name: str, run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace
) -> int:
    """Run a command; wrong input becomes one line on stderr.

    :returns: the exit status: 0, 2 for wrong input, 3 when training stopped itself, 130 when it
        was interrupted.
    """
    try:
        run(arguments)
    except (ConfigError, TrainingStopped) as error:
        if arguments.debug:
            raise
        # Every rank prints: a launcher may end the others as soon as one has failed.
        rank = os.environ.get("RANK")
        where = f" [rank {rank}]" if rank is not None else ""
        print(f"{name}: error:{where} {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 3
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
