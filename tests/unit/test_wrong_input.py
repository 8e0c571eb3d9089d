"""Wrong input is one line that says what is wrong and what to do; see ``tests/wrong``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdp_llm.errors import ConfigError
from sdp_llm.versions import OLDEST
from tests.conftest import ROOT
from tests.integration.conftest import Tiny
from tests.wrong import checkpoint, command_line, config, data, environment, tokenizer
from tests.wrong.scene import Scene, Wrong, check, write_scene

PARTS = (config, data, tokenizer, checkpoint, environment, command_line)
WRONG: list[Wrong] = [case for part in PARTS for case in part.CASES]

LONGEST = 320  # characters, with short paths


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


def test_every_category_has_its_share() -> None:
    counts = Counter(case.category for case in WRONG)
    assert len(counts) == len(PARTS)
    assert min(counts.values()) >= 8
    assert len({str(case) for case in WRONG}) == len(WRONG) >= 60


def test_the_oldest_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, oldest in OLDEST.items():
        assert f'"{name}>={oldest}"' in text
