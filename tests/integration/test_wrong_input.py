"""Wrong input is one clear line, and a status that is not 0, on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdp_llm.config import load_config
from sdp_llm.data import IndexedDatasetWriter
from sdp_llm.errors import ConfigError
from sdp_llm.training.inputs import load_inputs
from sdp_llm.training.run_folder import RunFolder
from tests.integration.conftest import (
    MODEL,
    POSITIONS,
    VOCABULARY,
    Finished,
    Tiny,
    execute,
    python,
    two_at_a_time,
    with_deepspeed,
)


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong.

    ``overrides`` and ``words`` (the parts of the message: what, which value, what to do) name the
    files of the test as {folder}; ``config`` is a file in it, otherwise the tiny run's.
    """

    name: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    config: str | None = None

    def __str__(self) -> str:
        return self.name


CORRUPT_JSON = Wrong(
    "corrupt JSON",
    (),
    ("{folder}/corrupt.json", "not valid JSON at line 2, column 1", "delimiter"),
    "corrupt.json",
)
UNKNOWN_KEY = Wrong(
    "unknown key",
    (),
    ("sdp.covrage: unknown key", "did you mean sdp.coverage?"),
    "unknown_key.json",
)
MISSING_CORPUS = Wrong(
    "missing corpus",
    ("data.train={folder}/none",),
    ('data.train = "{folder}/none"', "none.bin: no such file", "make the corpus again with"),
)
FOREIGN_OWNER_SETS = Wrong(
    "owner sets of another world size",
    ("sdp.coverage=null", "sdp.owner_sets=[[0,1],[0,2],[1],[0,1]]"),
    ("sdp.owner_sets[1] = [0, 2]", "contradicts the world size 2", "start as many ranks"),
)
LARGE_TOKENIZER = Wrong(
    "tokenizer larger than the vocabulary",
    ("model.config={folder}/small.json", "data.train={folder}/low", "data.validation=null"),
    ('data.tokenizer = "', f"{VOCABULARY} ids", "vocab_size = 300", f"at least {VOCABULARY}"),
)
NO_PERMISSION = Wrong(
    "run_dir below a file",
    ("training.run_dir={folder}/file/run",),
    ('training.run_dir = "{folder}/file/run"', "cannot write", "name a folder that can be"),
)

LAUNCHED = [
    CORRUPT_JSON,
    FOREIGN_OWNER_SETS,
    UNKNOWN_KEY,
    MISSING_CORPUS,
    LARGE_TOKENIZER,
    NO_PERMISSION,
]

WRONG = [
    *LAUNCHED,
    Wrong(
        "config file is missing",
        (),
        ("{folder}/none.json: no such config file", "check the path"),
        "none.json",
    ),
    Wrong(
        "ids larger than the vocabulary",
        ("model.config={folder}/small.json",),
        ('data.train = "', "has token id", "vocab_size = 300", "use the tokenizer"),
    ),
    Wrong(
        "validation ids larger than the vocabulary",
        ("model.config={folder}/small.json", "data.train={folder}/low"),
        ('data.validation = "', "has token id", "vocab_size = 300", "use the tokenizer"),
    ),
    Wrong(
        "missing validation corpus",
        ("data.validation={folder}/none",),
        ('data.validation = "{folder}/none"', "no such file", "make the corpus again with"),
    ),
    Wrong(
        "damaged corpus",
        ("data.train={folder}/damaged",),
        ('data.train = "{folder}/damaged"', "truncated", "make the corpus again with"),
    ),
    Wrong(
        "corpus of less than a batch",
        ("data.train={folder}/short",),
        ('data.train = "{folder}/short"', "one global batch of 8", "use a larger corpus"),
    ),
    Wrong(
        "corpus of less than its part of a batch",
        ('data.train={"{folder}/low": 1, "{folder}/less": 7}',),
        ("data.train: {folder}/less: 1 samples of 32 tokens", "7 of 8", "a smaller weight"),
    ),
    Wrong(
        "missing corpus in a blend",
        ('data.train={"{folder}/low": 1, "{folder}/none": 1}',),
        ('data.train["{folder}/none"]: {folder}/none.bin: no such file', "make the corpus again"),
    ),
    Wrong(
        "damaged corpus in a blend",
        ('data.train={"{folder}/damaged": 1, "{folder}/low": 1}',),
        ('data.train["{folder}/damaged"]: ', "truncated", "make the corpus again with"),
    ),
    Wrong(
        "ids larger than the vocabulary in a blend",
        ('data.train={"{folder}/low": 1, "{folder}/high": 1}',),
        ('data.train["{folder}/high"]: has token id 400', "vocab_size = 320"),
    ),
    Wrong(
        "weight of zero",
        ('data.train={"{folder}/low": 0}',),
        ('data.train["{folder}/low"] = 0: expected a weight > 0', "remove a corpus"),
    ),
    Wrong(
        "tokenizer of another corpus",
        ("data.tokenizer={folder}/other_tokenizer",),
        ('other_tokenizer": its tokenizer.json has SHA-256', "data.train = ", "name the tokenizer"),
    ),
    Wrong(
        "documents that end otherwise",
        ("data.train={folder}/low", "data.document_mask=true"),
        ("data.document_mask = true: document 0 of data.train", "id 2 of data.tokenizer"),
    ),
    Wrong(
        "attention that mixes documents",
        ("data.document_mask=true", "model.attn_implementation=flash_attention_2"),
        ("model.attn_implementation = 'flash_attention_2'", "use 'sdpa' or 'eager'"),
    ),
    Wrong(
        "corpus of less than a sample",
        ("data.validation={folder}/short", "data.sequence_length=64"),
        ('data.validation = "{folder}/short"', "50 tokens are less", "shorten the sequences"),
    ),
    Wrong(
        "sequences longer than the positions",
        (f"data.sequence_length={POSITIONS + 1}",),
        (f"data.sequence_length = {POSITIONS + 1}", "max_position_embeddings", "use at most 64"),
    ),
    Wrong(
        "coverage that no number of owners reaches",
        ("sdp.coverage=1/3",),
        ("sdp.coverage = 1/3", "world size 2", "use 1/2"),
    ),
    Wrong(
        "batch that the ranks cannot share",
        ("train_batch_size=9",),
        ("train_batch_size = 9", "world size 2", "such as 8 or 12"),
    ),
    Wrong(
        "missing tokenizer",
        ("data.tokenizer={folder}/none",),
        ('data.tokenizer = "{folder}/none"', "no such folder", "train_tokenizer.py"),
    ),
    Wrong(
        "folder without a tokenizer",
        ("data.tokenizer={folder}",),
        ('data.tokenizer = "{folder}"', "not a tokenizer", "train_tokenizer.py"),
    ),
    Wrong(
        "damaged tokenizer",
        ("data.tokenizer={folder}/damaged_tokenizer",),
        ('damaged_tokenizer"', "not a tokenizer", "train_tokenizer.py"),
    ),
    Wrong(
        "missing model config",
        ("model.config={folder}/none.json",),
        ("model.config = '{folder}/none.json'", "no such file", "give a HuggingFace config"),
    ),
    Wrong(
        "unknown model_type",
        ("model.config={folder}/foreign.json",),
        ("model.config = '{folder}/foreign.json'", "`llamma`", "version of Transformers"),
    ),
    Wrong(
        "missing checkpoint to start from",
        ("model.init_from={folder}/none",),
        ('model.init_from = "{folder}/none"', "no such folder", "hf download"),
    ),
    Wrong(
        "neither a model config nor a checkpoint",
        ("model.config=null",),
        ("model.config: missing", "name a HuggingFace config.json", "model.init_from"),
    ),
    Wrong(
        "checkpoint of another model",
        ("model.init_from={folder}/other",),
        ('model.init_from = "{folder}/other"', "is missing (", "set model.config to"),
    ),
    Wrong(
        "a run in run_dir",
        ("training.run_dir={folder}/held",),
        ('training.run_dir = "{folder}/held"', "holds a run already", "choose another folder"),
    ),
    Wrong(
        "--set with a typo in the section",
        ("trainin.steps=5",),
        ("trainin: unknown key", "did you mean training?"),
    ),
    Wrong(
        "--set with a typo in the key",
        ("training.step=5",),
        ("training.step: unknown key", "did you mean training.steps?"),
    ),
    Wrong(
        "--set with a wrong type",
        ("training.steps=many",),
        ('training.steps = "many"', "expected a positive integer"),
    ),
    Wrong(
        "--set without a value",
        ("training.steps",),
        ("--set training.steps", "expected KEY=VALUE", "such as training.steps=100"),
    ),
    Wrong(
        "optimizer that is not element-wise",
        ("optimizer.type=Lamb",),
        ('optimizer.type = "Lamb"', "only element-wise optimizers", "use one of Adam"),
    ),
    Wrong(
        "ZeRO stage 3",
        ("zero_optimization.stage=3",),
        ("zero_optimization.stage = 3", "not supported together with SDP", "use 2"),
    ),
    Wrong(
        "fp16",
        ("fp16.enabled=true",),
        ("fp16: valid in DeepSpeed but not supported together with SDP", "use bf16"),
    ),
    Wrong(
        "two budgets",
        ("training.tokens=1000",),
        ("training.steps and training.tokens", "exactly one", "set the others to null"),
    ),
    Wrong(
        "no budget",
        ("training.steps=null",),
        ("training: exactly one of steps, tokens", "add for example training.steps"),
    ),
    Wrong(
        "no model section",
        ("model=null",),
        ("model: missing in the config file", "add them as in"),
    ),
]


def write_corpus(prefix: Path, length: int, largest: int) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([i % (largest + 1) for i in range(length)])


@pytest.fixture(scope="session")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wrong files; every case but the one with a run can be tried again and again."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "corrupt.json").write_text('{"sdp": {"coverage": "1/2"}\n"model": {}}')
    config = json.loads(tiny.config.read_text())
    config["sdp"] = {"covrage": "1/2"}
    (folder / "unknown_key.json").write_text(json.dumps(config))
    (folder / "small.json").write_text(json.dumps({**MODEL, "vocab_size": 300}))
    (folder / "foreign.json").write_text(json.dumps({**MODEL, "model_type": "llamma"}))
    (folder / "damaged_tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny.tokenizer / name).read_text()
        (folder / "damaged_tokenizer" / name).write_text(text[:200])
    (folder / "other_tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny.tokenizer / name).read_text()
        (folder / "other_tokenizer" / name).write_text(text + "\n")
    write_corpus(folder / "low", 1000, largest=299)
    write_corpus(folder / "short", 50, largest=299)
    write_corpus(folder / "less", 50, largest=299)
    write_corpus(folder / "high", 1000, largest=400)
    write_corpus(folder / "damaged", 1000, largest=299)
    (folder / "damaged.bin").write_bytes(b"cut")
    (folder / "other").mkdir()
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "other" / "model.safetensors")
    (folder / "file").write_text("")
    (folder / "held").mkdir()
    (folder / "held" / "metrics.jsonl").touch()
    return folder


def located(wrong: Wrong, tiny: Tiny, folder: Path) -> tuple[Path, list[str], list[str]]:
    """Config file, overrides and expected words, with the paths filled in."""
    config = folder / wrong.config if wrong.config else tiny.config
    overrides, words = ([w.replace("{folder}", str(folder)) for w in ws]
                        for ws in (wrong.overrides, wrong.words))  # fmt: skip
    has_run_dir = any(text.startswith("training.run_dir=") for text in overrides)
    if wrong.config is None and not has_run_dir:
        overrides.append(f"training.run_dir={folder / 'never'}")
    return config, overrides, words


def check(config: Path, overrides: list[str], world_size: int) -> None:
    """What pretraining checks before it builds anything."""
    run = load_config(config, overrides)
    RunFolder(run, load_inputs(run, world_size).schedule, is_writer=True).begin()


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_message(wrong: Wrong, tiny: Tiny, folder: Path) -> None:
    config, overrides, words = located(wrong, tiny, folder)
    with pytest.raises(ConfigError) as caught:
        check(config, overrides, world_size=2)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (folder / "never").exists()


def test_what_is_right_passes(tiny: Tiny, tmp_path: Path) -> None:
    check(tiny.config, [f"training.run_dir={tmp_path / 'run'}"], world_size=2)
    assert (tmp_path / "run" / "config.json").exists()


# -- through the launcher -------------------------------------------------------------------------


def check_launched(cases: Sequence[Wrong], tiny: Tiny, folder: Path) -> None:
    """Start each case on two ranks."""
    commands = []
    for wrong in cases:
        config, overrides, _ = located(wrong, tiny, folder)
        flags = ["--set", *overrides] if overrides else []
        commands.append(with_deepspeed(config, *flags))
    for wrong, done in zip(cases, two_at_a_time(commands, timeout=90), strict=True):
        check_said(located(wrong, tiny, folder)[2], done)
    assert not (folder / "never").exists()


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


def test_every_rank_says_it_once(tiny: Tiny, folder: Path) -> None:
    check_launched(LAUNCHED[:2], tiny, folder)


@pytest.mark.slow
def test_more_that_every_rank_says_once(tiny: Tiny, folder: Path) -> None:
    check_launched(LAUNCHED[2:], tiny, folder)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["launch/generate.py", "--model", "nowhere", "--prompt", "a"],
            "generate: error: --model nowhere: has no config.json; name an exported model",
        ),
        (
            ["launch/evaluate.py", "--deepspeed_config", "{config}", "--model", "nowhere"],
            "evaluate: error: --model nowhere: has no config.json; name an exported model",
        ),
        (
            ["launch/simulate.py", "--deepspeed_config", "{config}", "--world_size", "0"],
            "simulate: error: --world_size 0: must be at least 1",
        ),
    ],
)
def test_the_other_commands(command: list[str], line: str, tiny: Tiny) -> None:
    script, *arguments = (part.replace("{config}", str(tiny.config)) for part in command)
    done = execute(*python(script, *arguments))
    assert (done.status, done.stdout, done.stderr) == (2, "", line + "\n")
