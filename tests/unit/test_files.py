"""Small files that are replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdp_llm import files


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    files.replace_text(path, "old")
    with path.open() as reader:
        files.replace_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    files.replace_text(path, "old")

    def fail(path: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="full"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
