"""The table of all keys, generated from the schema."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field
from typing import Any

from sdp_llm.config.parse import walk_keys


def describe_keys() -> list[tuple[str, str, str, str]]:
    """One `(path, type, default, unit or meaning)` for each key, in the order of the schema."""
    return [
        (path, _type(item), _default(item), item.metadata["help"]) for path, item in walk_keys()
    ]


def markdown_table() -> str:
    """`describe_keys` as a markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{path}` | {kind} | {default} | {text} |"
        for path, kind, default, text in describe_keys()
    ]
    return "\n".join(lines)


def _type(item: Field[Any]) -> str:
    if "items" in item.metadata:
        return "list of objects"
    return "object" if "params" in item.metadata else item.metadata["kind"].name


def _default(item: Field[Any]) -> str:
    if "params" in item.metadata:
        return "{}"
    if "shown" in item.metadata:
        return str(item.metadata["shown"])
    if item.default is MISSING:
        return "required"
    return "none" if item.default is None else json.dumps(item.default)
