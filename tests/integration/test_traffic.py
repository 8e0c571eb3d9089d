"""The bytes on the wire, by the byte counter of a network namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._network import network_namespace, why_no_namespace
from tests.conftest import ROOT

SCRIPT = [sys.executable, "benchmarks/traffic.py", "--model", "configs/model/llama_10m.json"]


def _namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line.startswith("sdp-")}


@pytest.fixture
def needs_namespace() -> None:
    reason = why_no_namespace()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_namespace")
def test_ranks_send_the_closed_form(tmp_path: Path) -> None:
    output = tmp_path / "traffic.json"
    options = ["--world_size", "4", "--stages", "2", "--masking", "forward"]
    command = [*SCRIPT, *options, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["counted_by"] == "interface"
    assert len(result["results"]) == 1
    for entry in result["results"]:
        assert 1 <= entry["ratio"] <= 1.02, entry
        assert entry["collectives_ratio"] == pytest.approx(1, abs=0.001), entry
    assert {"hardware", "versions", "commit", "command"} <= result.keys()
    assert "NOT counted" not in output.with_suffix(".md").read_text()


@pytest.mark.usefixtures("needs_namespace")
def test_the_namespace_is_removed_whatever_happens() -> None:
    before = _namespaces()
    names = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(names)
    assert len(names) == 1
    assert _namespaces() <= before


def _interrupted(names: list[str]) -> None:
    with network_namespace() as name:
        assert name in _namespaces()
        names.append(name)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_without_ip_the_collectives_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    output = tmp_path / "traffic.json"
    command = [*SCRIPT, "--world_size", "2", "--stages", "1", "--masking", "forward"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("traffic:")]
    assert len(lines) == 1
    assert lines[0].endswith("counting at the collectives")
    result = json.loads(output.read_text())
    assert result["counted_by"] == "collectives"
    assert result["results"][0]["ratio"] == pytest.approx(1, abs=0.001)
    assert "NOT counted by an interface" in output.with_suffix(".md").read_text()
