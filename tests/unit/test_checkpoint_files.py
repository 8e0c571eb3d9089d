"""The files of a checkpoint: written in pieces, read by safetensors, covering all exactly once."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdp_llm.checkpoint import shared_folder
from sdp_llm.checkpoint.coverage import coverage_error, stored_ranges, tensor_key
from sdp_llm.checkpoint.shared_folder import WrittenFile, write_together, written
from sdp_llm.checkpoint.stream import read_header, write_tensors
from sdp_llm.errors import ConfigError
from sdp_llm.training.checkpoints import clear_rubbish

PARAMETERS = {"a": [2, 3], "b": [4]}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tensors = {
        "view": whole[3:9],
        "matrix": torch.randn(3, 5, dtype=torch.bfloat16),
        "transposed": torch.randn(2, 7).t(),
        "scalar": torch.tensor(7.0),
        "counter": torch.arange(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    file = write_tensors(tmp_path / "x.safetensors", list(tensors.items()))
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (file.name, file.size) == ("x.safetensors", len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() == read_header(tmp_path / "x.safetensors").keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_writing_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Not even of one tensor where it lies on the CPU in one piece."""
    whole = torch.zeros(4_000_000)
    tracemalloc.start()
    before = _resident()
    write_tensors(tmp_path / "x.safetensors", [(str(i), whole[i::1]) for i in range(8)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert _resident() - before < 4_000_000


def _resident() -> int:
    """Bytes that this process had at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keys(*ranges: tuple[str, str, int, int]) -> list[tuple[str, str]]:
    return [(f"file{i}", tensor_key(*parts)) for i, parts in enumerate(ranges)]


MASTERS = [("master", "a", 0, 6), ("master", "b", 0, 3), ("master", "b", 3, 4)]


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ([], None),
        ([("rng", "0", 0, 99), ("cuda_rng", "0", 0, 16)], None),
        ([("m", "a", 3, 6), ("m", "b", 0, 4), ("m", "a", 0, 3)], None),
        ([("m", "a", 4, 6), ("m", "b", 0, 4)], "m of a: elements 0 to 4 of 6 are missing"),
        ([("m", "a", 0, 6)], "m of b: elements 0 to 4 of 4 are missing"),
        (
            [("m", "a", 0, 2), ("m", "a", 3, 6), ("m", "b", 0, 4)],
            "m of a: elements 2 to 3 of 6 are missing",
        ),
        (
            [("m", "a", 0, 4), ("m", "a", 2, 6), ("m", "b", 0, 4)],
            "m of a: elements 2 to 4 are stored twice (file4)",
        ),
        ([("master", "b", 0, 4)], "master of b: elements 0 to 3 are stored twice"),
        ([("master", "c", 0, 4)], "master of c: not a parameter of the model"),
        ([("m", "a", 0, 7), ("m", "b", 0, 4)], "m of a: stored up to element 7, but it has 6"),
    ],
)
def test_what_is_missing_or_doubled(
    extra: list[tuple[str, str, int, int]], problem: str | None
) -> None:
    found = coverage_error(stored_ranges(keys(*MASTERS, *extra)), PARAMETERS)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(problem)


def test_problems_are_counted() -> None:
    found = coverage_error(stored_ranges(keys(*MASTERS[1:2])), PARAMETERS)
    assert found == "master of a: elements 0 to 6 of 6 are missing (and 1 more of this kind)"


def is_x(name: str) -> bool:
    return name == "x"


def write(text: str, folder: Path) -> None:
    def files(partial: Path) -> list:  # type: ignore[type-arg]
        (partial / "x").write_text(text)
        return [written(partial / "x")]

    write_together(folder, files, lambda partial, files: None, is_x)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_its_name_and_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(shared_folder, "_exchange", lambda first, second: False)
    for text in ("new", "replaces the first"):
        made = []

        def write(partial: Path, text: str = text, made: list[int] = made) -> list[WrittenFile]:
            made.append(partial.stat().st_ino)
            (partial / "file").write_text(text)
            return [written(partial / "file")]

        write_together(tmp_path / "folder", write, lambda partial, files: None, lambda name: True)
        # A copy, which others could see half done, would be another folder.
        assert [(tmp_path / "folder").stat().st_ino] == made
        assert (tmp_path / "folder" / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write("old", tmp_path / "folder")

    def fail(partial: Path) -> list:  # type: ignore[type-arg]
        (partial / "x").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        ConfigError, match=r"rank 0: cannot read or write: .*No space left on device"
    ):
        write_together(tmp_path / "folder", fail, lambda partial, files: None, is_x)
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class Killed(BaseException):
    """The end of a process, which nothing catches."""


def between_two_names(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Fail when the old folder has made way and the new one takes its name."""
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise error
        return rename(path, target)

    monkeypatch.setattr(shared_folder, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)


def test_a_name_that_cannot_be_taken_stays_the_old_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("old", tmp_path / "folder")
    between_two_names(monkeypatch, OSError(5, "Input/output error"))
    with pytest.raises(ConfigError, match="Input/output error"):
        write("new", tmp_path / "folder")
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("is_cleared", [True, False])
def test_after_a_crash_between_two_names_the_old_folder_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cleared: bool
) -> None:
    folder = tmp_path / "folder"
    write("old", folder)
    (folder / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        between_two_names(patch, Killed())
        with pytest.raises(Killed):
            write("new", folder)
    assert {path.name for path in tmp_path.iterdir()} == {".folder.partial", ".folder.replaced"}
    if is_cleared:
        clear_rubbish(tmp_path)
        assert (folder / "x").read_text() == "old"
    else:
        write("newer", folder)
        assert (folder / "x").read_text() == "newer"
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("can_link", [True, False])
def test_other_files_of_the_folder_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not can_link:
        monkeypatch.setattr(os, "link", fail)
    folder = tmp_path / "folder"
    write("old", folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "step" / "inside").mkdir(parents=True)
    (folder / "step" / "inside" / "state.json").write_text("state")
    (folder / "latest").symlink_to("step")
    write("new", folder)
    assert (folder / "x").read_text() == "new"
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "latest" / "inside" / "state.json").read_text() == "state"
    assert (folder / "latest").is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "notes.txt", "step", "x"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_working_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the working directory, .*; name a folder inside it"):
        write("new", Path("."))
    write("new", Path("folder"))
    assert (tmp_path / "folder" / "x").read_text() == "new"
