"""What the commands in ``launch/`` share: their arguments, and how they fail."""

from __future__ import annotations

import argparse
import difflib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from sdp_llm.config import RunConfig, load_config
from sdp_llm.errors import ConfigError, RankLost, TrainingStopped

# Launchers look at their ranks about once per second and send SIGTERM to all as soon as one has
# failed. Ranks that start together differ by less than this in when they reach a line of code.
GRACE_S = 2.0

# What a process returns; what is not here has a traceback and returns 1.
STATUS: Mapping[type[Exception], int] = {ConfigError: 2, TrainingStopped: 3, RankLost: 4}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others, and end with status 2.

    An abbreviation is no argument: it could be a slip. All commands have ``--debug``, for
    :func:`run_command`.

    :param text: the command's docstring: what stands above the arguments, and below them.
    """

    def __init__(self, text: str | None) -> None:
        summary, _, rest = (text or "").partition("\n\n")
        super().__init__(
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        name = Path(self.prog).stem
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        known = [text for action in self._actions for text in action.option_strings]
        close = difflib.get_close_matches(unknown, known, n=1) if unknown else []
        hint = f"did you mean {close[0]}? " if close else ""
        if unknown and not close and os.path.exists(unknown):
            hint = "if that is of a pattern, give the pattern in quotes; "
        sys.exit(fail(name, f"{message}; {hint}--help lists the arguments", 2))


def fail(name: str, message: str, status: int) -> int:
    """Say why a command ends; a rank leaves the others time to say it too.

    :returns: ``status``.
    """
    say_error(name, message)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(GRACE_S)
    return status


def say_error(name: str, reason: object) -> None:
    """The line on stderr by which a command fails.

    Every rank prints: on a cluster each may have a log of its own, and the input may be wrong on
    one machine only.
    """
    rank = os.environ.get("RANK")
    where = f" [rank {rank}]" if rank is not None else ""
    line = " ".join(f"{name}: error:{where} {reason}".splitlines())
    # One write: print would write the end of the line by itself, between other ranks' lines.
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that name and change the run config."""
    parser = Parser(description)
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the run config")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the config, such as --set sdp.coverage=1 steps_per_print=1; null "
        "removes a key",
    )
    # Launchers add these by themselves.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The run config that the command line names."""
    return load_config(arguments.deepspeed_config, arguments.set)


def exported_model(folder: str) -> str:
    """The ``--model`` argument of a command.

    :raises ConfigError: when it is no folder with a model.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {folder}: has no config.json; name an exported model")
    if (path / "metrics.jsonl").is_file():
        raise ConfigError(
            f"--model {folder}: is the folder of a run; name the model in it, {path / 'model'}"
        )
    return folder


@contextmanager
def until_checked() -> Iterator[None]:
    """Within, this rank does not end by SIGTERM but goes on to what is wrong with its input.

    On a busy machine the ranks' imports differ by seconds: the launcher would end the slower ranks
    before they can say why. Where nothing is wrong the signal takes effect at the end, so nothing
    that waits for another rank belongs here.
    """
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield  # an error leaves the handler as it is: its line comes next, then the process ends
    signal.signal(signal.SIGTERM, before)
    if received:
        raise SystemExit(128 + signal.SIGTERM)


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are always reported
    return any(events & select.POLLERR for _, events in poll.poll(0))


def run_command(
    name: str, run: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace
) -> int:
    """Run a command; wrong input becomes one line on stderr.

    :returns: the exit status: what ``run`` returns or 0, 2 for wrong input, 3 when training stopped
        itself, 4 when another rank hangs or is lost, 130 when it was interrupted, 141 when nobody
        reads its output (as in ``| head``).
    """
    try:
        status = run(arguments) or 0
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        # What is still in the buffer would fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except tuple(STATUS) as error:
        if arguments.debug:
            raise
        status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
        return fail(name, str(error), status)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return status
