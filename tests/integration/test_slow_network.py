"""Ranks in namespaces of their own, joined by links that are limited."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks._network import (
    INTERFACE,
    Network,
    burst_bytes,
    interface_bytes,
    star_network,
    why_no_star,
)
from benchmarks._ranks import run_ranks
from benchmarks._slow_page import Measured, page, speedup
from benchmarks._systems import System, Workload
from tests.conftest import ROOT

SCRIPT = [sys.executable, "benchmarks/slow_network.py", "--model", "configs/model/llama_3m.json"]
SYSTEMS = ("ddp", "sdp:1/2:forward:2")
GBITS = 0.1
NUMEL = 2**20  # 4 MiB in fp32


@pytest.fixture
def needs_star() -> None:
    reason = why_no_star()
    if reason is not None:
        pytest.skip(reason)


def _namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line.startswith("sdp-")}


def _of_process(process_id: int) -> set[str]:
    return {name for name in _namespaces() if name.startswith(f"sdp-{process_id}-")}


def _outside() -> list[str]:
    """The interfaces and limits of the network that this process is in."""
    commands = (["ip", "-brief", "link"], ["tc", "qdisc", "show"])
    return [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]


def _all_reduce(network: Network) -> tuple[float, int, list[str]]:
    values = torch.ones(NUMEL)
    group = dist.new_group(list(range(dist.get_world_size())))  # connects its ranks anew
    dist.all_reduce(torch.ones(8), group=group)
    network.limit(dist.get_rank(), GBITS)
    dist.barrier()
    sent, begin = interface_bytes(), time.perf_counter()
    dist.all_reduce(values, group=group)
    seconds = time.perf_counter() - begin
    dist.barrier()  # a rank can have its result before it has sent all of its part
    lines = Path("/proc/net/dev").read_text().splitlines()
    names = [line.split(":")[0].strip() for line in lines if ":" in line]
    assert values.eq(2).all()
    return seconds, interface_bytes() - sent, names


@pytest.mark.usefixtures("needs_star")
def test_a_link_is_not_faster_than_its_limit() -> None:
    outside = _outside()
    with star_network(2) as network:
        for seconds, sent, names in run_ranks(2, _all_reduce, network, prepare=network.enter):
            assert sorted(names) == [INTERFACE, "lo"]
            # Of two ranks each sends its half of the sum, and half of the result.
            assert 1 <= sent / (4 * NUMEL) <= 1.02
            assert seconds >= (4 * NUMEL - burst_bytes(GBITS)) * 8 / (GBITS * 1e9)
        assert _outside() == outside


@pytest.mark.usefixtures("needs_star")
def test_the_network_is_removed_when_a_rank_fails() -> None:
    with pytest.raises(RuntimeError, match=r"rank [01]: (?s:.*)ZeroDivisionError"):
        _failing()
    assert not _of_process(os.getpid())


def _failing() -> None:
    with star_network(2) as network:
        assert len(_of_process(os.getpid())) == 3
        run_ranks(2, _divide, 0, prepare=network.enter)


def _divide(by: int) -> float:
    return 1 / by


_WAITING = """
import signal, sys, time
from benchmarks._network import star_network
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
# A shell starts what it runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with star_network(2):
    print("made", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("needs_star")
def test_the_network_is_removed_when_interrupted(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"made\n"
            assert len(_of_process(process.pid)) == 3
            process.send_signal(number)
            process.wait(60)
        finally:
            process.kill()
    assert not _of_process(process.pid)


def _entry(name: str, closed_form: int, seconds: list[float]) -> Measured:
    return Measured(name, 1.0, closed_form, seconds, [[float(closed_form)]])


def test_speedup_is_the_median_over_the_fastest_of_each_round() -> None:
    own, one, other = (
        _entry(name, 1, seconds)
        for name, seconds in (
            ("a", [1.0, 2.0, 1.0]),
            ("b", [4.0, 4.0, 9.0]),
            ("c", [3.0, 8.0, 5.0]),
        )
    )
    assert speedup(own, one, other) == 3.0


@pytest.mark.parametrize(("seconds", "verdict"), [(5.5, "reached"), (5.6, "missed")])
def test_the_page_says_whether_a_goal_is_reached(seconds: float, verdict: str) -> None:
    sdp = System("SDP", "1/2")
    systems = [System(name) for name in ("DDP", "ZeRO-3", "FSDP2")] + [sdp]
    measured = [
        _entry("DDP", 100, [10.0]),
        _entry("ZeRO-3", 150, [12.0]),
        _entry("FSDP2", 150, [10.0]),
        _entry(str(sdp), 50, [seconds]),
    ]
    rows = page(systems, Workload(4, 32), measured, 1).splitlines()
    over_ddp, over_sharded = (
        next(row for row in rows if row.startswith("| SDP") and f" {name} |" in row)
        for name in ("DDP", "FSDP2")
    )
    assert "1.90 = 0.95 x 2.00 of bytes" in over_ddp
    assert "missed" in over_ddp
    assert "1.80" in over_sharded
    assert over_sharded.endswith(f"{verdict} |")


@pytest.mark.slow
def test_without_ip_nothing_is_written(tmp_path: Path) -> None:
    output = tmp_path / "slow.json"
    command = [*SCRIPT, "--output", str(output)]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("slow_network:")]
    assert len(lines) == 1
    assert lines[0].endswith("nothing was measured")
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_star")
def test_systems_over_a_slow_link(tmp_path: Path) -> None:
    output = tmp_path / "slow.json"
    options = ["--world_size", "2", "--gbits", "1", "--rounds", "1", "--systems", *SYSTEMS]
    done = subprocess.run(
        [*SCRIPT, *options, "--delay_ms", "0.1", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [entry["system"] for entry in result["results"]] == [
        "DDP",
        "SDP, C = 1/2, forward, stage 2",
    ]
    for entry in result["results"]:
        (sent,) = entry["sent"]
        assert 1 <= sum(sent) / 2 / entry["closed_form"] <= 1.02, entry
        (seconds,) = entry["seconds"]
        assert seconds >= (max(sent) - burst_bytes(1)) * 8 / 1e9
    text = output.with_suffix(".md").read_text()
    assert "## 1 Gbit/s" in text
    if result["why_no_delay"] is not None:
        assert "Delay: not measured (tc netem:" in text
