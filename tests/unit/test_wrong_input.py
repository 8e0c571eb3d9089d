"""Wrong input is one line that says what is wrong and what to do; see ``tests/wrong``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError, TrainingStopped
from sdp_llm.training.backends import Step
from sdp_llm.training.health import Health
from sdp_llm.training.position import Position
from sdp_llm.versions import OLDEST
from tests.conftest import ROOT
from tests.integration.conftest import Tiny
from tests.unit.test_training_trainer import Notes
from tests.wrong import checkpoint, command_line, config, data, environment, tokenizer
from tests.wrong.scene import Scene, Wrong, check, write_corpus, write_model, write_scene

PARTS = (config, data, tokenizer, checkpoint, environment, command_line)
WRONG: list[Wrong] = [case for part in PARTS for case in part.CASES]

LONGEST = 340  # characters, with short paths


@pytest.fixture(scope="module")
def scene(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return write_scene(tiny, tmp_path_factory.mktemp("w"))


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_message(
    wrong: Wrong,
    scene: Scene,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((ConfigError, SystemExit)) as caught:
        wrong.provoke(scene)
    message = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        [message] = [line for line in printed.splitlines() if ": error: " in line]
        command = Path(message.partition(": error: ")[0]).name
        assert (ROOT / "launch" / f"{command}.py").exists() or (
            ROOT / "data_prep" / f"{command}.py"
        ).exists()
    assert len(message.splitlines()) == 1
    for path in (scene.folder, scene.tiny.folder):
        message = message.replace(str(path), "{folder}" if path == scene.folder else "{tiny}")
    assert len(message) < LONGEST
    for word in wrong.words:
        assert word in message
    assert not (scene.folder / "never").exists()


def test_what_is_right_passes(scene: Scene, tmp_path: Path) -> None:
    check(scene.tiny.config, [f"training.run_dir={tmp_path / 'run'}"], world_size=2)
    assert (tmp_path / "run" / "config.json").exists()


def test_the_readme_shows_what_the_program_says(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of "When something goes wrong", from files of the names that they have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_corpus(Path("data/web"), 1000, largest=400)
    write_model(Path("model"))
    (tmp_path / "runs" / "held").mkdir(parents=True)
    (tmp_path / "runs" / "held" / "metrics.jsonl").touch()
    said = []
    for overrides in (
        ["training.step=5"],
        ["train_batch_size=9"],
        ["data.train=data/web", "model.config=model/config.json", "data.validation=null"],
        ["training.run_dir=runs/held"],
    ):
        with pytest.raises(ConfigError) as caught:
            check(scene.tiny.config, overrides, world_size=2)
        said.append(str(caught.value))
    inputs: Any = None
    folder: Any = None
    health = Health(parse_config({}), inputs, Notes(), folder, print, Position())
    position = Position(step=412, skipped_in_a_row=20)
    with pytest.raises(TrainingStopped) as stopped:
        health.look(Step(torch.zeros(1), 1.0, False), position)
    said.append(str(stopped.value))
    [section] = re.findall(
        r"## When something goes wrong\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert re.findall(r"```\n(.*?)\n```", section) == said


def test_every_category_has_its_share() -> None:
    counts = Counter(case.category for case in WRONG)
    assert len(counts) == len(PARTS)
    assert min(counts.values()) >= 8
    assert len({str(case) for case in WRONG}) == len(WRONG) >= 60


def test_the_oldest_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, oldest in OLDEST.items():
        assert f'"{name}>={oldest}"' in text
