"""benchmarks/mfu.py on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.integration.test_scaling import MODEL


def _run(folder: Path, *options: str, **environment: str) -> tuple[dict[str, Any], str]:
    model, output = folder / "tiny.json", folder / "mfu.json"
    model.write_text(json.dumps(MODEL))
    command = [sys.executable, "benchmarks/mfu.py", "--models", str(model), *options]
    command += ["--sequence_length", "32", "--steps", "2", "--repeats", "2"]
    command += ["--output", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_step_time_and_mfu(tmp_path: Path, masking: str) -> None:
    options = ["--dtype", "bf16", "--compile", "off", "--masking", masking]
    result, _ = _run(tmp_path, *options)
    rows = {(r["coverage"], r["is_checkpointed"]): r for r in result["results"]}
    assert rows.keys() == {(c, again) for c in ("1", "1/2") for again in (False, True)}
    ceiling = max(result["matmul_ceilings"])
    for row in rows.values():
        assert [len(seconds) for seconds in row["all_seconds"]] == [2, 2]
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["mfu"] == pytest.approx(32 / row["seconds"] * row["flops_per_token"] / ceiling)
        assert 0 < row["mfu"] < 1
    # 4 free blocks; attention 12 x 128 x 32 per token, matrices of 4 x 128^2 + 3 x 128 x 256.
    block, attention, head = 4 * 128**2 + 3 * 128 * 256, 12 * 128 * 32, 128 * 1024
    whole = 6 * head + 6 * (6 * block + attention)
    half = whole - 2 * (2 * block if masking == "backward" else 6 * block + attention)
    for again in (False, True):
        assert rows["1", again]["flops_per_token"] == whole
        assert rows["1/2", again]["flops_per_token"] == half


@pytest.mark.slow
def test_without_a_compiler_the_row_says_why(tmp_path: Path) -> None:
    environment = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = ["--coverage", "1/2", "--checkpointing", "off"]
    result, page = _run(tmp_path, *options, **environment)
    plain, compiled = result["results"]
    assert "failure" not in plain
    assert compiled["is_compiled"]
    assert compiled["failure"]
    assert f"n/a: {compiled['failure']}" in page


@pytest.mark.slow
def test_a_coverage_that_the_world_cannot_have_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/mfu.py", "--coverage", "1/3", "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "mfu.json")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mfu: error: sdp.coverage = 1/3")
    assert len(done.stderr.splitlines()) == 1
