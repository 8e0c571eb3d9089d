"""What every table in ``docs/results`` carries: hardware, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sdp_llm", "torch", "deepspeed", "transformers")
GIB = 2**30


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Where, from what and how the numbers of this process were made."""
    cores = len(os.sched_getaffinity(0))
    memory = round(psutil.virtual_memory().total / GIB)
    return {
        "hardware": f"{cores}-core {platform.machine()} CPU, {memory} GiB",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


@cache
def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` for changed files; None outside git.

    What benchmarks write into ``docs`` is no change of the source.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    head = _git("rev-parse", "HEAD")
    if changed is None or head is None:
        return None
    return head + "-dirty" * bool(changed)


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up; all but the first are aligned to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([cells[0].ljust(widths[0]), *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def write_results(
    output: Path, title: str, text: str, result: dict[str, Any], packages: Sequence[str] = PACKAGES
) -> None:
    """Write ``output`` (JSON) and the same name with ``.md``, each with its provenance.

    :param packages: whose versions matter.
    """
    source = provenance(packages)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(source | result, indent=2) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
    footer = "\n".join(
        (
            f"- hardware: {source['hardware']}",
            f"- versions: {versions}",
            f"- commit: {source['commit']}",
            f"- command: `{source['command']}`",
        )
    )
    page = f"# {title}\n\n{text}\n\n{footer}\n"
    output.with_suffix(".md").write_text(page, encoding="utf-8")
