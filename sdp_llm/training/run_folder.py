"""The folder of one run: what it was started with, and what it measured."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdp_llm.checkpoint.together import agree
from sdp_llm.config import RunConfig, to_dict
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan

PACKAGES = ("sdp_llm", "torch", "deepspeed", "transformers", "datasets", "accelerate")


class RunFolder:
    """Creates the folder and writes into it, on rank 0 only.

    - ``config.json``: the resolved run config, which starts the same run again
    - ``plan.json``: the owner set of every block
    - ``environment.json``: versions, commit, command line, world size
    - ``metrics.jsonl``: one object per log line and validation

    Collective: all ranks raise when rank 0 cannot create it.

    :raises ConfigError: when it holds a run already, or cannot be written.
    """

    def __init__(self, run: RunConfig, plan: Plan, is_writer: bool) -> None:
        assert run.training.run_dir is not None
        self.path = Path(run.training.run_dir)
        self._is_writer = is_writer
        self._metrics = self.path / "metrics.jsonl"

        def create() -> None:
            if not is_writer:
                return
            try:
                self._create(run, plan)
            except OSError as error:
                raise ConfigError(
                    f"{self._key}: cannot write: {error}; name a folder that can be created"
                ) from error

        agree(create)

    @property
    def _key(self) -> str:
        return f"training.run_dir = {json.dumps(str(self.path))}"

    def _create(self, run: RunConfig, plan: Plan) -> None:
        if self._metrics.exists():
            raise ConfigError(
                f"{self._key}: holds a run already; choose another folder, or remove it"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write("config.json", to_dict(run))
        self._write("plan.json", {"world_size": plan.world_size, "owners": plan.owner_sets})
        self._write("environment.json", _environment(plan.world_size))
        self._metrics.touch()

    def log(self, values: dict[str, Any]) -> None:
        """Append one object to the metrics, with the time (seconds since 1970)."""
        if self._is_writer:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")

    def _write(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=2) + "\n"
        (self.path / name).write_text(text, encoding="utf-8")


def _environment(world_size: int) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` for changed files; None outside git."""
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
