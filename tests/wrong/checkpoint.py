"""Checkpoints that are wrong: of training, and to start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sdp_llm.checkpoint.convert import export_checkpoint
from sdp_llm.checkpoint.save import seal
from sdp_llm.config import load_config
from sdp_llm.training.checkpoints import check_space
from tests.integration.conftest import MODEL
from tests.wrong.scene import Scene, Wrong, changes_of, check, copied, read_checkpoint, run


def damaged(name: str, damage: Callable[[Path], object], *words: str) -> Wrong:
    """A copy of a whole checkpoint, in which something is not as it was."""

    def provoke(scene: Scene) -> None:
        folder = copied(scene, "checkpoint", "damaged")
        damage(folder)
        read_checkpoint(folder)

    return Wrong("checkpoint", name, provoke, words)


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who knows how it is sealed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal(manifest)}))


def started(name: str, make: Callable[[Path], object], *words: str) -> Wrong:
    """A folder to start from, ``model.init_from``."""

    def provoke(scene: Scene) -> None:
        folder = scene.folder / "start"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        check(scene.tiny.config, changes_of((f"model.init_from={folder}",), scene), world_size=2)

    return Wrong("checkpoint", name, provoke, ('model.init_from = "{folder}/start"', *words))


def exported(name: str, act: Callable[[Scene], object], *words: str) -> Wrong:
    return Wrong("checkpoint", name, act, words)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def too_large(scene: Scene) -> None:
    check_space(load_config(scene.tiny.config), scene.folder / "run", 10**18, 0, 6)


CASES = [
    exported(
        "missing",
        lambda s: read_checkpoint(s.folder / "none"),
        "{folder}/none/manifest.json: not there",
        "name a folder",
    ),
    exported(
        "a file instead of a folder", lambda s: read_checkpoint(s.folder / "file"), "{folder}/file"
    ),
    exported(
        "a folder without one",
        lambda s: read_checkpoint(s.folder / "empty"),
        "manifest.json: not there",
    ),
    damaged(
        "a file is missing",
        lambda f: (f / "rank-00000.safetensors").unlink(),
        "rank-00000.safetensors",
        "take another checkpoint",
    ),
    damaged(
        "a file was cut",
        lambda f: (f / "rank-00000.safetensors").write_bytes(b"cut"),
        "rank-00000.safetensors",
        "take another checkpoint",
    ),
    damaged(
        "a bit was flipped",
        lambda f: flip(f / "rank-00000.safetensors", -5),
        "not the file that was saved",
        "take another checkpoint",
    ),
    damaged(
        "the manifest was edited",
        lambda f: flip(f / "manifest.json", 30),
        "manifest.json",
        "take another checkpoint",
    ),
    damaged(
        "the manifest is no JSON",
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json",
        "take another checkpoint",
    ),
    damaged(
        "the manifest is a list",
        lambda f: (f / "manifest.json").write_text("[]"),
        "manifest.json: not a JSON object",
    ),
    damaged(
        "the manifest is nested",
        lambda f: (f / "manifest.json").write_text("[" * 10**5),
        "manifest.json",
    ),
    damaged("the state is missing", lambda f: (f / "state.json").unlink(), "state.json: not there"),
    damaged(
        "the state was edited",
        lambda f: (f / "state.json").write_text("{}"),
        "state.json",
        "take another checkpoint",
    ),
    damaged(
        "a later format",
        lambda f: resealed(f, lambda m: m.update(format_version=2)),
        "format version 2",
        "load it with the version that wrote it",
    ),
    damaged(
        "no format", lambda f: resealed(f, lambda m: m.pop("format_version")), "format version None"
    ),
    damaged("no files", lambda f: resealed(f, lambda m: m.pop("files")), "does not describe files"),
    damaged(
        "a path out of the folder",
        lambda f: resealed(
            f,
            lambda m: m["files"].update(
                {"../../x.safetensors": m["files"]["rank-00000.safetensors"]}
            ),
        ),
        "does not describe files",
    ),
    damaged(
        "a parameter is missing",
        lambda f: resealed(f, lambda m: m["parameters"].update({"extra.weight": [3]})),
        "extra.weight",
        "are missing",
    ),
    damaged(
        "latest names a path",
        lambda f: (f / "latest").write_text("../../x"),
        "latest: names no folder beside it",
    ),
    damaged(
        "latest names what is gone",
        lambda f: (f / "latest").write_text("step-9"),
        "step-9/manifest.json: not there",
    ),
    exported(
        "of another model",
        lambda s: export_checkpoint(
            s.folder / "checkpoint",
            s.folder / "out",
            config=LlamaConfig(**{**MODEL, "num_hidden_layers": 3}),
        ),
        "model.layers.3",
        "give the config it was trained with",
    ),
    exported(
        "exported over a folder",
        lambda s: export_checkpoint(s.folder / "checkpoint", s.folder / "empty"),
        "--output {folder}/empty: exists",
        "name a new folder",
    ),
    exported(
        "exported below a file",
        lambda s: export_checkpoint(s.folder / "checkpoint", s.folder / "file" / "x"),
        "cannot read or write",
    ),
    exported(
        "exported with no tokenizer",
        lambda s: export_checkpoint(
            s.folder / "checkpoint", s.folder / "out", tokenizer=s.folder / "empty"
        ),
        "--tokenizer {folder}/empty: has no tokenizer",
        "name the folder of one",
    ),
    exported("larger than the disk", too_large, "training.keep_last = 2", "GB free", "make room"),
    run(
        "checkpoint",
        "nothing to start from",
        ("model.init_from={folder}/none",),
        'model.init_from = "{folder}/none"',
        "no such folder",
        "hf download",
    ),
    run(
        "checkpoint",
        "another model to start from",
        ("model.init_from={folder}/other",),
        'model.init_from = "{folder}/other"',
        "is missing (",
        "set model.config to",
    ),
    run(
        "checkpoint",
        "a training checkpoint to start from",
        ("model.init_from={folder}/checkpoint",),
        "a training checkpoint, not a HuggingFace one",
        "launch/export.py",
    ),
    started(
        "a pickle to start from",
        lambda f: torch.save({}, f / "pytorch_model.bin"),
        "has pytorch_model.bin and no safetensors",
        "save_pretrained",
    ),
    started(
        "garbage to start from",
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.safetensors cannot be read",
        "download it again",
    ),
    started(
        "other shapes to start from",
        lambda f: save_file({"lm_head.weight": torch.zeros(3, 3)}, f / "model.safetensors"),
        "is missing (",
        "set model.config",
    ),
    started(
        "an index of a missing file",
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "b.safetensors"}}'
        ),
        "b.safetensors is missing",
        "download it again",
    ),
    started(
        "an index of numbers",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
        "is not an index of safetensors",
    ),
    started(
        "an index that leads elsewhere",
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
        "no safetensors file beside it",
    ),
    run(
        "checkpoint",
        "a run in run_dir",
        ("training.run_dir={folder}/held",),
        'training.run_dir = "{folder}/held"',
        "holds a run already",
        "choose another folder",
    ),
    run(
        "checkpoint",
        "run_dir is a file",
        ("training.run_dir={folder}/file",),
        'training.run_dir = "{folder}/file"',
        "cannot write",
        "name a folder that can be",
    ),
    run(
        "checkpoint",
        "run_dir below a file",
        ("training.run_dir={folder}/file/run",),
        'training.run_dir = "{folder}/file/run"',
        "cannot write",
        "name a folder that can be",
    ),
    run(
        "checkpoint",
        "run_dir where nothing can be made",
        ("training.run_dir=/proc/run",),
        'training.run_dir = "/proc/run"',
        "cannot write",
        "name a folder that can be",
    ),
]
