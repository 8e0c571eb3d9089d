"""Whatever a config file holds, only ConfigError comes out of reading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdp_llm.config import (
    deepspeed_dict,
    load_config,
    parse_config,
    require_pretraining,
    resolve_batch,
    to_dict,
)
from sdp_llm.config.parse import walk_keys
from sdp_llm.errors import ConfigError
from sdp_llm.plan import schedule_from_config
from tests.unit.test_config import BASE

# The same examples each time: a failure is seen by everybody or by nobody.
FIXED = settings(derandomize=True, deadline=None, database=None, max_examples=300)

PATHS = [path for path, _ in walk_keys()]
NAMES = sorted({part for path in PATHS for part in path.split(".")})
WORDS = [
    *("auto", "forward", "backward", "balanced", "AdamW", "SGD", "WarmupLR", "StepLR", "OneCycle"),
    *("1/2", "3/2", "0.5", "1e-4", "bf16", "fp16", "none", "eval", "", " ", "\0", "\ud800"),
]
NUMBERS = [0, 1, 2, 4, 8, -1, 0.5, 1e-3, 1e300, 2**63, 10**400, float("nan"), float("inf")]
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(WORDS)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
)
keys = st.sampled_from(NAMES) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
changes = st.dictionaries(st.sampled_from(PATHS), values, max_size=6)
overrides = st.lists(
    st.builds(
        "{}={}".format,
        st.sampled_from(PATHS) | st.text(max_size=8) | st.just("sdp.schedule[0].until"),
        values.map(lambda value: json.dumps(value, default=str)) | st.text(max_size=8),
    )
    | st.text(max_size=8),
    max_size=3,
)


def placed(tree: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a dotted path, over whatever is on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[name] = value


def check_message(error: ConfigError) -> None:
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 600


def read(tree: dict[str, Any], texts: list[str], world_size: int) -> None:
    """All that looks at a config before a model is there; what passes can be written again."""
    try:
        config = parse_config(tree, texts)
        assert parse_config(to_dict(config)) == config
        require_pretraining(config)
        resolve_batch(config, world_size)
        deepspeed_dict(config, world_size, 10)
        schedule_from_config(config.sdp, world_size, 6, 10)
    except ConfigError as error:
        check_message(error)


@FIXED
@given(changes, overrides, st.integers(1, 8))
def test_only_config_errors_come_out(
    changes: dict[str, Any], overrides: list[str], world_size: int
) -> None:
    tree = json.loads(json.dumps(BASE))
    for path, value in changes.items():
        placed(tree, path, value)
    read(tree, overrides, world_size)


@FIXED
@given(st.dictionaries(keys, values, max_size=5))
def test_also_of_what_looks_like_no_config(tree: dict[str, Any]) -> None:
    read(tree, [], 4)


@FIXED
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
@example(b"\xff\xfe{\x00}\x00")
@example(b"[" * 100_000)
@example(b'{"training": {"steps": ' + b"9" * 5000 + b"}}")
def test_and_of_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "random.json"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError as error:
        check_message(error)
