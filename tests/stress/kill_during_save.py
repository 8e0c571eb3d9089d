"""Kill ranks with SIGKILL at random moments, mostly of saves, and look at what is left.

python -m tests.stress.kill_during_save --kills 120

Each round starts the ranks of one run folder anew, as a launcher would, lets them train with a
checkpoint after every step, and kills one rank or all: after a random time, or before the k-th file
operation of a save. Then every checkpoint under its final name must be whole, `latest` must name
one, none that was reported as saved may be lost, and the next round must continue from the newest.
In the end the bytes of every checkpoint seen are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Forked from one process that has imported them: the imports take longer than a round.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "deepspeed", "sdp_llm.training.session", "sdp_llm.checkpoint.load"]
)
# Audit events of Python by which a save changes files.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
ROUND_LIMIT_S = 120.0


def rank_main(
    rank: int,
    world_size: int,
    scratch: str,
    config: str,
    run_dir: str,
    steps: int,
    is_async: bool,
    fatal_event: int | None,
) -> None:
    """Train as ``launch/pretrain.py`` does; die before file operation number ``fatal_event``."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
    }
    output = os.open(f"{scratch}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch
    import torch.distributed as dist

    from sdp_llm.config import load_config
    from sdp_llm.training.backends import EngineBackend
    from sdp_llm.training.inputs import load_inputs
    from sdp_llm.training.run_folder import RunFolder
    from sdp_llm.training.session import train

    is_saving = False
    events = 0

    class Reporting(EngineBackend):
        """Appends the digests of what it saved, after the save, to the report of the run."""

        def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
            nonlocal is_saving
            is_saving = True
            super().save(folder, tag, state)
            self.report(folder / tag)

        def begin_save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
            nonlocal is_saving
            is_saving = True
            super().begin_save(folder, tag, state)
            self.begun = folder / tag

        def finish_save(self) -> float:
            seconds = super().finish_save()
            self.report(self.begun)
            return seconds

        def report(self, checkpoint: Path) -> None:
            nonlocal is_saving
            is_saving = False
            if self.rank == 0:
                step = int(checkpoint.name.removeprefix("step-"))
                line = json.dumps({"step": step, **digests(checkpoint)})
                with Path(f"{run_dir}.saved").open("a") as report:
                    report.write(line + "\n")

    def count(event: str, arguments: Any) -> None:
        nonlocal events
        if is_saving and event in FILE_EVENTS:
            events += 1
            if events == fatal_event:
                os.kill(os.getpid(), signal.SIGKILL)

    if fatal_event is not None:
        sys.addaudithook(count)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world_size
    )
    overrides = [f"training.run_dir={run_dir}", f"training.steps={steps}", "scheduler=null"]
    overrides += ["training.save_interval=1", "training.export=false", "data.validation=null"]
    overrides += [f"training.async_save={str(is_async).lower()}"]
    run = load_config(config, overrides)
    inputs = load_inputs(run, world_size)
    folder = RunFolder(run, inputs.schedule, rank == 0, "auto")
    train(run, inputs, Reporting(run, inputs), folder, "auto")


def digests(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each rank's tensors."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}


class Campaign:
    """Rounds on one run folder."""

    def __init__(
        self, folder: Path, config: Path, world_size: int, is_async: bool, seed: int
    ) -> None:
        self.folder = folder
        self.config = config
        self.world_size = world_size
        self.is_async = is_async
        self.run_dir = folder / f"run-{world_size}"
        self.random = random.Random(f"{seed} {world_size}")
        self.tally: collections.Counter[str] = collections.Counter()
        self.expected_start = 0

    def start(self, run_dir: Path, steps: int, fatal: tuple[int, int] | None) -> list[Any]:
        """Start the ranks; ``fatal`` is a rank and the file operation before which it dies."""
        self.scratch = Path(tempfile.mkdtemp(dir=self.folder))
        processes = []
        for rank in range(self.world_size):
            event = fatal[1] if fatal is not None and fatal[0] == rank else None
            details = (str(self.scratch), str(self.config), str(run_dir), steps)
            arguments = (rank, self.world_size, *details, self.is_async, event)
            process = _CONTEXT.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            processes.append(process)
        return processes

    def saved(self) -> list[dict[str, Any]]:
        """What was reported as saved; a line that the kill cut off is not."""
        path = Path(f"{self.run_dir}.saved")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def round(self) -> None:
        """Start, kill, look."""
        before = len(self.saved())
        is_by_event = self.random.random() < 0.6
        victim = self.random.randrange(self.world_size)
        fatal = (victim, self.random.randint(1, 60)) if is_by_event else None
        processes = self.start(self.run_dir, 10**6, fatal)
        end = time.monotonic() + ROUND_LIMIT_S
        while all(process.is_alive() for process in processes):
            assert time.monotonic() < end, self.output()
            if not is_by_event and len(self.saved()) > before:
                time.sleep(self.random.uniform(0, 0.4))
                processes[victim].kill()
                processes[victim].join()
            time.sleep(0.002)
        how = "all ranks" if self.random.random() < 0.5 else "one rank"
        if how == "one rank":
            time.sleep(self.random.uniform(0, 0.3))  # the others notice
        for process in processes:
            process.kill()
            process.join()
        died = processes[victim].exitcode
        assert died == -signal.SIGKILL, f"rank {victim} ended by itself ({died})\n{self.output()}"
        self.tally[f"{how}, {'at a file operation' if is_by_event else 'at a random time'}"] += 1
        self.look()

    def look(self) -> None:
        """Check what the kill left, and that this round had continued from the newest."""
        from sdp_llm.checkpoint.load import CheckpointReader
        from sdp_llm.training.checkpoints import steps_in

        text = self.output()
        if self.expected_start:
            wanted = f"step-{self.expected_start}: step {self.expected_start} of"
            assert f"continuing from {self.run_dir}/checkpoints/{wanted}" in text, text
            assert "skipped" not in text, text
        checkpoints = self.run_dir / "checkpoints"
        names = {path.name for path in checkpoints.glob(".*")} if checkpoints.exists() else set()
        self.tally["of these left a half-written checkpoint"] += bool(names)
        there = steps_in(checkpoints)
        for step in there:
            with ExitStack() as stack:
                CheckpointReader(checkpoints / f"step-{step}", stack).verify()
        if (checkpoints / "latest").exists():
            assert int((checkpoints / "latest").read_text().removeprefix("step-")) in there
        newest = max(there, default=0)
        known = max((entry["step"] for entry in self.saved()), default=0)
        assert newest >= known, f"step {known} was saved, step {newest} is the newest"
        self.expected_start = newest
        shutil.rmtree(self.scratch)

    def output(self) -> str:
        """What the ranks of the last round printed."""
        return "".join(path.read_text() for path in sorted(self.scratch.glob("output-*")))

    def compare(self) -> int:
        """Compare all that was saved with a run that is not killed.

        :returns: how many checkpoints were compared.
        """
        reports = self.saved()
        straight = self.folder / f"straight-{self.world_size}"
        steps = max(entry["step"] for entry in reports)
        processes = self.start(straight, steps, None)
        for process in processes:
            process.join()
            assert process.exitcode == 0, self.output()
        lines = Path(f"{straight}.saved").read_text().splitlines()
        expected = {entry["step"]: entry for entry in map(json.loads, lines)}
        for entry in reports:
            assert entry == expected[entry["step"]], f"step {entry['step']} differs"
        return len(reports)


def main() -> None:
    """Parse, run, print the tally."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120, help="rounds in all")
    parser.add_argument("--world_size", type=int, nargs="+", default=[2, 4], help="ranks")
    parser.add_argument("--async_save", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from tests.integration.conftest import make_tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(Path(folder))
        for world_size in arguments.world_size:
            campaign = Campaign(
                Path(folder), tiny.config, world_size, arguments.async_save, arguments.seed
            )
            for i in range(arguments.kills // len(arguments.world_size)):
                started = time.perf_counter()
                campaign.round()
                took = time.perf_counter() - started
                newest = campaign.expected_start
                print(f"{world_size} ranks, kill {i + 1}: {took:.1f} s, whole up to step {newest}")
            compared = campaign.compare()
            print(f"\n{world_size} ranks: {compared} checkpoints equal an uninterrupted run's, ")
            for what, count in sorted(campaign.tally.items(), reverse=True):
                print(f"{count:5} kills: {what}")


if __name__ == "__main__":
    main()
