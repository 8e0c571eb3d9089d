"""Which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

from sdp_llm.checkpoint.save import LATEST


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the latest one of a folder of them or of a run folder."""
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    return path
