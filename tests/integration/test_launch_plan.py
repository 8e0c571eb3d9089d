"""The command that prints a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan import main
from tests.conftest import ROOT

DEMO = ("--deepspeed_config", str(ROOT / "configs" / "demo.json"))

# Starting a process group, or rendezvous, would end the run.
NO_GROUPS = """
import runpy, sys, torch.distributed as dist
def refuse(*args, **kwargs): raise SystemExit("a process group was started")
dist.init_process_group = dist.new_group = dist.TCPStore = dist.FileStore = refuse
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not dist.is_initialized()
    assert "deepspeed" not in sys.modules
"""


def _plan(*arguments: str, config: str = "configs/demo.json") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_GROUPS, "launch/plan.py", "--deepspeed_config", config]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the demo's config are relative to the project's root."""
    monkeypatch.chdir(ROOT)


def test_prints_the_card_of_the_demo() -> None:
    result = _plan("--world_size", "4", "--backend", "gloo")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    rows = {line[:31].strip(): line[31:].split() for line in lines}
    assert "coverage 1/2 of the free blocks" in result.stdout
    assert "a rank trains 2.0 M of them (77.4%)" in lines
    assert any(line.startswith("budget ") and " steps of " in line for line in lines)
    assert any(line.startswith("rank 3  P") and "5/8 blocks" in line for line in lines)
    for name in ("load", "connectivity", "turns", "owner sets", "λ", "\N{GREEK SMALL LETTER RHO}"):
        assert any(line.startswith(f"{name:<14}") for line in lines), name
    assert "own normalisation of Proposition 1" in " ".join(lines)
    assert rows["memory of one rank, MiB"] == ["SDP", "DDP", "ZeRO-2", "ZeRO-3"]
    # 2,631,808 parameters, of which a rank lacks 3 of 8 blocks of 197,888; fp32.
    assert rows["weights"] == ["7.77", "10.0", "10.0", "2.51"]
    for name in ("gradients", "optimizer", "transient", "activations", "total"):
        assert len(rows[name]) == 4, name
    assert len(rows["sent per step, MiB"]) == len(rows["MFLOPs per token"]) == 4


@pytest.mark.usefixtures("in_root")
def test_uneven_load_and_no_data_section(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["sdp.coverage=1/4", "sdp.pinned_first=2", "data=null", "train_batch_size=4"]
    assert main([*DEMO, "--world_size", "4", *(a for o in overrides for a in ("--set", o))]) == 0
    output = capsys.readouterr().out
    assert "4 ranks x 1 micro-batch x 1 samples x 2048 tokens" in output
    assert "SDP most   SDP least" in output
    assert output.count("most loaded rank") == 1  # all send the shared parameters only


PHASES = 'sdp.schedule=[{"until": 0.5, "rotate_every": 50}, {"until": 1, "coverage": 1}]'


@pytest.mark.usefixtures("in_root")
def test_phases_are_rows_and_a_limit_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*DEMO, "--world_size", "4", "--backend", "gloo", "--set", PHASES]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert max(len(line) for line in captured.out.splitlines()) <= 100
    rows = [line.split() for line in captured.out.splitlines()]
    for cells in (
        ["1", "1", "to", "100", "1/2", "forward", "every", "50"],
        ["2", "101", "to", "200", "1", "forward", "never"],
    ):
        assert sum(row[: len(cells)] == cells for row in rows) == 1
    assert ["memory", "of", "one", "rank", "in", "phase", "2,", "MiB"] in [r[:8] for r in rows]
    # One that does not fit is shown, and is an error.
    assert main([*options, "--set", "sdp.memory_limit_gib=0.1"]) == 2
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out
    [line] = captured.err.splitlines()
    assert line.startswith("plan: error: sdp.memory_limit_gib = 0.1: phase 2 of 2 (coverage 1,")
    assert main([*options, "--set", "training.steps=null"]) == 2
    assert "sdp.schedule: phases end at shares of the budget, but" in capsys.readouterr().err


@pytest.mark.usefixtures("in_root")
def test_the_picture_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*DEMO, "--world_size", "4", "--set", PHASES, "--picture"]
    drawing = tmp_path / "plan.svg"
    assert main([*options, str(drawing)]) == 0
    assert capsys.readouterr().out.endswith(f"drew {drawing}\n")
    for text in ("phase 1: steps 1 to 100", "rotating every 50 steps", "phase 2: steps 101 to 200"):
        assert text in drawing.read_text()
    assert main([*options, str(tmp_path / "plan.jpg")]) == 2
    assert main([*options, str(tmp_path / "no" / "plan.svg")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("plan.jpg: not a .png or .svg; name one of these")
    assert second.endswith("plan.svg: cannot write: No such file or directory")


@pytest.mark.usefixtures("in_root")
def test_the_picture_of_a_plan_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawing = tmp_path / "plan.png"
    assert main([*DEMO, "--world_size", "4", "--set", PHASES, "--picture", str(drawing)]) == 0
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_wrong_input_is_one_line_of_the_command() -> None:
    result = _plan("--world_size", "3")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("plan: error: train_batch_size = 32: must be")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("world_size", "override", "message"),
    [
        ("0", "sdp.seed=0", "--world_size = 0"),
        ("4", "sdp.coverage=1/3", "sdp.coverage = 1/3"),
        ("4", "sdp.covrage=1/2", "sdp.covrage: unknown key"),
        ("4", "model.config=nowhere.json", "model.config = 'nowhere.json'"),
        ("4", "model=null", "model: missing"),
        (
            "4",
            "model.init_from=no/model model.config=null",
            'model.init_from = "no/model": no such',
        ),
        ("4", "data.sequence_length=100000", "data.sequence_length = 100000: longer than"),
        (
            "4",
            "scheduler.params.warmup_num_steps=1000",
            "scheduler.params.warmup_num_steps = 1000: longer than total_num_steps = 200",
        ),
    ],
)
@pytest.mark.usefixtures("in_root")
def test_wrong_input(
    world_size: str, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*DEMO, "--world_size", world_size, "--set", *override.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"plan: error: {message}")
    assert len(captured.err.splitlines()) == 1


def test_output_that_nobody_reads_any_more_is_no_error() -> None:
    command = f"{sys.executable} launch/plan.py --deepspeed_config configs/demo.json --world_size 4"
    piped = ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(piped, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
    assert done.returncode in (0, 141)  # 0: all was written before head had its line
