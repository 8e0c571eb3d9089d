"""The folder of a run."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdp_llm.config import RunConfig, load_config, parse_config
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Phase, Plan, Schedule, make_plan
from sdp_llm.training import run_folder
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.versions import PACKAGES

PLAN = make_plan(4, 6, owners_per_block=2)


def always(plan: Plan) -> Schedule:
    return Schedule((Phase(0, 100, plan, "forward", 0, 0),))


SCHEDULE = always(PLAN)


def run_at(folder: Path) -> RunConfig:
    run = parse_config(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
            "sdp": {"coverage": "1/2"},
            "csv_monitor": {"enabled": False},
        }
    )
    return replace(run, training=replace(run.training, run_dir=str(folder)))


def test_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    run = run_at(path)
    RunFolder(run, SCHEDULE, is_writer=True).begin()
    assert load_config(path / "config.json") == run
    plan = json.loads((path / "plan.json").read_text())
    owners = [list(owners) for owners in PLAN.owner_sets]
    phase: dict[str, Any] = {
        "start": 0,
        "stop": 100,
        "masking": "forward",
        "rotate_every": 0,
        "seed": 0,
    }
    phase |= {"owners": owners, "pinned": [0, 5]}
    assert plan == {"world_size": 4, "phases": [phase]}
    environment = json.loads((path / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert set(environment["packages"]) == {"python", *PACKAGES}
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["command"]
    assert (path / "metrics.jsonl").read_text() == ""


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    def commit(name: str) -> str | None:
        RunFolder(run_at(tmp_path / name), SCHEDULE, is_writer=True).begin()
        environment = json.loads((tmp_path / name / "environment.json").read_text())
        return environment["commit"]

    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # of a hook that runs tests
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "lib" / "sdp_llm"
    package.mkdir(parents=True)
    (package / "run_folder.py").touch()
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of another project")
    assert commit("other") is None
    git("add", "lib")
    git("commit", "-q", "-m", "with the package")
    assert commit("own") == git("rev-parse", "HEAD")


def test_the_log_appends_objects_with_the_time(tmp_path: Path) -> None:
    folder = RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
    before = time.time()
    folder.log({"step": 1, "loss": 2.5})
    folder.log({"step": 2, "validation": None})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert before - 0.001 <= first.pop("time") <= second.pop("time") <= time.time() + 0.001
    assert (first, second) == ({"step": 1, "loss": 2.5}, {"step": 2, "validation": None})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=False)
    folder.begin()
    folder.log({"step": 1})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder(run_at(path), SCHEDULE, is_writer=True).log({"step": 1})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ConfigError, match="holds a run already; choose another folder") as caught:
        RunFolder(run_at(path), always(make_plan(2, 6, owners_per_block=1)), is_writer=True)
    assert f"training.run_dir = {json.dumps(str(path))}" in str(caught.value)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "plan.json", "environment.json"])
def test_files_of_the_same_names_are_not_overwritten(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / name).write_text("a model's")
    for resume in ("auto", "none", str(path / "checkpoints")):
        with pytest.raises(ConfigError, match=f"has a {name} and no metrics.jsonl, so that it is"):
            RunFolder(run_at(path), SCHEDULE, is_writer=True, resume=resume)
    assert (path / name).read_text() == "a model's"
    (path / "checkpoints" / "step-1").mkdir(parents=True)  # it is a run's, whose metrics are gone
    RunFolder(run_at(path), SCHEDULE, is_writer=True, resume="auto")


def test_a_line_that_a_crash_left_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
    folder.log({"step": 1})
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_bytes()
    metrics.write_bytes(kept + b'{"step": 2, "\xff\x00')
    assert folder.begin(5) == ["metrics.jsonl: 1 lines of steps that are done again removed"]
    assert metrics.read_bytes() == kept


def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True)
    folder.log({"step": 1})
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Within a process that may write 20 bytes more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 20, before[1]))
    try:
        folder.log({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "metrics.jsonl: cannot write: " in capsys.readouterr().out
    assert metrics.read_bytes() == kept


def test_a_folder_with_other_files_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunFolder(run_at(tmp_path / "run"), SCHEDULE, is_writer=True).begin()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    with pytest.raises(ConfigError) as caught:
        RunFolder(run_at(path), SCHEDULE, is_writer=True)
    message = str(caught.value)
    assert f"training.run_dir = {json.dumps(str(path))}: cannot write: " in message
    assert "Not a directory" in message
    assert message.endswith("; name a folder that can be created")
    assert "\n" not in message
