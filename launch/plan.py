"""Print who owns what under a run config and what it costs, without starting any process.

python launch/plan.py --deepspeed_config configs/demo.json --world_size 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdp_llm.cli import config_of, config_parser, run_command
from sdp_llm.config import RunConfig, require_sections, resolve_batch
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Schedule
from sdp_llm.plan.report import run_report
from sdp_llm.plan.schedule import ENDLESS
from sdp_llm.plan.schedule_cost import check_memory_limit, schedule_cost
from sdp_llm.report.picture import phases_of_schedule, plan_svg
from sdp_llm.report.png import save_plan


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("plan", run, _parser().parse_args(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Parse, compute, print."""
    picture = arguments.picture and Path(arguments.picture)
    show(config_of(arguments), arguments.world_size, arguments.backend, picture)


def show(
    config: RunConfig, world_size: int, backend: str | None, picture: Path | None = None
) -> None:
    """Print the card of a run.

    :param backend: "gloo" or "nccl"; None: what this machine would use.
    :param picture: where to draw who owns what, as PNG or SVG; None: nowhere.
    :raises ConfigError: for a config that cannot run on ``world_size`` ranks; one that only needs
        more than ``sdp.memory_limit_gib`` is shown before.
    """
    require_sections(config, "model")
    assert config.model is not None
    if world_size < 1:
        raise ConfigError(f"--world_size = {world_size}: must be at least 1; start at least a rank")
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {picture}: not a .png or .svg; name one of these")
    batch = resolve_batch(config, world_size)
    # These take seconds to import; a wrong config has failed by now.
    from sdp_llm.subnetwork.measure import run_model_config
    from sdp_llm.training.budget import budget_line, run_schedule, run_size
    from sdp_llm.training.position import Position

    model = run_model_config(config.model)
    schedule = run_schedule(config, model, batch, world_size)
    size, setup = run_size(config, model, batch, backend)
    limit = config.sdp.memory_limit_gib
    name = Path(config.model.config).name.removesuffix(".json")
    print(run_report(schedule, size, setup, model=name, memory_limit_gib=limit))
    if schedule.total_steps != ENDLESS:
        steps, samples = schedule.total_steps, batch.global_batch
        print("\n" + budget_line(steps, samples, size.sequence_length, Position()))
    if picture is not None:
        draw(schedule, picture)
    if limit is not None:
        check_memory_limit(schedule, schedule_cost(size, schedule, setup), limit)


def draw(schedule: Schedule, path: Path) -> None:
    """Draw who owns what in each phase.

    :raises ConfigError: when the file cannot be written, or a PNG is asked for without matplotlib.
    """
    phases = phases_of_schedule(schedule)
    try:
        if path.suffix == ".svg":
            path.write_text(plan_svg(phases), encoding="utf-8")
        else:
            save_plan(phases, path)
    except OSError as error:
        raise ConfigError(f"--picture {path}: cannot write: {error.strerror}") from None
    print(f"\ndrew {path}")


def _parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__ or "")
    parser.add_argument("--world_size", required=True, type=int, help="number of ranks")
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw who owns what: a .svg, or a .png (matplotlib)"
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="whose buffers to predict (default: nccl where there is a GPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
