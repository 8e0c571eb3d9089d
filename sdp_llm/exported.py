"""An exported model, read whole as anybody would read it: by transformers, from a local folder."""

from __future__ import annotations

from typing import Any

from sdp_llm.errors import ConfigError
from sdp_llm.tokenizer import said_by_transformers


def load_exported(folder: str) -> Any:
    """The model in the folder that ``--model`` names; of safetensors only, and none of its code.

    :raises ConfigError: when it is none, or a file is missing or damaged.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from sdp_llm.subnetwork.measure import load_model_config

    config = load_model_config(folder, "--model")
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise ConfigError(
            f"--model {folder}: cannot be read as a model: {said_by_transformers(error)}; export "
            "it again with python launch/export.py"
        ) from error
