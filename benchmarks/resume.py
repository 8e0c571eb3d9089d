"""Draw the loss of a run that is stopped and resumed over that of one that is not.

python benchmarks/resume.py --deepspeed_config configs/demo.json --steps 80 --ranks 4 \
    --other_ranks 2 --output docs/results/resume.json

Three runs: one straight; one that gets SIGTERM half way and goes on, on as many ranks; and a copy
of its folder that goes on with another number of ranks, and so with another plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from benchmarks._command import run_command
from benchmarks._record import ROOT, write_results
from sdp_llm.errors import ConfigError
from sdp_llm.report.png import require_matplotlib

_POLL_S = 0.2


def start(arguments: argparse.Namespace, run_dir: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start the run of ``run_dir``, or go on with it."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", "--nproc_per_node", str(ranks), "launch/pretrain.py"]
    command += ["--deepspeed_config", arguments.deepspeed_config, "--set"]
    command += [f"training.run_dir={run_dir}", f"training.steps={arguments.steps}"]
    command += ["steps_per_print=1", "training.eval_interval=0", "training.export=false"]
    return subprocess.Popen(command, cwd=ROOT)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run that must end well."""
    if process.wait():
        raise RuntimeError(f"the run ended with status {process.returncode}")


def losses(run_dir: Path) -> dict[int, float]:
    """The training loss by step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


def stop_half_way(arguments: argparse.Namespace, run_dir: Path) -> int:
    """Run until half of the steps are logged, then send SIGTERM; returns the last step."""
    process = start(arguments, run_dir, arguments.ranks)
    while len(losses(run_dir)) < arguments.steps // 2:
        if process.poll() is not None:
            raise RuntimeError("the run ended before it was stopped")
        time.sleep(_POLL_S)
    process.send_signal(signal.SIGTERM)
    process.wait()
    status = json.loads((run_dir / "status.json").read_text())
    if status["state"] != "preempted":
        raise RuntimeError(f"stopped, the run says {status}")
    return int(status["step"])


def draw(curves: dict[str, dict[int, float]], stopped: int, path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = [("#bbbbbb", "-", 5.0), ("#1f5fa8", "-", 1.4), ("#c8501e", "--", 1.2)]
    for (label, curve), (color, line, width) in zip(curves.items(), styles, strict=True):
        axes.plot(list(curve), list(curve.values()), line, color=color, lw=width, label=label)
    axes.axvline(stopped, color="black", lw=0.8, ls=":")
    axes.annotate("SIGTERM", (stopped, axes.get_ylim()[1]), ha="right", va="top", rotation=90)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def run(arguments: argparse.Namespace) -> None:
    """Train the three runs, compare and draw them."""
    require_matplotlib("resume")  # before what takes long
    folder = Path(arguments.folder).absolute()
    if folder.exists():
        raise ConfigError(f"--folder {folder}: exists; remove or rename it")
    straight, resumed, other = (folder / name for name in ("straight", "resumed", "other"))
    finish(start(arguments, straight, arguments.ranks))
    stopped = stop_half_way(arguments, resumed)
    shutil.copytree(resumed, other)
    finish(start(arguments, resumed, arguments.ranks))
    finish(start(arguments, other, arguments.other_ranks))
    found = {path.name: losses(path) for path in (straight, resumed, other)}
    same = found["straight"] == found["resumed"]
    gap = max(abs(found["straight"][s] - found["other"][s]) for s in found["straight"])
    picture = arguments.output.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    labels = {
        "straight": f"{arguments.ranks} ranks, straight",
        "resumed": f"stopped, resumed on {arguments.ranks} ranks",
        "other": f"stopped, resumed on {arguments.other_ranks} ranks",
    }
    draw({labels[name]: curve for name, curve in found.items()}, stopped, picture)
    text = (
        f"![training loss]({picture.name})\n\n"
        f"Stopped by SIGTERM after step {stopped} of {arguments.steps}. On {arguments.ranks} ranks "
        f"the losses of the resumed run are {'bit for bit' if same else 'NOT'} those of the "
        f"straight one. On {arguments.other_ranks} ranks the same state goes on with the same "
        f"data under another plan; its losses differ by at most {gap:.4f} nats per token."
    )
    result = {"stopped_after": stopped, "is_bit_identical": same, "losses": found}
    write_results(arguments.output, "A run stopped and resumed", text, result)
    print(text)


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    about = __doc__.split("\n\n")[0] if __doc__ else None
    parser = argparse.ArgumentParser("resume", description=about)
    parser.add_argument("--deepspeed_config", default="configs/demo.json")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--other_ranks", type=int, default=2)
    parser.add_argument("--folder", default="runs/resume", help="for the three runs; must be new")
    parser.add_argument("--output", type=Path, required=True, help="JSON; page and picture beside")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return run_command(parser, run)


if __name__ == "__main__":
    sys.exit(main())
