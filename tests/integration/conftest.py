"""A tiny model, tokenizer, corpus and run config, and how the commands are run on them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep import tokenize_fineweb, train_tokenizer
from tests.conftest import ROOT
from tests.integration.corpora import texts, write_jsonl

VOCABULARY = 320
POSITIONS = 64
SEQUENCE = 32
BLOCKS = 4
STEPS = 6
EVAL_EVERY = 3
EVAL_SAMPLES = 33  # odd: the ranks' shares differ

LINE = "the model reads a long text and learns which word comes next in many small steps"

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Tiny:
    """A folder with all that a run reads.

    ``config`` is a run config for two ranks: forward masking, coverage 1/2, the ends pinned.
    """

    folder: Path
    model: Path
    tokenizer: Path
    corpus: Path
    config: Path


def make_tiny(folder: Path) -> Tiny:
    """Write the files; ``folder`` exists."""
    made = Tiny(
        folder,
        model=folder / "model" / "config.json",
        tokenizer=folder / "tokenizer",
        corpus=folder / "corpus",
        config=folder / "run.json",
    )
    words = LINE.split()
    documents = [" ".join(words[(i + k * k) % len(words)] for k in range(40)) for i in range(300)]
    source = folder / "text.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"{t} {i}."}) + "\n" for i, t in enumerate(documents))
    )
    options = ["--input", str(source), "--vocab_size", str(VOCABULARY)]
    assert train_tokenizer.main([*options, "--output", str(made.tokenizer)]) == 0
    options = ["--source", str(source), "--tokenizer", str(made.tokenizer), "--workers", "1"]
    options += ["--validation_fraction", "0.2", "--output", str(made.corpus)]
    assert tokenize_fineweb.main(options) == 0
    made.model.parent.mkdir()
    made.model.write_text(json.dumps(MODEL))
    made.config.write_text(json.dumps(run_config(made)))
    return made


def run_config(tiny: Tiny) -> dict[str, Any]:
    """What ``tiny.config`` holds."""
    return {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": 2},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "steps_per_print": 1,
        "sdp": {"masking": "forward", "coverage": "1/2"},
        "model": {"config": str(tiny.model)},
        "data": {
            "train": f"{tiny.corpus}/train_text_document",
            "validation": f"{tiny.corpus}/validation_text_document",
            "tokenizer": str(tiny.tokenizer),
            "sequence_length": SEQUENCE,
        },
        "training": {
            "steps": STEPS,
            "run_dir": str(tiny.folder / "runs" / "default"),
            "eval_interval": EVAL_EVERY,
            "eval_samples": EVAL_SAMPLES,
        },
    }


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces for the texts of `corpora.texts`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(folder / "text.jsonl", texts(300))
    arguments = ["--input", str(source), "--vocab_size", "400", "--output", str(folder / "t")]
    assert train_tokenizer.main(arguments) == 0
    return folder / "t"


# -- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A command that ended by itself."""

    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Everything that it printed, for the message of a failing assertion."""
        return f"{' '.join(self.command)}\nstatus {self.status}\n{self.stdout}\n{self.stderr}"

    def error_lines(self, command: str = "pretrain") -> list[str]:
        return [x for x in self.stderr.splitlines() if x.startswith(f"{command}: error:")]


@dataclass(frozen=True)
class Run:
    """A training command and the folder it wrote."""

    finished: Finished
    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """The objects in metrics.jsonl."""
        assert self.finished.status == 0, self.finished.output
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        """The training loss of every log line."""
        return [entry["loss"] for entry in self.metrics() if "loss" in entry]

    def validation(self) -> list[float]:
        """The whole model's loss, each time it was measured."""
        return [e["validation/loss"] for e in self.metrics() if "validation/loss" in e]


def execute(*command: str | Path, timeout: float = 300, cwd: Path = ROOT) -> Finished:
    """Run a command on the CPU; one that does not end in ``timeout`` seconds fails the test."""
    texts = tuple(str(part) for part in command)
    environment = command_environment()
    process = subprocess.Popen(
        texts, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Launchers leave their ranks behind, which keep the pipes open.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"{' '.join(texts)}: no end after {timeout} s\n{stdout}\n{stderr}")
    return Finished(texts, process.returncode, stdout, stderr)


def command_environment() -> dict[str, str]:
    """The environment of a command on the CPU."""
    environment = {k: v for k, v in os.environ.items() if not re.fullmatch(_LAUNCHED, k)}
    return environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


# What launchers tell their ranks; a test's command is started by none.
_LAUNCHED = "RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"


def two_at_a_time(commands: Sequence[Sequence[str | Path]], timeout: float = 300) -> list[Finished]:
    """Run commands that do not depend on each other; most of their time is imports."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda command: execute(*command, timeout=timeout), commands))


def python(script: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, script, *arguments]


def script(name: str) -> str:
    """A command that a package installs beside the interpreter."""
    return str(Path(sys.executable).with_name(name))


def with_deepspeed(*arguments: str | Path, ranks: int = 2) -> list[str | Path]:
    """The main job under DeepSpeed's launcher."""
    ports = ["--master_port", str(free_port())]
    launcher = [script("deepspeed"), "--num_accelerators", str(ranks), *ports]
    return [*launcher, "launch/pretrain.py", "--deepspeed_config", *arguments]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
