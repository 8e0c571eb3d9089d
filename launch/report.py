"""Write a page about one or several runs: losses, speed, memory, plans. One file, to be kept.

python launch/report.py runs/demo
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sdp_llm.cli import Parser, run_command
from sdp_llm.errors import ConfigError
from sdp_llm.report.page import page
from sdp_llm.report.png import write_pngs
from sdp_llm.report.record import read_runs


def report(arguments: argparse.Namespace) -> None:
    """Parse, read, write."""
    folders = [Path(run) for run in arguments.runs]
    records = read_runs(folders)
    output = Path(arguments.output) if arguments.output else folders[0] / "report.html"
    try:
        output.write_text(page(records, time.strftime("%Y-%m-%d %H:%M")), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot write: {error.strerror}") from None
    print(f"wrote {output}")
    if arguments.png is not None:
        for path in write_pngs(records, Path(arguments.png)):
            print(f"wrote {path}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a training.run_dir")
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: report.html in the first run's folder)"
    )
    parser.add_argument("--png", metavar="DIR", help="also write each chart as a PNG there")
    sys.exit(run_command("report", report, parser.parse_args()))
