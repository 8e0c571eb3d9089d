"""The files that are wrong, or nearly right, and what looks at them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.checkpoint.load import CheckpointReader
from sdp_llm.config import load_config
from sdp_llm.data import IndexedDatasetWriter
from sdp_llm.training.inputs import load_inputs
from sdp_llm.training.run_folder import RunFolder
from tests.integration.conftest import MODEL, Tiny
from tests.integration.test_checkpoint_commands import write_checkpoint


@dataclass(frozen=True)
class Scene:
    """A tiny run that is right, and a folder of files that are not."""

    tiny: Tiny
    folder: Path

    def filled(self, text: str) -> str:
        """The text with the paths of this scene in the place of their names."""
        return text.replace("{folder}", str(self.folder)).replace("{tiny}", str(self.tiny.folder))


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong.

    ``provoke`` does what raises ConfigError; ``words`` are parts of the message: what is wrong,
    its value, the rule, the fix. Paths of the scene are written as {folder} and {tiny}.
    """

    category: str
    name: str
    provoke: Callable[[Scene], object]
    words: tuple[str, ...]
    overrides: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.category}: {self.name}"


def check(config: Path, overrides: list[str], world_size: int) -> None:
    """What pretraining checks before it builds anything."""
    run = load_config(config, overrides)
    RunFolder(run, load_inputs(run, world_size).schedule, is_writer=True).begin()


def run(category: str, name: str, overrides: tuple[str, ...], *words: str) -> Wrong:
    """A run of two ranks whose config is changed on the command line."""

    def provoke(scene: Scene) -> None:
        check(scene.tiny.config, changes_of(overrides, scene), world_size=2)

    return Wrong(category, name, provoke, words, overrides)


def changes_of(overrides: tuple[str, ...], scene: Scene) -> list[str]:
    """The overrides with paths, and a run folder that must never be made."""
    filled = [scene.filled(text) for text in overrides]
    if not any(text.startswith("training.run_dir=") for text in filled):
        filled.append(f"training.run_dir={scene.folder / 'never'}")
    return filled


def read_checkpoint(folder: Path) -> None:
    """What a run and ``inspect_checkpoint`` do with a checkpoint first."""
    with ExitStack() as stack:
        CheckpointReader(find_checkpoint(folder), stack).verify()


def write_corpus(prefix: Path, length: int, largest: int) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([i % (largest + 1) for i in range(length)])


def write_model(folder: Path, **changes: Any) -> None:
    """A folder with a config.json: the tiny model's, changed."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **changes}))


def write_scene(tiny: Tiny, folder: Path) -> Scene:
    """Write what several cases share; each damages a copy of its own."""
    write_model(folder / "small", vocab_size=300)
    (folder / "damaged_tokenizer").mkdir()
    (folder / "other_tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny.tokenizer / name).read_text()
        (folder / "damaged_tokenizer" / name).write_text(text[:200])
        (folder / "other_tokenizer" / name).write_text(text + "\n")
    write_corpus(folder / "low", 1000, largest=299)
    write_corpus(folder / "short", 50, largest=299)
    write_corpus(folder / "less", 50, largest=299)
    write_corpus(folder / "high", 1000, largest=400)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "held").mkdir()
    (folder / "held" / "metrics.jsonl").touch()
    (folder / "other").mkdir()
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "other" / "model.safetensors")
    write_checkpoint(folder / "checkpoint", LlamaConfig(**MODEL))
    return Scene(tiny, folder)


def copied(scene: Scene, name: str, to: str) -> Path:
    """A fresh copy of a folder of the scene, to be damaged."""
    target = scene.folder / to
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(scene.folder / name, target)
    return target


def copied_corpus(scene: Scene, to: str) -> Path:
    """A fresh copy of the corpus ``low``; its prefix."""
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{scene.folder / 'low'}{suffix}", f"{scene.folder / to}{suffix}")
    return scene.folder / to
