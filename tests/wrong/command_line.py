"""Command lines that are wrong."""

from __future__ import annotations

import runpy
import sys

from tests.conftest import ROOT
from tests.wrong.scene import Scene, Wrong

PLAN = ("launch/plan.py", "--deepspeed_config", "{tiny}/run.json")
SIMULATE = ("launch/simulate.py", "--deepspeed_config", "{tiny}/run.json")
EVALUATE = ("launch/evaluate.py", "--deepspeed_config", "{tiny}/run.json")
PRETRAIN = ("launch/pretrain.py", "--deepspeed_config", "{tiny}/run.json")
GENERATE = ("launch/generate.py", "--prompt", "a")
TOKENIZE = ("data_prep/tokenize_fineweb.py", "--source", "{tiny}/text.jsonl")
TRAIN_TOKENIZER = ("data_prep/train_tokenizer.py", "--output", "{folder}/never")


def command(name: str, script: tuple[str, ...], arguments: tuple[str, ...], *words: str) -> Wrong:
    """A script, run in this process as ``__main__``."""

    def provoke(scene: Scene) -> None:
        file, *texts = (scene.filled(text) for text in (*script, *arguments))
        before = sys.argv
        sys.argv = [file, *texts]
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        finally:
            sys.argv = before

    return Wrong("command line", name, provoke, words)


CASES = [
    command("no config", ("launch/pretrain.py",), (), "required: --deepspeed_config", "--help"),
    command(
        "a config that is missing",
        ("launch/pretrain.py", "--deepspeed_config", "{folder}/none.json"),
        (),
        "{folder}/none.json: no such config file",
    ),
    command(
        "an argument nobody knows",
        PRETRAIN,
        ("--resum", "none"),
        "unrecognized arguments: --resum",
        "did you mean --resume?",
    ),
    command("an abbreviation", PRETRAIN, ("--res", "none"), "unrecognized arguments: --res"),
    command(
        "--set without a value",
        PRETRAIN,
        ("--set", "training.steps"),
        "--set training.steps",
        "expected KEY=VALUE",
    ),
    command("--set of nothing", PRETRAIN, ("--set",), "--set: expected at least one argument"),
    command("--set of no key", PRETRAIN, ("--set", "=5"), "--set =5", "expected KEY=VALUE"),
    command(
        "--set of a wrong type",
        PRETRAIN,
        ("--set", "training.steps=many"),
        'training.steps = "many"',
        "positive integer",
    ),
    command(
        "--set below a value",
        PRETRAIN,
        ("--set", "train_batch_size.x=1"),
        "train_batch_size.x: unknown key",
    ),
    command(
        "--set of a phase that is not there",
        PRETRAIN,
        ("--set", "sdp.schedule[1].until=1"),
        "no such object, there are 0",
        "sdp.schedule=[...]",
    ),
    command("no world size", PLAN, (), "required: --world_size"),
    command(
        "a world size in words",
        PLAN,
        ("--world_size", "four"),
        "--world_size: invalid int value: 'four'",
    ),
    command(
        "a plan of no ranks", PLAN, ("--world_size", "0"), "--world_size = 0: must be at least 1"
    ),
    command(
        "a backend nobody has",
        PLAN,
        ("--world_size", "2", "--backend", "mpi"),
        "--backend: invalid choice: 'mpi'",
        "'nccl'",
    ),
    command(
        "a simulation of no ranks",
        SIMULATE,
        ("--world_size", "0"),
        "--world_size 0: must be at least 1",
    ),
    command(
        "a simulation of too many ranks",
        SIMULATE,
        ("--world_size", "3"),
        "train_batch_size = 8",
        "world size 3",
    ),
    command(
        "no model to evaluate",
        EVALUATE,
        ("--model", "{folder}/none"),
        "--model {folder}/none: has no config.json",
        "name an exported model",
    ),
    command(
        "nothing at a time",
        EVALUATE,
        ("--model", "{tiny}/model", "--micro_batch_size", "0"),
        "--micro_batch_size 0: must be at least 1",
    ),
    command(
        "nothing to evaluate on",
        EVALUATE,
        ("--model", "{tiny}/model", "--set", "data.validation=null"),
        "data.validation: missing",
        "name the corpus",
    ),
    command(
        "a tokenizer of another corpus to evaluate with",
        EVALUATE,
        ("--model", "{tiny}/model", "--set", "data.tokenizer={folder}/other_tokenizer"),
        'other_tokenizer": its tokenizer.json has SHA-256',
        "data.validation = ",
    ),
    command(
        "a model without weights",
        EVALUATE,
        ("--model", "{tiny}/model"),
        "--model {tiny}/model",
        "cannot be read as a model",
        "launch/export.py",
    ),
    command(
        "no model to continue with",
        GENERATE,
        ("--model", "{folder}/none"),
        "--model {folder}/none: has no config.json",
    ),
    command(
        "no tokenizer to continue with",
        GENERATE,
        ("--model", "{tiny}/model"),
        "--model {tiny}/model",
        "copy one there",
    ),
    command(
        "no tokens to add",
        GENERATE,
        ("--model", "{tiny}/model", "--tokens", "0"),
        "--tokens 0: must be at least 1",
    ),
    command(
        "too large a seed",
        GENERATE,
        ("--model", "{tiny}/model", "--seed", "99999999999999999999"),
        "--seed 99999999999999999999",
        "2**63",
    ),
    command(
        "nothing to export",
        ("launch/export.py", "{folder}/none"),
        ("--output", "{folder}/out"),
        "{folder}/none: no such folder",
        "name a checkpoint",
    ),
    command(
        "an export of a file",
        ("launch/export.py", "{folder}/file"),
        ("--output", "{folder}/out"),
        "{folder}/file: no such folder",
    ),
    command(
        "an export in fp16",
        ("launch/export.py", "{folder}/checkpoint"),
        ("--output", "{folder}/out", "--dtype", "fp16"),
        "--dtype: invalid choice: 'fp16'",
        "'bf16'",
    ),
    command(
        "an export over a folder",
        ("launch/export.py", "{folder}/checkpoint"),
        ("--output", "{folder}/empty"),
        "--output {folder}/empty: exists",
    ),
    command(
        "two checkpoints to inspect",
        ("launch/inspect_checkpoint.py", "a"),
        ("b",),
        "unrecognized arguments: b",
    ),
    command(
        "no checkpoint to inspect",
        ("launch/inspect_checkpoint.py", "{folder}/empty"),
        (),
        "{folder}/empty: no checkpoint there",
        "name a run that has saved one",
    ),
    command(
        "no source",
        TOKENIZE[:1],
        ("--tokenizer", "{tiny}/tokenizer", "--output", "{folder}/never"),
        "required: --source",
    ),
    command(
        "a source that is missing",
        TOKENIZE[:1],
        (
            "--source",
            "{folder}/none.jsonl",
            "--tokenizer",
            "{tiny}/tokenizer",
            "--output",
            "{folder}/never",
        ),
        "--source {folder}/none.jsonl: no such file",
    ),
    command(
        "a source of another kind",
        TOKENIZE[:1],
        (
            "--source",
            "{folder}/file",
            "--tokenizer",
            "{tiny}/tokenizer",
            "--output",
            "{folder}/never",
        ),
        "--source {folder}/file: unknown suffix",
        "use .parquet",
    ),
    command(
        "no workers",
        TOKENIZE,
        ("--tokenizer", "{tiny}/tokenizer", "--output", "{folder}/never", "--workers", "0"),
        "--workers 0",
    ),
    command(
        "everything for validation",
        TOKENIZE,
        (
            "--tokenizer",
            "{tiny}/tokenizer",
            "--output",
            "{folder}/never",
            "--validation_fraction",
            "1.5",
        ),
        "--validation_fraction 1.5",
    ),
    command(
        "a tokenizer that is missing",
        TOKENIZE,
        ("--tokenizer", "{folder}/none", "--output", "{folder}/never"),
        "--tokenizer {folder}/none: no such folder",
    ),
    command(
        "an output below a file",
        TOKENIZE,
        ("--tokenizer", "{tiny}/tokenizer", "--output", "{folder}/file/x"),
        "--output {folder}/file/x: cannot be written",
    ),
    command(
        "no text to train a tokenizer on", TRAIN_TOKENIZER, (), "--input --from_model is required"
    ),
    command(
        "too many pieces",
        TRAIN_TOKENIZER,
        ("--input", "{tiny}/text.jsonl", "--vocab_size", "100000"),
        "--vocab_size 100000",
        "lower it or give more text",
    ),
    command(
        "no pieces",
        TRAIN_TOKENIZER,
        ("--input", "{tiny}/text.jsonl", "--vocab_size", "-1"),
        "--vocab_size -1",
    ),
    command(
        "a negative sample",
        TRAIN_TOKENIZER,
        ("--input", "{tiny}/text.jsonl", "--sample_megabytes", "-1"),
        "--sample_megabytes -1",
    ),
    command(
        "a sample that is not finite",
        TRAIN_TOKENIZER,
        ("--input", "{tiny}/text.jsonl", "--sample_megabytes", "nan"),
        "--sample_megabytes nan",
    ),
    command(
        "a model that is missing",
        TRAIN_TOKENIZER,
        ("--from_model", "{folder}/none"),
        "--from_model {folder}/none: no such file",
    ),
    command(
        "a model that is garbage",
        TRAIN_TOKENIZER,
        ("--from_model", "{folder}/low.bin"),
        "--from_model",
    ),
    command(
        "nothing to inspect", ("data_prep/inspect_data.py", "{folder}/none"), (), "{folder}/none"
    ),
    command(
        "a negative number of documents",
        ("data_prep/inspect_data.py", "{tiny}/corpus"),
        ("--documents", "-1"),
        "--documents -1: must be at least 0",
    ),
    command(
        "no room for a corpus",
        ("data_prep/python_corpus.py", "--output", "{folder}/never.jsonl"),
        ("--max_megabytes", "0"),
        "--max_megabytes 0",
    ),
    command(
        "an infinite corpus",
        ("data_prep/python_corpus.py", "--output", "{folder}/never.jsonl"),
        ("--max_megabytes", "inf"),
        "--max_megabytes inf",
    ),
]
