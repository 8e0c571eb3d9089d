"""What every benchmark does around its work."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._record import commit
from sdp_llm.errors import ConfigError


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line and run; wrong input is one line.

    :param arguments: instead of the process's.
    :returns: the exit status.
    """
    # Otherwise the process would end without removing the namespaces that it made.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    commit()  # before anything is written
    try:
        run(parser.parse_args(arguments))
    except ConfigError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, no output written", file=sys.stderr)
        return 130
    return 0


def _stop(*_: Any) -> None:
    sys.exit(143)
