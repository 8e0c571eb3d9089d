"""Imports point one way: from training down to the config and the plan."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From the bottom; what stands in one row knows nothing of its neighbours.
LAYERS = (
    ("errors", "activity", "processes", "files", "ranks"),
    ("config", "launched", "versions", "tokenizer"),
    ("plan", "data", "cli", "rendezvous", "chunked_head"),
    ("loss", "optim", "agree", "world", "distributed", "answers", "unsupported"),
    ("subnetwork",),
    ("sharding", "simulation"),
    ("checkpoint", "evaluation", "exported"),
    ("engine",),
    ("initialization",),
    ("report",),
    ("training",),
)
HEAVY = {"torch", "deepspeed", "transformers"}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def part(module: str) -> str:
    """The package of sdp_llm that a module belongs to, or its own name at the top level."""
    return module.split(".")[1] if "." in module else ""


FILES = sorted((ROOT / "sdp_llm").glob("**/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "sdp_llm")))
def test_imports_point_downwards(path: Path) -> None:
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":  # what the package offers
        return
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for module in imported(path):
        if module.split(".")[0] == "sdp_llm" and part(module) not in ("", own):
            assert level[part(module)] < level[own], f"{own} imports {module}"
        assert module.split(".")[0] not in ("launch", "data_prep", "benchmarks", "tests")


def test_a_wrong_config_fails_before_anything_heavy_is_imported() -> None:
    for path in FILES:
        if part(".".join(path.relative_to(ROOT).with_suffix("").parts)) in ("config", "plan"):
            assert not HEAVY & {module.split(".")[0] for module in imported(path)}, path


COLLECTIVES = {
    f"dist.{name}"
    for name in ("all_reduce", "all_gather_object", "all_gather_single", "barrier", "broadcast")
}
# Whoever calls these waits, for what only the caller can name.
CALLED_WAITING = {"sharding/collectives.py", "sharding/norm.py"}


def unnoted(tree: ast.AST, is_noted: bool = False) -> Iterator[ast.Call]:
    """The calls of collectives that no ``with ACTIVITY.waiting(...)`` is around."""
    if isinstance(tree, ast.With):
        is_noted |= any("ACTIVITY.waiting" in ast.unparse(item) for item in tree.items)
    if isinstance(tree, ast.Call) and not is_noted and ast.unparse(tree.func) in COLLECTIVES:
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from unnoted(child, is_noted)


def test_the_watchdog_knows_of_every_wait_for_other_ranks() -> None:
    """Where a collective is not noted, a rank that another tears out of it blames itself."""
    for path in FILES:
        if str(path.relative_to(ROOT / "sdp_llm")) not in CALLED_WAITING:
            calls = unnoted(ast.parse(path.read_text(encoding="utf-8")))
            assert [ast.unparse(call) for call in calls] == [], path
