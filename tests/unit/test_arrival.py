"""Weights under way are waited for before they are used, and not earlier."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from sdp_llm.sharding.arrival import wait_before_use
from sdp_llm.sharding.collectives import Pending
from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.adapter import find_blocks, model_layout
from sdp_llm.subnetwork.masking import skip_blocks

LLAMA = LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    vocab_size=32,
)
GPT2 = GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=32, n_positions=16)


def _events(config: PretrainedConfig, *, skip_last: bool = False) -> list[str]:
    """What one forward pass does: "arrived NAME" of units, "ran NAME" of modules."""
    model = AutoModelForCausalLM.from_config(config)
    layout = model_layout(model)
    _, blocks = find_blocks(model)
    events: list[str] = []
    if skip_last:
        skip_blocks(blocks, {0, 1, 2})
    units = []
    for part in layout.units:
        if skip_last and part.block == 3:
            continue
        values = {s.name: model.get_parameter(s.name).detach() for s in part.parameters}
        device = torch.device("cpu")
        unit = Unit(
            part,
            values,
            owners=(0,),
            group=None,
            rank=0,
            stage=1,
            dtype=torch.float32,
            device=device,
        )
        unit.expect(Pending(lambda name=part.name: events.append(f"arrived {name}")))
        units.append(unit)
    wait_before_use(model, units)
    users = {name.rpartition(".")[0]: part for part in layout.units for name in _names(part)}
    for name, part in users.items():
        if part.block == 3 and skip_last:
            continue
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=part.name: events.append(f"ran {name}"))
    model(torch.arange(6).view(1, 6))
    return events


def _names(part: object) -> list[str]:
    return [spec.name for spec in part.parameters]  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_unit_arrives_just_before_it_runs(config: PretrainedConfig) -> None:
    events = _events(config)
    arrived = {e.removeprefix("arrived "): i for i, e in enumerate(events) if "arrived" in e}
    ran: dict[str, int] = {}
    for i, event in enumerate(events):
        if event.startswith("ran"):
            ran.setdefault(event.removeprefix("ran "), i)
    assert arrived.keys() == ran.keys()
    for name, i in ran.items():
        assert arrived[name] < i
    for b in range(3):
        assert arrived[f"block {b + 1}"] > ran[f"block {b}"], "nothing waits for what comes later"


def test_the_head_arrives_where_the_last_block_is_skipped() -> None:
    events = _events(LLAMA, skip_last=True)
    assert events.index("arrived head") < events.index("ran head")
    assert events.index("arrived head") > events.index("ran block 2")


def test_reading_weights_waits() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    part = model_layout(model).units[1]
    values = {s.name: model.get_parameter(s.name).detach() for s in part.parameters}
    device = torch.device("cpu")
    unit = Unit(
        part, values, owners=(0,), group=None, rank=0, stage=1, dtype=torch.float32, device=device
    )
    wait_before_use(model, [unit])
    for read in (lambda: unit.flat, model.state_dict, model.model.state_dict):
        events: list[int] = []
        unit.expect(Pending(lambda events=events: events.append(1)))
        read()
        assert events == [1], "once"
