"""The page: complete, alone, and safe whatever a run is called."""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.report import report
from sdp_llm.cli import run_command
from sdp_llm.plan import make_plan
from sdp_llm.plan.schedule import Phase, Schedule
from sdp_llm.processes import this_process
from sdp_llm.report.page import page
from sdp_llm.report.picture import phases_of_schedule, plan_svg
from sdp_llm.report.record import read_run, read_runs
from sdp_llm.report.table import progress_text, row_of
from tests.unit.runs import BLOCKS, WORLD_SIZE, make_run, training_line, two_phases

SINGLE = {"meta", "input", "rect", "line", "circle", "path", "br"}


class Elements(HTMLParser):
    """Collects the elements and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in SINGLE or (tag == "rect" and "fill-opacity" in dict(attrs)):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run_report(*arguments: Any, png: str | None = None) -> int:
    output, *runs = arguments
    values = {"runs": [str(run) for run in runs], "output": output and str(output), "png": png}
    return run_command("report", report, argparse.Namespace(**values, debug=False))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_page_is_alone_in_the_world(count: int, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", state="running") for i in range(count)]
    assert run_report(tmp_path / "out.html", *runs) == 0
    text = (tmp_path / "out.html").read_text()
    assert not re.search(r"https?:|//\w|url\((?!#clip)|@import|\bsrc=|<link", text)
    assert "default-src 'none'" in text
    elements = Elements(text)
    for tag, attributes in elements.found:
        assert tag not in {"img", "iframe", "link", "object", "embed", "base", "form"}
        assert not {"src", "href", "xlink:href", "action"} & attributes.keys()


def test_the_page_has_every_part(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "demo"), "demo")], "today")
    titles = re.findall(r"<h2>([^<]+)", text)
    assert titles == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
        "Spread of the ranks&#x27; losses",
        "Who trains what",
        "Cosine similarity of the owners&#x27; gradients",
        "Gradient norm by block",
    ]
    assert re.findall(r'<label for="tab-\d">(\w+)', text) == ["steps", "tokens", "FLOPs", "time"]
    assert "rank 0 owns 6 of 6 blocks: 0, 1, 2, 3, 4, 5" in text
    assert text.count("<title>rank 0 owns") == 2  # phases
    assert "step 40, block 1: 0.2000" in text
    assert "block 2: " not in text.split("Gradient norm by block")[0]  # it has one owner
    assert "Made today. Code of the runs: commit 0123456789ab-dirty." in text


def test_the_values_under_the_pointer_are_the_runs(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "demo"), "demo")], "today")
    charts = [
        json.loads(part) for part in re.findall(r'application/json">(.*?)</script>', text, re.S)
    ]
    training, validation = charts[0]["series"]
    assert training["at"] == [str(step) for step in range(5, 41, 5)]
    assert training["value"] == [f"{8 - step / 10:.3f}" for step in range(5, 41, 5)]
    assert (validation["at"], validation["value"]) == (["40"], ["4.500"])
    left, top, right, bottom = charts[0]["box"]
    for chart in charts:
        for series in chart["series"]:
            assert len(series["x"]) == len(series["y"]) == len(series["at"]) > 0
            assert series["x"] == sorted(series["x"])
    assert all(left <= x <= right for x in training["x"])
    assert all(top <= y <= bottom for y in training["y"])
    # Up is more.
    assert training["y"] == sorted(training["y"])


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>&'\""
    folder = make_run(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps({"commit": "<b>bad"}))
    (folder / "config.json").write_text(json.dumps({"model": {"config": "<i>x.json"}}))
    text = page([read_run(folder, name), read_run(folder, "b")], "today")
    elements = Elements(text)
    assert "img" not in {tag for tag, _ in elements.found}
    assert text.count("<script") == text.count("</script>") == len(re.findall("<script[ >]", text))
    assert "<b>bad" not in text
    assert "<i>x" not in text


def test_a_run_without_its_other_files_and_one_that_has_just_begun(tmp_path: Path) -> None:
    for name, content in {"bare": json.dumps(training_line(5)) + "\n", "empty": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
        Elements(page(read_runs([tmp_path / name]), "today"))
    Elements(page(read_runs([tmp_path / "bare", make_run(tmp_path / "whole")]), "today"))


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    row = row_of(read_run(make_run(tmp_path), "demo"))
    assert row["validation loss"] == ("4.5000", "step 40\n2.5000 bits/byte")
    assert row["training loss"] == ("4.0000", "step 40")
    assert row["tokens"] == ("4 K", "50 per second")
    assert row["compute"] == ("8 TFLOPs", "all ranks")
    assert row["time in steps"] == ("0:01:20", "")
    assert row["memory of a rank"] == ("5.00 MiB", "model state of rank 3\n4.00 MiB predicted")
    assert row["spread of losses"] == ("0.7500", "between ranks\nrank 3 highest in 100%")
    assert row["plan"] == ("2 phases", "4 ranks")


def test_a_run_that_was_killed_is_not_going_on(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path, state="running"), "demo")
    gone = replace(this_process(), pid=2**22 + 7)
    for process, ending in ((this_process(), "still going"), (gone, "killed")):
        running = replace(record, status={"state": "running", **asdict(process)})
        assert progress_text(running) == f"40 of 40 steps, {ending}"
        left = replace(running, training=[{**record.training[-1], "eta": 600.0}])
        assert row_of(left)["time in steps"][1] == ("10 min left" if ending != "killed" else "")


def test_the_page_lies_in_the_run_by_default(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert run_report(None, folder) == 0
    assert (folder / "report.html").is_file()


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert run_report(None, tmp_path) == 2
    assert run_report(tmp_path / "no" / "folder.html", folder) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"report: error: {tmp_path}: no run: No such file or directory (metrics.jsonl); "
        "name a training.run_dir"
    )
    assert second.startswith(f"report: error: --output {tmp_path}/no/folder.html: cannot write")


def test_pngs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run_report(tmp_path / "r.html", make_run(tmp_path / "run"), png=f"{tmp_path}/png") == 0
    written = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"loss-steps.png", "loss-tokens.png", "loss-flops.png", "memory.png"} < written
    assert "plan-run.png" in written
    for path in (tmp_path / "png").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pngs_without_matplotlib_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run_report(tmp_path / "r.html", make_run(tmp_path / "run"), png=f"{tmp_path}/png") == 2
    assert "PNG needs matplotlib, which is not installed" in capsys.readouterr().err
    assert (tmp_path / "r.html").is_file()


# -- the picture of a plan ------------------------------------------------------------------------

SPACE = "{http://www.w3.org/2000/svg}"


def cells(group: ET.Element, kind: str) -> int:
    paths = [p.get("d", "") for p in group.iter(f"{SPACE}path") if p.get("class") == kind]
    return sum(d.count("M") for d in paths)


def test_the_picture_has_a_cell_for_every_rank_and_block() -> None:
    root = ET.fromstring(plan_svg(phases_of_schedule(two_phases())))
    for phase, group in zip(two_phases().phases, list(root)[-1][0], strict=True):
        rows = [g for g in group.iter(f"{SPACE}g") if g.find(f"{SPACE}title") is not None]
        assert len(rows) == WORLD_SIZE
        for rank, row in enumerate(rows):
            assert cells(row, "pinned") == len(phase.plan.pinned)
            assert cells(row, "owned") == phase.plan.load(rank)
            assert cells(row, "absent") == BLOCKS - len(phase.plan.owned_blocks(rank))
    texts = [element.text for element in root.iter(f"{SPACE}text")]
    assert "phase 2: steps 11 to 40" in texts
    assert "coverage 1/2, backward masking, rotating every 5 steps" in texts
    each_step = replace(two_phases().phases[1], rotate_every=1)
    assert "backward masking, rotating every step<" in plan_svg(
        phases_of_schedule(Schedule((each_step,)))
    )


def test_a_large_plan_fits_the_page() -> None:
    plan = make_plan(128, 96, owners_per_block=16, strategy="cyclic")
    schedule = Schedule((Phase(0, 10, plan, "forward", 0, 0),))
    root = ET.fromstring(plan_svg(phases_of_schedule(schedule)))
    _, _, width, height = (float(part) for part in root.get("viewBox", "").split())
    assert width < 1200
    assert height < 600
