"""A blend, documents apart and workers that read ahead, through the commands."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdp_llm.data import IndexedDataset
from sdp_llm.data.manifest import read_manifest
from tests.integration.conftest import (
    STEPS,
    Finished,
    Run,
    Tiny,
    execute,
    python,
    two_at_a_time,
    with_deepspeed,
)


@dataclass(frozen=True)
class Runs:
    """The same run with workers, without, across documents; and its model measured again."""

    launched: Run
    simulated: Run
    across: Run
    evaluated: Finished


@pytest.fixture(scope="module")
def runs(tiny: Tiny) -> Runs:
    blend = {f"{tiny.corpus}/{split}_text_document": weight for split, weight in SHARES.items()}
    folders = [tiny.folder / "runs" / f"reading{i}" for i in range(3)]
    given = [f"data.train={json.dumps(blend)}", "data.document_mask=true"]
    workers = [*given, "data.num_workers=2", f"training.run_dir={folders[0]}"]
    simulate = python("launch/simulate.py", "--deepspeed_config", tiny.config, "--world_size", "2")
    finished = two_at_a_time(
        [
            with_deepspeed(tiny.config, "--set", *workers),
            [*simulate, "--set", *given, f"training.run_dir={folders[1]}"],
            [*simulate, "--set", given[0], f"training.run_dir={folders[2]}"],
        ]
    )
    model = ["--deepspeed_config", folders[0] / "config.json", "--model", folders[0] / "model"]
    evaluated = execute(*python("launch/evaluate.py", *model))
    pairs = zip(finished, folders, strict=True)
    return Runs(*(Run(done, folder) for done, folder in pairs), evaluated)


SHARES = {"train": 3, "validation": 1}


@pytest.mark.slow
def test_the_engine_with_workers_equals_the_simulation_without(runs: Runs) -> None:
    assert runs.launched.losses() == pytest.approx(runs.simulated.losses(), abs=1e-5)
    assert runs.launched.validation() == pytest.approx(runs.simulated.validation(), abs=1e-5)
    # And the comparison can tell whether documents see each other.
    assert runs.across.losses() != pytest.approx(runs.simulated.losses(), abs=1e-4)
    assert "Traceback" not in runs.launched.finished.stderr


@pytest.mark.slow
def test_the_model_measured_again_has_the_same_loss(runs: Runs) -> None:
    assert runs.evaluated.status == 0, runs.evaluated.output
    found = re.search(r"validation loss ([\d.]+) nats", runs.evaluated.stdout)
    assert found is not None
    assert float(found[1]) == pytest.approx(runs.launched.validation()[-1], abs=1e-5)


@pytest.mark.slow
def test_the_card_shows_both_corpora(runs: Runs, tiny: Tiny) -> None:
    lines = runs.launched.finished.stdout.splitlines()
    [i] = [i for i, line in enumerate(lines) if line.startswith("data ")]
    for line, (split, share) in zip(lines[i : i + 2], SHARES.items(), strict=True):
        read = share * STEPS * 8 // 4
        assert f"{tiny.corpus}/{split}_text_document: share {share / 4:.1%}, " in line
        assert f"this run reads {read} " in line


@pytest.mark.slow
def test_the_run_folder_starts_the_same_run_again(runs: Runs) -> None:
    config = json.loads((runs.launched.folder / "config.json").read_text())
    assert list(config["data"]["train"].values()) == list(SHARES.values())
    assert (config["data"]["document_mask"], config["data"]["num_workers"]) == (True, 2)


def test_the_manifest_of_data_prep_is_understood(tiny: Tiny) -> None:
    digest = hashlib.sha256((tiny.tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    for split in SHARES:
        prefix = tiny.corpus / f"{split}_text_document"
        data, manifest = IndexedDataset(prefix), read_manifest(prefix)
        assert manifest.largest_id == data.tokens(0, data.num_tokens).max()
        assert manifest.eos_id == data.tokens(0, data.num_tokens)[-1]
        assert manifest.tokenizer_sha256 == digest


@pytest.mark.slow
def test_each_rank_checks_its_part_of_the_ids(tiny: Tiny, tmp_path: Path) -> None:
    """Without a manifest the corpus is read; the rank that finds the id says so."""
    for suffix in (".bin", ".idx"):
        name = f"train_text_document{suffix}"
        (tmp_path / name).write_bytes((tiny.corpus / name).read_bytes())
    with (tmp_path / "train_text_document.bin").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    overrides = [f"data.train={tmp_path}/train_text_document", f"training.run_dir={tmp_path}/run"]
    done = execute(*with_deepspeed(tiny.config, "--set", *overrides), timeout=90)
    assert done.status != 0, done.output
    [line] = done.error_lines()
    assert line.startswith("pretrain: error: [rank 1] data.train = ")
    assert "has token id 65535, but vocab_size = 320" in line
    assert not (tmp_path / "run").exists()
