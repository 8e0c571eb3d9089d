"""Train a sentencepiece tokenizer with LLaMA's conventions, as a folder AutoTokenizer loads.

Byte-pair encoding with byte fallback, digits split, no normalisation, ids unk/bos/eos = 0/1/2 and
no padding token. Lines are the training sentences, as for LLaMA, so that a newline is the byte
token <0x0A>.

Decoding gives the text back exactly, but for what the conventions themselves cannot hold: one
leading space is lost, and U+2581 (the piece that stands for a space) becomes a space.

``--from_model`` converts an existing tokenizer.model of this kind instead of training one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from data_prep._common import Progress, left_out, new_output, note, refuse_existing, run_script
from data_prep._pieces import Limits
from data_prep._reading import (
    Document,
    UnreadableFile,
    Unusable,
    decode_record,
    read_footer,
    read_records,
    read_rows,
)
from data_prep._source import Source, SourceFile, find_source, refuse_output_within
from data_prep._tokenizer import encode_plain, load_tokenizer
from sdp_llm.cli import Parser
from sdp_llm.errors import ConfigError

_MAX_LINE = 1 << 20  # bytes; sentencepiece leaves longer lines out, without a word
_MAX_RECORD = Limits(text_bytes=8_000_000).record_bytes  # as much as is tokenized by default
_MANY_FILES = 50  # of more, some are read: to open one on the hub may fetch 32 MiB
_HELD_OUT_ONE_IN = 50  # documents kept from training for the round trip
_HELD_OUT_BYTES = 1_000_000
_PROBES = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "def f(x):\n\treturn {x: 'ä', 'naïve': 0.25}\n\nGrüße, 世界! \U0001f600",
    "Text may spell </s>, <s>, <unk> or <0x41> without meaning them.",
]

T = TypeVar("T")


def read_spread(source: Source, file: SourceFile, column: str) -> Iterator[Document]:
    """Yield the documents of a file such that a few of them come from all over a parquet file.

    Other formats can only be read from their start.

    :raises UnreadableFile: The file is corrupt or has no such column.
    """
    if file.format != "parquet":
        for record in read_records(source, file, column, _MAX_RECORD):
            yield decode_record(record, file, column)
        return
    for group in spread(range(read_footer(source, file, column).row_groups)):
        yield from read_rows(source, file, column, range(group, group + 1))


def spread(items: Sequence[T]) -> list[T]:
    """The items in another order, of which any number from the start is spread over all."""
    # Multiples of the golden ratio spread evenly, however few of them are taken.
    places = sorted(range(len(items)), key=lambda number: number * 0.6180339887498949 % 1)
    return [items[place] for place in places]


def sample_documents(
    sources: list[Source], text_column: str, max_bytes: int
) -> tuple[list[str], list[str]]:
    """Read about ``max_bytes`` of UTF-8: an equal share of each file.

    What a short file leaves over goes to the files after it. Of many files a share is at least a
    50th of the whole, so that some, spread over all, are read and others are not.

    :returns: (training documents, held-out documents); a document's own hash says which it is.
    :raises ConfigError: A file cannot be read, or there is no text.
    """
    training: list[str] = []
    held_out: list[str] = []
    progress = Progress("train_tokenizer")
    dropped: Counter[str] = Counter()
    total = held_bytes = 0
    files = [(source, file) for source in sources for file in source.files]
    least = 0
    if len(files) > _MANY_FILES:
        files, least = spread(files), max_bytes // _MANY_FILES
    for position, (source, file) in enumerate(files):
        if total >= max_bytes:
            break
        limit = total + max(least, (max_bytes - total) // (len(files) - position))
        for text in _texts(source, file, text_column, dropped):
            data = text.encode("utf-8", "replace")
            digest = hashlib.blake2b(data, digest_size=8).digest()
            if int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0:
                if held_bytes < _HELD_OUT_BYTES:
                    held_out.append(data.decode())
                    held_bytes += len(data)
                continue
            training.append(data.decode())
            total += len(data)
            progress.update(f"read {len(training)} documents, {total / 1e6:.1f} MB")
            if total >= limit:
                break
    if not training:
        reason = f"; left out: {left_out(dropped)}" if dropped else ""
        raise ConfigError(f"--input: no text in {', '.join(f.path for _, f in files)}{reason}")
    if dropped:
        note(f"train_tokenizer: left out: {left_out(dropped)}")
    if not held_out:  # a handful of documents: the last one is better than no check
        held_out.append(training.pop() if len(training) > 1 else training[0])
    progress.update(f"read {len(training)} documents, {total / 1e6:.1f} MB", last=True)
    return training, held_out


def _texts(source: Source, file: SourceFile, column: str, dropped: Counter[str]) -> Iterator[str]:
    """Yield the texts of a file; what is none is counted in ``dropped``."""
    try:
        for document in read_spread(source, file, column):
            if isinstance(document, Unusable):
                dropped[document.value] += 1
            elif not document.strip():
                dropped[Unusable.EMPTY.value] += 1
            else:
                yield document
    except UnreadableFile as error:
        raise ConfigError(f"--input {file.path}: {error}") from error


def _sentences(text: str) -> Iterator[str]:
    """Yield the lines of a text, those that are too long for sentencepiece in parts."""
    size = _MAX_LINE // 4  # characters of up to four bytes
    for line in text.split("\n"):
        for start in range(0, len(line), size):
            yield line[start : start + size]


@contextmanager
def _heartbeat(progress: Progress, message: str) -> Iterator[None]:
    """Show that a call into a library is alive; sentencepiece trains without holding the GIL."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(1.0):
            progress.update(f"{message}, {progress.seconds:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def train_sentencepiece(documents: list[str], vocab_size: int) -> bytes:
    """Train on the lines of ``documents``; returns the bytes of tokenizer.model.

    :raises ConfigError: The text does not support ``vocab_size`` pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in documents for line in _sentences(text))
    progress = Progress("train_tokenizer")
    try:
        with _heartbeat(progress, f"training {vocab_size} pieces"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.99995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=True,
                max_sentence_length=_MAX_LINE,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise _vocabulary_error(str(error), vocab_size) from error
    progress.update(f"trained {vocab_size} pieces in {progress.seconds:.0f} s", last=True)
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int) -> ConfigError:
    if found := re.search(r"too high.*?value <= (\d+)", message):
        rule = f"this text yields at most {found[1]} pieces; lower it or give more text"
    elif found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        rule = f"bytes and characters alone need {found[1]}; raise it"
    else:
        rule = f"sentencepiece refused: {' '.join(message.split())[:300]}"
    return ConfigError(f"--vocab_size {vocab_size}: {rule}")


def to_transformers(model: bytes) -> Any:
    """Convert the bytes of a sentencepiece BPE model to transformers' fast LlamaTokenizer.

    Done here and not by ``AutoTokenizer`` on tokenizer.model, for two reasons: that needs
    protobuf, and it lets text such as ``</s>`` be merged into the control token. ``add_bos_token``
    is off because the corpus has no bos: prompts must look like the text the model was trained on.
    """
    import sentencepiece
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(i): i for i in ids}
    markup = [
        pieces.id_to_piece(i)
        for i in ids
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)
    ]
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, None, markup),
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        bos_token=pieces.id_to_piece(pieces.bos_id()),
        eos_token=pieces.id_to_piece(pieces.eos_id()),
        add_bos_token=False,
        add_eos_token=False,
    )


def decoded_form(text: str) -> str:
    """Return what decoding the ids of ``text`` must give; see the module's docstring."""
    return text.replace("\u2581", " ").removeprefix(" ")


def check_tokenizer(folder: Path, texts: list[str]) -> Any:
    """Load ``folder`` with AutoTokenizer and check that texts survive encoding and decoding.

    :returns: The tokenizer.
    :raises ConfigError: A text comes back changed, or the special ids are not 0, 1, 2.
    """
    tokenizer = load_tokenizer(folder)
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if special != (0, 1, 2):
        raise ConfigError(f"{folder}: unk/bos/eos ids are {special}, LLaMA's are (0, 1, 2)")
    for text, ids in zip(texts, encode_plain(tokenizer, texts), strict=True):
        if tokenizer.decode(ids) != decoded_form(text):
            raise ConfigError(f"{folder}: does not give back {text[:80]!r}; not a LLaMA tokenizer")
    return tokenizer


def _check_conversion(model: bytes, tokenizer: Any) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    if pieces.encode(_PROBES) != encode_plain(tokenizer, _PROBES):
        raise ConfigError("--from_model: not a BPE model without normalisation; LLaMA's kind is")


def _save(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        # What the tokenizers library makes of a full disk.
        raise OSError(f"{folder} cannot be written: {error}") from error


def build(arguments: argparse.Namespace) -> None:
    """Write the tokenizer folder ``--output``, complete or not at all."""
    refuse_existing(arguments.output)
    held_out = list(_PROBES)
    if arguments.from_model is not None:
        if not arguments.from_model.is_file():
            raise ConfigError(f"--from_model {arguments.from_model}: no such file")
        model = arguments.from_model.read_bytes()
    else:
        if arguments.vocab_size < 1:
            raise ConfigError(f"--vocab_size {arguments.vocab_size}: must be at least 1")
        if not 0 < arguments.sample_megabytes < math.inf:
            raise ConfigError(
                f"--sample_megabytes {arguments.sample_megabytes}: must be above 0, and finite"
            )
        for name in arguments.input:
            refuse_output_within(arguments.output, name, "--input")
        sources = [find_source(name, arguments.name, "--input") for name in arguments.input]
        limit = int(arguments.sample_megabytes * 1e6)
        training, held_out = sample_documents(sources, arguments.text_column, limit)
        model = train_sentencepiece(training, arguments.vocab_size)
    with new_output(arguments.output) as folder:
        try:
            tokenizer = to_transformers(model)
        except RuntimeError as error:
            raise ConfigError(f"--from_model: not a sentencepiece model: {error}") from error
        _save(tokenizer, folder)
        (folder / "tokenizer.model").write_bytes(model)
        tokenizer = check_tokenizer(folder, held_out)
        if arguments.from_model is not None:
            _check_conversion(model, tokenizer)
    size = sum(len(text.encode()) for text in held_out)
    tokens = sum(len(ids) for ids in encode_plain(tokenizer, held_out))
    print(
        f"{arguments.output}: {len(tokenizer)} pieces; {len(held_out)} held-out texts come back "
        f"from their ids, {size / tokens:.2f} bytes per token"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", help="files, folders or globs of text, or a dataset on the hub"
    )
    source.add_argument("--from_model", type=Path, help="convert this tokenizer.model instead")
    parser.add_argument("--name", help="configuration of the hub dataset, such as sample-10BT")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab_size", type=int, default=8192, help="pieces (default 8192)")
    parser.add_argument(
        "--sample_megabytes", type=float, default=50.0, help="UTF-8 text to train on (default 50)"
    )
    parser.add_argument("--text_column", default="text", help="column of the text (default text)")
    return run_script("train_tokenizer", build, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
