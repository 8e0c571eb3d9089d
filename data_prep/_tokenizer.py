"""The tokenizer that a corpus is made with and the trained model is exported with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdp_llm.errors import ConfigError
from sdp_llm.tokenizer import largest_id, read_tokenizer

_LARGEST_ID = 2**31 - 1  # of the int32 in Megatron's format


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that the trained model is exported with: ``AutoTokenizer``'s, from disk.

    :raises ConfigError: The folder is missing, or transformers cannot load a fast tokenizer from
        it.
    """
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        # transformers would convert it each time, and needs protobuf for that.
        raise ConfigError(
            f"--tokenizer {folder}: has tokenizer.model but no tokenizer.json; convert it with "
            f"`python data_prep/train_tokenizer.py --output DIR "
            f"--from_model {folder}/tokenizer.model`"
        )
    fix = "make one with `python data_prep/train_tokenizer.py`"
    tokenizer = read_tokenizer(folder, f"--tokenizer {folder}", fix)
    if not tokenizer.is_fast:
        raise ConfigError(f"--tokenizer {folder}: has no tokenizer.json (a fast tokenizer); {fix}")
    if not (folder / "tokenizer.json").is_file():
        # Its SHA-256 tells corpora of different tokenizers apart.
        raise ConfigError(
            f"--tokenizer {folder}: has no tokenizer.json; load it with AutoTokenizer of "
            "transformers and call save_pretrained(DIR), which writes one"
        )
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """Return the ids that a model needs.

    :raises ConfigError: An id is larger than token files can hold.
    """
    piece, largest = largest_id(tokenizer)
    if largest > _LARGEST_ID:
        raise ConfigError(
            f"--tokenizer {tokenizer.name_or_path}: gives {piece!r} the id {largest}, token files "
            f"hold at most {_LARGEST_ID}; mend its tokenizer.json"
        )
    return largest + 1


def encode_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text: no bos or eos added, and no markup read from the text.

    :returns: Token ids, one list per text.
    """
    return encode_with_backend(tokenizer.backend_tokenizer, texts)


def encode_with_backend(backend: Any, texts: list[str]) -> list[list[int]]:
    """Do what :func:`encode_plain` does, with the ``backend_tokenizer`` of a tokenizer.

    A document that spells out ``</s>`` gets the tokens of these four characters; it must not be
    able to write the separator of documents. Calling the backend directly skips offsets and masks:
    about a third faster than calling the tokenizer. It can be sent to another process, which then
    need not import transformers.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # lost when it is sent
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
