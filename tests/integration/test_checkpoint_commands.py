"""From a HuggingFace checkpoint through a run back to one, by the commands of the README."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from launch import inspect_checkpoint
from sdp_llm.checkpoint.convert import export_checkpoint
from sdp_llm.checkpoint.coverage import tensor_key
from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.checkpoint.save import FORMAT_VERSION, seal
from sdp_llm.checkpoint.shared_folder import write_json
from sdp_llm.checkpoint.stream import write_tensors
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.unit import MASTER
from sdp_llm.subnetwork.adapter import empty_model, model_layout
from sdp_llm.versions import versions
from tests.integration.conftest import (
    MODEL,
    SEQUENCE,
    Run,
    Tiny,
    execute,
    python,
    two_at_a_time,
    with_deepspeed,
)

STEPS = 3


@dataclass(frozen=True)
class Start:
    """A model, the folder it is saved in, and the options that start a run from there."""

    model: PreTrainedModel
    folder: Path

    def flags(self, run_dir: Path) -> list[str]:
        run = [f"training.steps={STEPS}", "training.export=false", f"training.run_dir={run_dir}"]
        # Without model.config, the checkpoint's own counts.
        return ["--set", *run, f"model.init_from={self.folder}", "model.config=null"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size="50KB")
    return Start(model, folder)


@pytest.fixture(scope="module")
def continued(start: Start, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one rank."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    pretrain = python("launch/pretrain.py", "--deepspeed_config", tiny.config)
    done = execute(*pretrain, *start.flags(folder), "sdp.coverage=1")
    assert done.status == 0, done.output
    assert f"weights of {start.folder}" in done.stdout
    return folder


@pytest.mark.slow
def test_both_backends_start_from_it(start: Start, tiny: Tiny, tmp_path: Path) -> None:
    simulate = python("launch/simulate.py", "--deepspeed_config", tiny.config, "--world_size", "2")
    commands = [
        with_deepspeed(tiny.config, *start.flags(tmp_path / "distributed")),
        [*simulate, *start.flags(tmp_path / "simulated")],
    ]
    names = ("distributed", "simulated")
    done = zip(two_at_a_time(commands), names, strict=True)
    losses = [Run(finished, tmp_path / name).losses() for finished, name in done]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == STEPS


def test_export_and_inspection(continued: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "model"
    exported, inspected = two_at_a_time(
        [
            python("launch/export.py", continued, "--output", output, "--dtype", "bf16"),
            python("launch/inspect_checkpoint.py", continued),
        ]
    )
    assert exported.status == 0, exported.output
    assert exported.stdout.startswith(
        f"exported {continued}/checkpoints/step-{STEPS} to {output} ("
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(output)) > 0
    moved = [
        not torch.equal(value.float(), start.model.get_parameter(name).bfloat16().float())
        for name, value in model.named_parameters()
    ]
    assert all(moved), "every weight was trained"
    assert inspected.status == 0, inspected.output
    samples, tokens = 8 * STEPS, 8 * STEPS * SEQUENCE
    assert f"step          {STEPS}, {samples} samples, {tokens} tokens" in inspected.stdout
    assert "1 ranks, 4 blocks, coverage 1 " in inspected.stdout
    assert "verified" in inspected.stdout


def test_damage_is_found(
    continued: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(find_checkpoint(continued), tmp_path / "damaged")
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert inspect_checkpoint.inspect(argparse.Namespace(checkpoint=str(folder))) == 1
    message = f"inspect_checkpoint: error: {file}: has another SHA-256 than what was saved; take"
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not the file that was saved"):
        export_checkpoint(folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"], "nothing is left behind"


def test_what_export_refuses(
    continued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_checkpoint(continued)
    output = tmp_path / "model"
    with pytest.raises(ConfigError, match="exists; name a new folder, or remove it"):
        export_checkpoint(folder, tmp_path)
    other = LlamaConfig(**{**MODEL, "num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"model\.layers\.3.*give the config it was trained"):
        export_checkpoint(folder, output, config=other)
    with pytest.raises(ConfigError, match="has no tokenizer; name the folder of one"):
        export_checkpoint(folder, output, tokenizer=tmp_path)
    with pytest.raises(ConfigError, match=r"manifest\.json: not there"):
        export_checkpoint(tmp_path, output)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot read or write"):
        export_checkpoint(folder, tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    done = execute(*python("launch/export.py", "nowhere", "--output", output))
    message = "export: error: nowhere: no such folder; name a checkpoint\n"
    assert (done.status, done.stderr) == (2, message)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB, and 0\.0 GB are free; name a folder on"):
        export_checkpoint(folder, output)


# -- memory ---------------------------------------------------------------------------------------

LARGE = {**MODEL, "vocab_size": 2**17, "hidden_size": 128, "intermediate_size": 128}
# Peak memory of this process (KiB), before and after.
MEASURED = """
import re, sys
from pathlib import Path
from sdp_llm.checkpoint.convert import export_checkpoint
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(before, peak())
"""


def write_checkpoint(folder: Path, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """A checkpoint as one rank would write it, of masters alone."""
    layout = model_layout(empty_model(config))
    masters = {spec.name: torch.randn(spec.shape) for spec in layout.parameters}
    tensors = [(tensor_key(MASTER, n, 0, v.numel()), v.flatten()) for n, v in masters.items()]
    folder.mkdir()
    files = [write_tensors(folder / "rank-00000.safetensors", tensors)]
    state = {"model": config.to_dict(), "config": {"bf16": {"enabled": False}, "sdp": {}}}
    files.append(write_json(folder / "state.json", state | {"versions": versions()}))
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {file.name: {"bytes": file.size, "sha256": file.sha256} for file in files},
        "parameters": {name: list(value.shape) for name, value in masters.items()},
    }
    write_json(folder / "manifest.json", manifest | {"sha256": seal(manifest)})
    return masters


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_less_than_the_largest_tensor(tmp_path: Path) -> None:
    """Two tensors of 67 MB, which go through memory in parts."""
    masters = write_checkpoint(tmp_path / "checkpoint", LlamaConfig(**LARGE))
    largest = max(value.nbytes for value in masters.values())
    assert largest > 6e7
    arguments = [tmp_path / "checkpoint", tmp_path / "model"]
    done = execute(sys.executable, "-c", MEASURED, *arguments)
    assert done.status == 0, done.output
    before, after = (int(word) * 1024 for word in done.stdout.split()[-2:])
    assert after - before < 0.8 * largest, done.output
    names = sorted(os.listdir(tmp_path / "model"))
    assert "model-00001-of-00001.safetensors" in names
    written = load_file(tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert written.keys() == masters.keys()
    assert all(torch.equal(written[name], value) for name, value in masters.items())
