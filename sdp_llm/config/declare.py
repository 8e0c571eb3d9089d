"""How the dataclasses of the config declare their keys: `dataclasses.field` with metadata."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any

from sdp_llm.config.kinds import Kind


def key(kind: Kind, help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A key that holds a value; without a default it must be given.

    Metadata: `auto` ("auto" is allowed and means not given), `no_effect` (accepted and ignored),
    `shown` (the default as the table of keys shows it).
    """
    return field(default=default, metadata={"kind": kind, "help": help, **metadata})


def section(cls: type, *, optional: bool) -> Any:
    """A key that holds an object; `optional` ones are None where they are not given."""
    metadata = {"section": cls}
    if optional:
        return field(default=None, metadata=metadata)
    return field(default_factory=cls, metadata=metadata)


def items(cls: type, help: str) -> Any:
    """A key that holds a list of objects of one kind, at least one where it is given."""
    return field(default=None, metadata={"items": cls, "help": help})
