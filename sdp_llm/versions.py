"""The versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("sdp_llm", "torch", "deepspeed", "transformers", "datasets", "accelerate")


def versions() -> dict[str, str | None]:
    """Of Python and of each package; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
