"""What is read from the folders of runs, and the charts that are made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sdp_llm.errors import ConfigError
from sdp_llm.report.chart import Series, is_log_better, runs_of_finite, thinned
from sdp_llm.report.figures import FLOPS, HOURS, TOKENS, loss_charts, progress_of, step_charts
from sdp_llm.report.record import read_run, read_runs
from tests.unit.runs import make_run, training_line, validation_line


def test_the_lines_by_kind(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path), "run")
    assert [entry["step"] for entry in record.training] == list(range(5, 41, 5))
    assert [entry["step"] for entry in record.validation] == [40]
    assert (len(record.memory), len(record.gradients)) == (1, 1)
    assert (record.step, record.total_steps) == (40, 40)
    assert record.status == {"state": "finished"}


def test_steps_that_were_done_again_count_once_and_the_later_count(tmp_path: Path) -> None:
    lines = [training_line(step) for step in (10, 20, 30)]
    lines[1:1] = [validation_line(10, 7.5)]
    lines += [training_line(20, loss=1.5), validation_line(20, 1.25), training_line(25, loss=1.0)]
    record = read_run(make_run(tmp_path, lines), "run")
    # Step 30 is of what came to nothing.
    assert [(e["step"], e["loss"]) for e in record.training] == [(10, 7), (20, 1.5), (25, 1.0)]
    assert [e["validation/loss"] for e in record.validation] == [7.5, 1.25]


def test_lines_of_one_step_replace_their_own_kind_only(tmp_path: Path) -> None:
    lines = [training_line(10), validation_line(10, 7.5), training_line(10, loss=2.0)]
    record = read_run(make_run(tmp_path, [training_line(5), *lines]), "run")
    assert [(e["step"], e["loss"]) for e in record.training] == [(5, 7.5), (10, 2.0)]
    assert [e["validation/loss"] for e in record.validation] == [7.5]


def test_a_save_in_the_background_takes_nothing_back(tmp_path: Path) -> None:
    lines = [training_line(10), training_line(20), {"step": 10, "checkpoint/seconds": 3.0}]
    record = read_run(make_run(tmp_path, lines), "run")
    assert [e["step"] for e in record.training] == [10, 20]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [training_line(5)], state="running")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 6.')  # the line is being written
    assert [e["step"] for e in read_run(folder, "run").training] == [5]
    with (folder / "metrics.jsonl").open("ab") as torn:
        torn.write(b"\xff\x00\n[1]\n")
    assert [e["step"] for e in read_run(folder, "run").training] == [5]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    record = read_run(tmp_path, "run")
    assert (record.step, record.total_steps, record.plan) == (0, None, {})
    assert all(chart.is_empty for chart in loss_charts([record]).values())
    assert step_charts([record]) == []


def test_a_folder_without_metrics_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run: No such file .*name a training\.run_dir"):
        read_run(tmp_path, "run")


def test_names_are_as_long_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a/demo", "b/demo", "b/other")]
    assert [r.name for r in read_runs(folders)] == ["a/demo", "b/demo", "b/other"]
    assert [r.name for r in read_runs(folders[1:])] == ["demo", "other"]
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([folders[0], folders[0] / ".." / "demo"])


# -- charts ---------------------------------------------------------------------------------------


def test_progress_is_what_the_lines_have_counted(tmp_path: Path) -> None:
    """Also those of a run that began elsewhere, or under another plan."""
    lines = [training_line(10, flops=5e9), training_line(20, flops=6e9, seconds=90.0)]
    record = read_run(make_run(tmp_path, lines), "run")
    assert progress_of(record, FLOPS) == [5e9, 6e9]
    assert progress_of(record, TOKENS) == [1000.0, 2000.0]
    assert progress_of(record, HOURS) == [20.0 / 3600, 90.0 / 3600]


def test_a_run_of_unknown_cost_has_no_axis_of_compute(tmp_path: Path) -> None:
    records = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", is_known=False)])
    assert list(loss_charts(records)) == ["steps", "tokens", "time"]
    assert list(loss_charts(records[:1])) == ["steps", "tokens", "FLOPs", "time"]


def test_validation_stands_where_the_run_was(tmp_path: Path) -> None:
    lines = [training_line(10), validation_line(15), training_line(20)]
    record = read_run(make_run(tmp_path, lines), "run")
    charts = loss_charts([record])
    assert charts["steps"].series[1].x == (15.0,)
    assert charts["tokens"].x_label == "thousand tokens"
    assert charts["tokens"].series[1].x == (1.5,)
    # 50 tokens per second.
    assert charts["time"].x_label == "minutes in steps"
    assert charts["time"].series[1].x == (pytest.approx(0.5),)


def test_the_charts_over_steps(tmp_path: Path) -> None:
    charts = {chart.key: chart for chart in step_charts([read_run(make_run(tmp_path), "run")])}
    assert set(charts) == {"lr", "grad-norm", "tokens-per-second", "memory", "rank-spread"}
    spread = charts["rank-spread"].series[0]
    assert set(spread.y) == {0.75}
    assert set(spread.extra) == {"rank 3 highest"}
    memory = charts["memory"].series[0]
    assert (charts["memory"].unit, memory.low[0], memory.y[0]) == ("MiB on a rank", 512, 1024)


def test_memory_is_compared_where_it_can_be_measured(tmp_path: Path) -> None:
    charts = step_charts([read_run(make_run(tmp_path, device="cuda"), "run")])
    [memory] = [chart for chart in charts if chart.key == "memory"]
    assert memory.series[1].is_dashed
    assert memory.series[1].y == (1024.0, 1024.0)
    assert "On the CPU" not in memory.note


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    lines = [training_line(s, loss=math.nan if s == 10 else 5.0) for s in (5, 10, 15, 20)]
    record = read_run(make_run(tmp_path, lines), "run")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert runs_of_finite(loss_charts([record])["steps"].series[0]) == [[0], [2, 3]]


def test_thinning_keeps_the_ends_and_what_stands_out() -> None:
    values = [0.0] * 5000
    values[1234], values[4321] = 9.0, -9.0
    series = Series("a", 0, tuple(map(float, range(5000))), tuple(values))
    few = thinned(series, 500)
    assert len(few.x) <= 510
    assert (max(few.y), min(few.y)) == (9.0, -9.0)
    assert (few.x[0], few.x[-1]) == (0.0, 4999.0)
    assert list(few.x) == sorted(few.x)
    assert few.x[few.y.index(9.0)] == 1234.0
    assert thinned(few, 1000) is few


def test_a_logarithmic_axis_only_where_it_helps() -> None:
    assert is_log_better([0.5, 0.6, 0.7, 40.0])
    assert not is_log_better([0.5, 0.6, 0.7, 4.0])
    assert not is_log_better([0.0, 0.5, 0.6, 400.0])
    assert not is_log_better([])
