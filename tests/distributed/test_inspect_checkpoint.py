"""What a checkpoint holds, and whether it is what was saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.checkpoint.inspection import inspect_checkpoint
from sdp_llm.checkpoint.save import seal
from sdp_llm.files import sha256_of
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, build, forward_backward

Pools = Callable[[int], Pool]


def train_and_save(folder: str, steps: int) -> None:
    """Run on a rank: a user's own loop."""
    engine = build(Case(2, owners_per_block=1))
    for step in range(steps):
        forward_backward(engine, step)
        engine.step()
    engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def saved(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint after two steps, and one at the start."""
    folder = tmp_path_factory.mktemp("inspected")
    pools(2).run(train_and_save, str(folder / "start"), 0)
    pools(2).run(train_and_save, str(folder / "trained"), 2)
    yield folder
    shutil.rmtree(folder)


def test_the_report(saved: Path) -> None:
    folder = find_checkpoint(saved / "trained")
    found = inspect_checkpoint(folder)
    assert found.problems == []
    lines = [line.split() for line in found.report.splitlines()]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["checkpoint"] == [str(folder)]
    assert " ".join(rows["step"]) == "2, 12 samples, tokens not counted by this loop"
    parameters = json.loads((folder / "manifest.json").read_text())["parameters"]
    stored = {line[3]: line[1:] for line in lines if line[0] == "stored"}
    assert stored.keys() == {"master", "exp_avg", "exp_avg_sq", "step", "rng"}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert stored[kind] == ["0.211", "MB", kind, "of", "52,640", "elements"], "fp32"
    assert "torch" in rows["versions"]
    assert "2 ranks, 6 blocks, coverage 1/2" in found.report
    pictures = [line for line in found.report.splitlines() if line.startswith("rank ")]
    assert len(pictures) == 2
    files = {line[-1]: line[1] for line in lines if line[0] == "file"}
    for name, size in files.items():
        assert float(size) == pytest.approx((folder / name).stat().st_size / 1e6, abs=1e-3)
    assert {"rank-00000.safetensors", "rank-00001.safetensors", "state.json"} == files.keys()
    assert f"3 files; {len(parameters)} parameters" in found.report


def test_before_the_first_step_there_are_no_moments(saved: Path) -> None:
    found = inspect_checkpoint(find_checkpoint(saved / "start"))
    assert found.problems == []
    assert "exp_avg" not in found.report


def flip(folder: Path) -> None:
    content = bytearray((folder / "rank-00001.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "rank-00001.safetensors").write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def forget_a_file(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["rank-00001.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resealed(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a file's tensors, and whatever says that it was changed."""
    file = folder / "rank-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal(manifest)}))


def lose_a_moment(folder: Path) -> None:
    def change(tensors: dict) -> None:
        key = next(k for k in tensors if k.startswith("exp_avg_sq|model.layers.5.mlp.up_proj"))
        del tensors[key]

    resealed(folder, change)


def store_twice(folder: Path) -> None:
    other = load_file(folder / "rank-00000.safetensors")
    key = next(k for k in other if k.startswith("master|model.embed_tokens"))
    resealed(folder, lambda tensors: tensors.update({key: other[key]}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "rank-00001.safetensors: has another SHA-256 than what was saved; take another"),
    (cut, "rank-00001.safetensors: has 100 bytes, "),
    (lambda folder: (folder / "state.json").unlink(), "state.json: cannot be read: No such file"),
    (lambda folder: (folder / "state.json").write_text("{}"), "state.json: has 2 bytes, "),
    (cut_manifest, "manifest.json: "),
    (lambda folder: shutil.rmtree(folder), "manifest.json: not there; name a folder that"),
    (forget_a_file, "manifest.json: not the file that was saved (another SHA-256)"),
    (lose_a_moment, "exp_avg_sq of model.layers.5.mlp.up_proj.weight: elements "),
    (store_twice, "master of model.embed_tokens.weight: elements 0 to "),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damage_is_one_line(
    damage: Callable[[Path], None], words: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(find_checkpoint(saved / "trained"), tmp_path / "checkpoint")
    damage(folder)
    (problem,) = inspect_checkpoint(folder).problems
    assert problem.startswith(str(folder))
    assert words in problem
    assert "\n" not in problem


def test_every_damaged_file_is_named(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(find_checkpoint(saved / "trained"), tmp_path / "checkpoint")
    flip(folder)
    (folder / "state.json").unlink()
    assert len(inspect_checkpoint(folder).problems) == 2
