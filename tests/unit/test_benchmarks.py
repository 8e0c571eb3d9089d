"""What the benchmarks conclude from what they measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import _compare_page, overlap, step_time
from benchmarks._systems import PEERS, SDP, System, Workload, closed_form, parse_system
from benchmarks.allocator import record_allocations
from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.measure import load_model_config
from tests.conftest import ROOT

MB = 2**20


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("zero2", System("ZeRO-2")),
        ("sdp:1", System(SDP, "1", "forward", 2)),
        ("sdp:1/2:backward", System(SDP, "1/2", "backward", 2)),
        ("sdp:1/4:forward:1", System(SDP, "1/4", "forward", 1)),
        ("sdp:1/4:forward:1:3", System(SDP, "1/4", "forward", 1, 3)),
    ],
)
def test_systems_by_name(text: str, system: System) -> None:
    assert parse_system(text) == system


@pytest.mark.parametrize("text", ["ddp2", "sdp", "sdp:1/2:sideways", "sdp:1:forward:9", "sdp:a"])
def test_unknown_systems_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_system(text)
    assert "\n" not in str(error.value)


def test_every_system_has_a_closed_form() -> None:
    model = load_model_config(ROOT / "configs" / "model" / "llama_3m.json")
    workload = Workload(4, 32)
    costs = {name: closed_form(parse_system(name), workload, model) for name in PEERS}
    assert costs["ddp_checkpointing"].compute.mean > costs["ddp"].compute.mean
    assert costs["ddp_checkpointing"].memory.activations < costs["ddp"].memory.activations
    assert costs["fsdp2_unsharded"].traffic.mean < costs["fsdp2"].traffic.mean
    half, full = (closed_form(parse_system(f"sdp:{c}"), workload, model) for c in ("1/2", "1"))
    assert half.traffic.mean < full.traffic.mean == costs["zero2"].traffic.mean


def test_the_allocators_record_counts_what_lives_in_between() -> None:
    kept = [torch.zeros(MB // 4)]

    def action(mark: Any) -> None:
        kept[0] = torch.zeros(MB // 4)  # the same again
        middle = torch.zeros(2 * MB // 4)
        mark()
        after = torch.zeros(3 * MB // 4)
        del middle, after

    found = record_allocations(action)
    assert found.at_mark == 2 * MB
    assert found.peak == 5 * MB


def _timed(system: System, seconds: list[float], flops: float) -> dict[str, Any]:
    is_sdp = system.kind == SDP
    return {"system": str(system), "is_sdp": is_sdp, "seconds": seconds, "flops": flops}


@pytest.mark.parametrize(("half", "verdict"), [(0.55, "reached"), (0.58, "MISSED")])
def test_step_times_are_compared_round_by_round(half: float, verdict: str) -> None:
    rounds = [1.0, 9.0, 2.0]  # a busy machine
    results = [
        _timed(System("DDP"), rounds, 100),
        _timed(System("ZeRO-2"), [2 * s for s in rounds], 100),
        _timed(System(SDP), [1.1 * s for s in rounds], 100),
        _timed(System(SDP, "1/2"), [1.1 * half * s for s in rounds], 54),
    ]
    page = step_time.report(results, Workload(2, 64), steps=3)
    assert "over the fastest of DDP, ZeRO-2 (DDP): 1.100; goal 1.00: MISSED." in page
    assert f"over C = 1: {half:.3f}, FLOP ratio 0.540; goal 0.567: {verdict}." in page


def test_waiting_for_bytes_and_for_ranks() -> None:
    phases = {"forward": (10.0, 11.0), "backward": (11.0, 13.0), "optimizer": (13.0, 14.0)}

    def message(kind: str, number: int, started: float, waited: float, over: float) -> dict:
        times = {"started": started, "waited": waited, "over": over}
        return {"kind": kind, "ranks": (0, 1), "number": number, "mebibytes": 1.0} | times

    early = [
        message(overlap.GATHER, 4, started=9.0, waited=10.0, over=10.1),
        message(overlap.REDUCE, 5, started=11.0, waited=12.0, over=12.5),
        message(overlap.REDUCE, 6, started=12.6, waited=12.7, over=13.0),
    ]
    late = [
        message(overlap.GATHER, 4, started=9.5, waited=10.0, over=10.0),
        message(overlap.REDUCE, 5, started=12.3, waited=12.4, over=12.5),
        message(overlap.REDUCE, 6, started=12.6, waited=12.8, over=12.9),
    ]
    ranks = [[{"phases": phases, "messages": messages}] for messages in (early, late)]
    (first,), (second,) = overlap.waiting(ranks)
    assert first == pytest.approx(
        {"forward": 0.025, "backward": (0.2 + 0.3) / 4, "optimizer": 0, overlap.LATE: 0.3 / 4}
    )
    assert second == pytest.approx(
        {"forward": 0, "backward": (0.1 + 0.1) / 4, "optimizer": 0, overlap.LATE: 0}
    )


@pytest.mark.parametrize(("resident", "verdict"), [(115, "reached"), (135, "MISSED")])
def test_the_worst_system_decides_a_goal(resident: int, verdict: str) -> None:
    rank = {
        "state": {"weights": 40, "gradients": 20, "optimizer": 40, "other": 1},
        "activations": 10,
        "peak": 120,
        "resident": resident,
    }
    memory = {"weights": 40, "gradients": 20, "optimizer": 40, "transient": 5}
    form = {"memory": memory, "traffic": {"mean": 100}}
    results = [
        {"system": "DDP", "is_sdp": False, "ranks": [rank | {"resident": 900}], "sent": 900.0},
        {"system": "SDP", "is_sdp": True, "ranks": [rank], "sent": 101.0},
    ]
    page = _compare_page.page(
        [result | {"closed_form": form} for result in results], Workload(4, 64), 2, True
    )
    assert "closed form: at most 1.010 (SDP); goal 1.03: reached." in page
    assert f"at most {(resident - 10) / 105:.3f} (SDP); goal 1.10: {verdict}." in page
    assert "bytes sent over the closed form: at most 1.010 (SDP); goal 1.02: reached." in page
