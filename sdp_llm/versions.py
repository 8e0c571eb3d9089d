"""The versions of what a result depends on."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from sdp_llm.errors import ConfigError

PACKAGES = ("sdp_llm", "torch", "deepspeed", "transformers", "datasets", "accelerate")
# What training needs, as pyproject.toml has it.
OLDEST = {"torch": "2.13", "deepspeed": "0.19.8", "transformers": "5.23", "accelerate": "1.15"}


def versions() -> dict[str, str | None]:
    """Of Python and of each package; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def check_versions(found: Mapping[str, str | None]) -> None:
    """Check that what training needs is installed and recent enough.

    :param found: of :func:`versions`.
    :raises ConfigError: naming the first package that is not.
    """
    for name, oldest in OLDEST.items():
        installed = found.get(name)
        if installed is None or _release(installed) < _release(oldest):
            raise ConfigError(
                f"{name} {installed or 'is not installed'}: {oldest} or newer is needed; install "
                "it into the environment that runs this, as with: pip install -r requirements.txt"
            )


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version such as 2.13.0+cpu, without what follows them."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
