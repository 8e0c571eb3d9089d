"""Tokenizers that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from data_prep._tokenizer import load_tokenizer
from tests.integration.conftest import VOCABULARY
from tests.wrong.scene import Scene, Wrong, changes_of, check, run

MAKE = "make one with python data_prep/train_tokenizer.py"


def made(name: str, make: Callable[[Scene, Path], object], *words: str) -> Wrong:
    """A folder in which ``make`` puts files."""

    def provoke(scene: Scene) -> None:
        folder = scene.folder / "tokenizers" / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        make(scene, folder)
        overrides = changes_of((f"data.tokenizer={folder}",), scene)
        check(scene.tiny.config, overrides, world_size=2)

    where = "{folder}/tokenizers/" + name.replace(" ", "_")
    return Wrong("tokenizer", name, provoke, (f'data.tokenizer = "{where}"', *words))


def changed(scene: Scene, folder: Path, file: str, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """The tiny tokenizer with a change in one of its JSON files."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((scene.tiny.tokenizer / name).read_text())
        if name == file:
            change(content)
        (folder / name).write_text(json.dumps(content))


def prepared(name: str, make: Callable[[Scene, Path], object], *words: str) -> Wrong:
    """What ``data_prep`` is given."""

    def provoke(scene: Scene) -> None:
        folder = scene.folder / "prepared" / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        make(scene, folder)
        load_tokenizer(folder)

    return Wrong("tokenizer", name, provoke, words)


CASES = [
    run(
        "tokenizer",
        "missing",
        ("data.tokenizer={folder}/none",),
        *('data.tokenizer = "{folder}/none"', "no such folder", MAKE),
    ),
    run(
        "tokenizer",
        "a file instead of a folder",
        ("data.tokenizer={tiny}/tokenizer/tokenizer.json",),
        *('/tokenizer.json"', "no such folder", MAKE),
    ),
    run(
        "tokenizer",
        "folder without one",
        ("data.tokenizer={folder}/empty",),
        *('data.tokenizer = "{folder}/empty"', "not a tokenizer", MAKE),
    ),
    run(
        "tokenizer",
        "damaged",
        ("data.tokenizer={folder}/damaged_tokenizer",),
        *('damaged_tokenizer"', "not a tokenizer", MAKE),
    ),
    run(
        "tokenizer",
        "of another corpus",
        ("data.tokenizer={folder}/other_tokenizer",),
        *('other_tokenizer": its tokenizer.json has SHA-256', "data.train = ", "name the tokeni"),
    ),
    run(
        "tokenizer",
        "larger than the vocabulary",
        (
            "model.config={folder}/small",
            "data.train={folder}/low",
            "data.validation=null",
        ),
        *('data.tokenizer = "', f"{VOCABULARY} ids", "vocab_size = 300", f"at least {VOCABULARY}"),
    ),
    made(
        "of an unknown kind",
        lambda scene, folder: changed(
            scene, folder, "tokenizer.json", lambda c: c["model"].update(type="BBPE")
        ),
        *("not a tokenizer", MAKE),
    ),
    made(
        "with a gap in its ids",
        lambda scene, folder: changed(
            scene, folder, "tokenizer.json", lambda c: c["model"]["vocab"].update(zzz=999)
        ),
        *("ids",),
    ),
    made(
        "that is a list",
        lambda _, folder: [
            (folder / n).write_text("[]") for n in ("tokenizer.json", "tokenizer_config.json")
        ],
        *("not a tokenizer", MAKE),
    ),
    made(
        "of sentencepiece garbage",
        lambda _, folder: (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff garbage"),
        *("not a tokenizer", MAKE),
    ),
    made(
        "with code of its own",
        lambda scene, folder: changed(
            scene,
            folder,
            "tokenizer_config.json",
            lambda c: c.update(
                tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}
            ),
        ),
        *("data.tokenizer",),
    ),
    prepared(
        "tokenizer.model alone",
        lambda _, folder: (folder / "tokenizer.model").write_bytes(b"x"),
        *("--tokenizer {folder}/prepared", "has tokenizer.model but no tokenizer.json", "convert"),
    ),
    prepared(
        "nothing to prepare with",
        lambda scene, folder: None,
        *("--tokenizer {folder}/prepared", "not a tokenizer", "train_tokenizer.py"),
    ),
]
