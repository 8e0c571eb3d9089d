"""Wrong input under the launcher: one line and the same status on every rank.

All messages are tested without processes, in ``tests/unit/test_wrong_input.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.conftest import Finished, Tiny, free_port, script, two_at_a_time
from tests.wrong import checkpoint, config, data, tokenizer
from tests.wrong.scene import Scene, Wrong, changes_of, write_scene

Command = list[str | Path]


@pytest.fixture(scope="session")
def scene(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = write_scene(tiny, tmp_path_factory.mktemp("wrong"))
    corrupt = '{"sdp": {"coverage": "1/2"}\n"model": {}}'
    (scene.folder / "corrupt.json").write_text(corrupt)
    return scene


def launched(scene: Scene, *arguments: str, run: str = "", prefix: Sequence[str] = ()) -> Command:
    """Two ranks under DeepSpeed's launcher, each behind ``prefix``."""
    launcher = [script("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    if prefix:
        launcher += ["--no_python", "--no_local_rank", *prefix, sys.executable]
    file = run or str(scene.tiny.config)
    return [*launcher, "launch/pretrain.py", "--deepspeed_config", file, *arguments]


def with_overrides(scene: Scene, part: Sequence[Wrong], name: str) -> tuple[Command, list[str]]:
    """A case of the table that is made by ``--set``, and the words of its message."""
    [wrong] = [case for case in part if case.name == name]
    assert wrong.overrides is not None
    overrides = changes_of(wrong.overrides, scene)
    return launched(scene, "--set", *overrides), [scene.filled(word) for word in wrong.words]


def check_launched(cases: Sequence[tuple[Command, list[str]]], scene: Scene) -> None:
    done = two_at_a_time([command for command, _ in cases], timeout=90)
    for finished, (_, words) in zip(done, cases, strict=True):
        check_said(words, finished)
    assert not (scene.folder / "never").exists()


def check_said(words: Sequence[str], done: Finished) -> None:
    assert done.status != 0, done.output
    lines = sorted(done.error_lines())
    assert len(lines) == 2, done.output
    for rank, line in enumerate(lines):
        assert line.startswith(f"pretrain: error: [rank {rank}] "), done.output
        for word in words:
            assert word in line
    assert "Traceback" not in done.output
    # The launcher ends a rank that is still there: it must have failed by itself.
    assert "exits with return code = 2" in done.stdout + done.stderr


def test_every_rank_says_it_once(scene: Scene) -> None:
    """A file that cannot be read, and a folder that only one rank tries to write."""
    file = f"{scene.folder}/corrupt.json"
    corrupt = launched(scene, run=file), [file, "not valid JSON at line 2, column 1"]
    check_launched(
        [corrupt, with_overrides(scene, checkpoint.CASES, "run_dir below a file")], scene
    )


@pytest.mark.slow
def test_one_of_each_category(scene: Scene) -> None:
    """A wrong world size is put between the launcher and the ranks."""
    environment = launched(scene, prefix=["env", "WORLD_SIZE=two"])
    slip = launched(scene, "--resum", "none")
    missing = launched(
        scene,
        *("--resume", "nowhere", "--set", f"training.run_dir={scene.folder}/no_run"),
    )
    check_launched(
        [
            with_overrides(scene, config.CASES, "owner sets of another world size"),
            with_overrides(scene, data.CASES, "missing corpus"),
            with_overrides(scene, tokenizer.CASES, "larger than the vocabulary"),
            (environment, ["WORLD_SIZE = two: the environment must have an integer ≥ 1"]),
            (slip, ["unrecognized arguments: --resum none; did you mean --resume?"]),
            (missing, ["--resume nowhere: no checkpoint there; name one"]),
        ],
        scene,
    )
