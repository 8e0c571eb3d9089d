"""Which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

from sdp_llm.checkpoint.save import LATEST
from sdp_llm.errors import DamagedCheckpoint


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the latest one of a folder of them or of a run folder."""
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / named_by(folder / LATEST)
    return path


def named_by(latest: Path) -> str:
    """The name of the checkpoint that the file ``latest`` beside it names.

    :raises DamagedCheckpoint: it names none, or a path to somewhere else.
    """
    try:
        name = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{latest}: {error}; name the folder of a step") from error
    if not is_plain_name(name):
        raise DamagedCheckpoint(f"{latest}: names no folder beside it; name the folder of a step")
    return name


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file or folder, and no path that leads elsewhere."""
    return name != "" and name.isprintable() and Path(name).name == name and name != ".."
