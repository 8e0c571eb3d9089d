"""The `type` and `params` of the optimizer and scheduler sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdp_llm.config import deepspeed_keys as tables
from sdp_llm.config.kinds import AUTO, AUTO_KEYS, Kind, nearest, unknown, wrong
from sdp_llm.errors import ConfigError

OPTIMIZER_NAMES = ", ".join(tables.OPTIMIZERS)
SCHEDULER_NAMES = ", ".join(tables.SCHEDULERS)


def parse_optimizer_type(path: str, value: Any) -> str:
    """The optimizer's name in the spelling of torch; its case in the file does not matter."""
    name = value.lower() if isinstance(value, str) else ""
    for known in tables.OPTIMIZERS:
        if name == known.lower():
            return known
    if name in (other.lower() for other in tables.NOT_ELEMENT_WISE):
        raise wrong(
            path,
            value,
            f"only element-wise optimizers work on shards; use one of {OPTIMIZER_NAMES}",
        )
    if name in (other.lower() for other in tables.OTHER_OPTIMIZERS):
        raise wrong(path, value, f"not supported together with SDP; use one of {OPTIMIZER_NAMES}")
    close = nearest(name, tables.OPTIMIZERS)
    hint = f'did you mean "{close}"?' if close else f"use one of {OPTIMIZER_NAMES}"
    raise wrong(path, value, f"unknown optimizer; {hint}")


def parse_optimizer_params(path: str, kind: str, raw: Any) -> dict[str, Any]:
    """The given parameters of optimizer `kind`; those left out keep torch's defaults."""
    for name in _object(path, raw):
        if name in tables.UNSUPPORTED_OPTIMIZER_PARAMS and name not in tables.OPTIMIZERS[kind]:
            advice = tables.UNSUPPORTED_OPTIMIZER_PARAMS[name] or "remove it"
            raise ConfigError(f"{path}.{name}: not supported together with SDP; {advice}")
    params = _checked(path, raw, tables.OPTIMIZERS[kind])
    if params.get("fused") and params.get("foreach"):
        raise wrong(f"{path}.fused", True, "cannot go with foreach = true; remove one of them")
    return params


def parse_scheduler_type(path: str, value: Any) -> str:
    """The scheduler's name: one of DeepSpeed's, or a class of torch.optim.lr_scheduler."""
    known = (*tables.SCHEDULERS, *tables.TORCH_SCHEDULERS)
    if value in known:
        return str(value)
    if value in tables.UNSUPPORTED_SCHEDULERS:
        raise wrong(
            path, value, f"cannot be built from numbers in a file; use one of {SCHEDULER_NAMES}"
        )
    close = nearest(value, known) if isinstance(value, str) else None
    hint = f'did you mean "{close}"?' if close else f"use one of {SCHEDULER_NAMES}"
    raise wrong(path, value, f"unknown scheduler; {hint}")


def parse_scheduler_params(path: str, kind: str, raw: Any) -> dict[str, Any]:
    """The given parameters of scheduler `kind`; those left out keep its defaults."""
    table = {**tables.SCHEDULERS, **tables.TORCH_SCHEDULERS}[kind]
    params = _checked(path, raw, table, auto="total_num_steps")
    for name in tables.REQUIRED_SCHEDULER_PARAMS.get(kind, ()):
        if name not in params:
            fix = {
                "total_num_steps": '"auto" takes it from the budget',
                "milestones": "give a list of numbers",
            }.get(name, "give a number")
            raise ConfigError(f"{path}.{name}: missing, {kind} needs it; {fix}")
    return params


def _checked(
    path: str, raw: Mapping[str, Any], table: Mapping[str, Kind], auto: str = ""
) -> dict[str, Any]:
    params = {}
    for name, value in _object(path, raw).items():
        where = f"{path}.{name}"
        if name not in table:
            raise unknown(where, tuple(table))
        if name == auto and value == AUTO:
            params[name] = AUTO
        elif value is not None:
            _refuse_auto(where, value)
            params[name] = table[name].parse(where, value)
    return params


def _object(path: str, raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise wrong(path, raw, "expected an object {...}")
    return raw


def _refuse_auto(path: str, value: Any) -> None:
    if value == AUTO:
        raise wrong(path, value, f"only {AUTO_KEYS} can be auto; give a value")
