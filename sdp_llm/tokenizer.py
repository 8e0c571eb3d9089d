"""A tokenizer read from a local folder; nothing is fetched and none of its own code runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdp_llm.errors import ConfigError


def read_tokenizer(folder: str | Path, key: str, fix: str) -> Any:
    """transformers' tokenizer in ``folder``.

    :param key: what names the folder, and its value, for the message.
    :param fix: what to do when there is none.
    :raises ConfigError: when there is none, or it would need code that comes with it.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{key}: no such folder; {fix}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise ConfigError(
            f"{key}: not a tokenizer: {said_by_transformers(error)}; {fix}"
        ) from error


def largest_id(tokenizer: Any) -> tuple[str, int]:
    """The piece with the largest id, which may be ``len(tokenizer)`` or more: ids may have gaps."""
    piece, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return str(piece), int(largest)


def said_by_transformers(error: Exception) -> str:
    """Why transformers cannot read a folder, in a few words."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        # Its advice is to run the code.
        return "it needs code that comes with it, which is never run"
    if "instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json"
    first = text.split(". ")[0].removesuffix(".")
    return first[:200] if " " in first else f"{type(error).__name__} {first[:200]}".strip()
