"""From JSON text and overrides to a `RunConfig`; whatever is not understood is an error."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

from sdp_llm.config import deepspeed_keys as tables
from sdp_llm.config.kinds import (
    ANY_STRING,
    AUTO,
    AUTO_KEYS,
    CORPORA,
    STRING,
    shorten,
    unknown,
    wrong,
)
from sdp_llm.config.schema import RunConfig
from sdp_llm.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config from a JSON file.

    :param path: the file.
    :param overrides: `a.b=VALUE`, applied in order before anything is checked; see `parse_config`.
    :raises ConfigError: the file cannot be read, is not strict JSON, or breaks a rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; give a JSON file, saved as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: cannot read the config file: {reason}; name a JSON file such as "
            "configs/demo.json"
        ) from None
    if not text.strip():
        raise ConfigError(f"{path}: the config file is empty; write a JSON object {{...}}")
    try:
        raw = _strict_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "keys and strings need double quotes; comments, and a comma before a closing bracket, "
            "are not allowed"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply; write it flatter") from None
    except ValueError as error:  # also a ConfigError, which does not know the file
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: the top level must be a JSON object {{...}}, as in configs/demo.json"
        )
    return parse_config(raw, overrides)


def parse_config(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Check a run config that is already in memory; null stands for a key that is not given.

    :param mapping: what the JSON file would hold.
    :param overrides: `a.b=VALUE` or, inside a list, `a[0].b=VALUE`; VALUE is JSON, or else a plain
        string. null removes the key.
    :raises ConfigError: a key is unknown or unsupported, or a value breaks its rule.
    """
    tree = copy.deepcopy(dict(mapping))
    for override in overrides:
        _apply(tree, override)
    config: RunConfig = _parse_section(RunConfig, "", tree)
    return config


def walk_keys(cls: type = RunConfig, path: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every key that holds a value, as `(full path, field)`, in the schema's order."""
    for item in fields(cls):
        where = _join(path, item.name)
        if "section" in item.metadata:
            yield from walk_keys(item.metadata["section"], where)
        else:
            yield where, item


def _parse_section(cls: type, path: str, raw: Any) -> Any:
    if not isinstance(raw, Mapping):
        first = fields(cls)[0].name
        raise wrong(path, raw, f'expected an object {{...}} with keys such as "{first}"')
    for name, value in raw.items():
        if not _is_off(_join(path, str(name)), value):
            _check_known(cls, path, str(name))
    values: dict[str, Any] = {}
    for item in fields(cls):
        where, value = _join(path, item.name), raw.get(item.name)
        if value is None and "params" in item.metadata:
            value = {}  # some types require parameters, so these are checked even if not given
        if value is not None:
            values[item.name] = _parse_field(item, where, value, values)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{where}: missing; it is required ({item.metadata['help']})")
    return cls(**values)


def _parse_field(item: Field[Any], path: str, value: Any, siblings: Mapping[str, Any]) -> Any:
    metadata = item.metadata
    if "section" in metadata:
        return _parse_section(metadata["section"], path, value)
    if "items" in metadata:
        return _parse_items(metadata["items"], path, value)
    if "params" in metadata:
        return metadata["params"](path, siblings["type"], value)
    if value == AUTO:
        if metadata.get("auto"):
            return None
        raise wrong(path, value, f"only {AUTO_KEYS} can be auto; give a value")
    return metadata["kind"].parse(path, value)


def _parse_items(cls: type, path: str, raw: Any) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple) or not raw:
        raise wrong(path, raw, "expected a list [{...}, ...] of at least one object")
    return tuple(_parse_section(cls, f"{path}[{i}]", item) for i, item in enumerate(raw))


def _is_off(path: str, value: Any) -> bool:
    """Whether it switches off what DeepSpeed has and SDP has not, as templates do."""
    if path not in tables.UNSUPPORTED:
        return False
    if isinstance(value, Mapping):
        return value.get("enabled") is False or value.get("device") == "none"
    return value is False


def _check_known(cls: type, path: str, name: str) -> None:
    """Raises ConfigError unless `name` is a key of the section `cls` at `path`."""
    known = [item.name for item in fields(cls)]
    if name in known:
        return
    where = _join(path, name)
    # DeepSpeed takes some keys of stage 3 without their prefix too.
    for candidate in (where, f"{path}.stage3_{name}"):
        if candidate in tables.UNSUPPORTED:
            advice = tables.UNSUPPORTED[candidate]
            text = "valid in DeepSpeed but not supported together with SDP"
            raise ConfigError(f"{where}: {text}; {advice or 'remove it'}")
    if where in tables.REMOVED:
        advice = tables.REMOVED[where] or "remove it"
        raise ConfigError(
            f"{where}: removed from DeepSpeed and not supported together with SDP; {advice}"
        )
    raise unknown(where, known, _paths_by_name().get(name))


@cache
def _paths_by_name() -> dict[str, str]:
    """The full path of every key whose name occurs once, sections included."""
    paths = [path for path, _ in walk_keys()]
    paths += sorted({path.rpartition(".")[0] for path in paths} - {""})
    names = [path.rpartition(".")[2] for path in paths]
    return {name: path for name, path in zip(names, paths, strict=True) if names.count(name) == 1}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Write one `a.b=VALUE` into the tree of raw values."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        given = shorten(override)
        raise ConfigError(f"--set {given}: expected KEY=VALUE, such as training.steps=100")
    item = _locate(path)
    value = _override_value(item, text)
    *parents, name = path.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        child = _child(node, parent, where)
        if child is None:
            if value is None:
                return
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise wrong(where, child, "expected an object {...}")
        node = child
    if value is not None:
        node[name] = value
    elif name in node:
        del node[name]
    elif item is None:
        raise unknown(path, tuple(node))


def _child(node: dict[str, Any], part: str, where: str) -> Any:
    """What ``node`` has under ``name`` or ``name[index]``, or None.

    :raises ConfigError: there is no object of that index.
    """
    name, index = _indexed(part)
    if index is None:
        return node.get(name)
    value = node.get(name)
    entries = value if isinstance(value, list) else []
    if index >= len(entries):
        raise ConfigError(
            f"{where}: no such object, there are {len(entries)}, counted from 0; give the whole "
            f"list as {where.rpartition('[')[0]}=[...]"
        )
    return entries[index]


def _locate(path: str) -> Field[Any] | None:
    """The field at `path`, or None inside params, whose keys depend on the type beside them."""
    cls: type = RunConfig
    parts = path.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        name, index = _indexed(part)
        _check_known(cls, parent, name)
        item = next(item for item in fields(cls) if item.name == name)
        rest = parts[depth + 1 :]
        where = _join(parent, name)
        if (index is not None or rest) and "items" in item.metadata:
            if index is None or not rest:
                raise ConfigError(
                    f"{path}: {where} is a list; give all of it, or a key of one of its objects "
                    f"as {where}[0].{fields(item.metadata['items'])[0].name}"
                )
            cls = item.metadata["items"]
            continue
        if index is not None:
            raise ConfigError(f"{path}: unknown key; {where} is not a list")
        if not rest:
            return item
        if "params" in item.metadata and len(rest) == 1:
            return None
        if "section" not in item.metadata:
            raise ConfigError(f"{path}: unknown key; {where} has no keys below it")
        cls = item.metadata["section"]
    raise AssertionError("a path has at least one part")


def _indexed(part: str) -> tuple[str, int | None]:
    """A part of a path: its name, and the index of ``name[index]``."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", part)
    return (match[1], int(match[2])) if match else (part, None)


def _override_value(item: Field[Any] | None, text: str) -> Any:
    try:
        value = _strict_json(text)
    except (ValueError, RecursionError):
        return text
    # A run folder named 123 is meant as text.
    kind = item.metadata.get("kind") if item is not None else None
    is_text = kind in (STRING, ANY_STRING)
    is_text = is_text or (kind == CORPORA and not isinstance(value, dict | list))
    return text if is_text and not isinstance(value, str | None) else value


def _strict_json(text: str) -> Any:
    return json.loads(
        text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ConfigError(f"{name}: the key is given twice in one object; keep one")
        result[name] = value
    return result


def _integer(digits: str) -> int:
    # Of more than some thousand digits Python makes no integer; so many are too many for any key.
    return int(digits[:1000])


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; give a finite one")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
