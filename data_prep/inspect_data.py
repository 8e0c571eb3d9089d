"""Look into token files, and check that they are what was written.

``FOLDER`` is the output of ``tokenize_fineweb.py``, another folder with PREFIX.bin and PREFIX.idx
in Megatron's format, or one such PREFIX. Prints how much is in it, how long the documents are and
what a few of them say, and compares every file with the size and the SHA-256 in ``manifest.json``.

The status is 0 when all agrees, 1 when something does not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from data_prep._common import Progress, run_script
from data_prep._tokenizer import load_tokenizer, vocabulary_size
from data_prep._verify import (
    MANIFEST,
    SUFFIX,
    Corpora,
    find_corpora,
    printable,
    split_of,
    wrong_counts,
    wrong_sizes,
    wrong_sums,
)
from sdp_llm.cli import Parser
from sdp_llm.data.indexed import IndexedDataset
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of

_SCRIPT = "inspect_data"
_CHUNK_DOCUMENTS = 1 << 20  # binned at a time: bounds the memory
_EXCERPT = 400  # characters, and so tokens at most, shown of a document
_EXCERPT_LINES = 12
_WIDTH = 94  # characters of a line of an excerpt
_BAR = 20  # characters of the longest bar of a histogram


@dataclass
class Lengths:
    """How long documents are, by powers of two.

    Attributes:
        documents: Documents per bin, int64. Bin b holds lengths of b bits, [2^(b-1), 2^b).
        tokens: Tokens per bin, int64.
        longest: Prefix -> tokens of its longest document.
    """

    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    longest: dict[str, int]


def measure_lengths(opened: dict[str, IndexedDataset]) -> Lengths:
    """Bin the lengths of the documents of all corpora together."""
    found = Lengths(np.zeros(64, np.int64), np.zeros(64, np.int64), {})
    for name, data in opened.items():
        lengths = data.document_lengths()
        found.longest[name] = int(lengths.max(initial=0))
        for start in range(0, len(lengths), _CHUNK_DOCUMENTS):
            some = lengths[start : start + _CHUNK_DOCUMENTS]
            bins = np.frexp(some)[1]  # the exponent is the number of bits
            found.documents += np.bincount(bins, minlength=64)
            # Weights are added up in float64, which is exact below 2^53.
            found.tokens += np.bincount(bins, weights=some, minlength=64).astype(np.int64)
    return found


def print_counts(
    corpora: Corpora, opened: dict[str, IndexedDataset], longest: dict[str, int]
) -> None:
    """Print a line for each corpus, and what the manifest says of their source."""
    manifest = corpora.manifest
    columns = "{:<16} {:>13} {:>17} {:>17} {:>11} {:>10} {:>11} {:>7}".format
    print(columns("", "documents", "tokens", "UTF-8 bytes", "bytes/token", "mean length",
                  "longest", "ids"))  # fmt: skip
    for name, data in opened.items():
        documents, tokens = data.num_documents, data.num_tokens
        counted = manifest["splits"].get(split_of(name), {}) if manifest else {}
        size = counted.get("utf8_bytes")
        print(
            columns(
                printable(split_of(name)),
                f"{documents:,}",
                f"{tokens:,}",
                "n/a" if size is None else f"{size:,}",
                "n/a" if size is None or not tokens else f"{size / tokens:.3f}",
                f"{tokens / documents:,.1f}" if documents else "n/a",
                f"{longest[name]:,}",
                data.dtype.name,
            )
        )
    if manifest is None:
        return
    source = [manifest["settings"].get(key) for key in ("source", "name", "revision")]
    dropped = [f"{count:,} {reason}" for reason, count in manifest["dropped"].items()]
    print(printable(f"source        {', '.join(str(part) for part in source if part)}"))
    print(f"read          {manifest['documents_read']:,} documents")
    print(printable(f"dropped       {', '.join(dropped) or 'none'}"))
    print(f"failed files  {len(manifest['failed_files']) or 'none'}")
    for failed in manifest["failed_files"]:
        print(printable(f"  {failed.get('file')}: {failed.get('error')}"))


def print_histogram(lengths: Lengths) -> None:
    """Print how documents and tokens are spread over the lengths of documents."""
    used = np.flatnonzero(lengths.documents)
    if not used.size:
        return
    line = "{:>24} {:>13} {:>9}  {:<20} {:>9}  {}".format
    print("\n" + line("tokens in a document", "documents", "share", "", "of tokens", "").rstrip())
    for b in range(used[0], used[-1] + 1):
        low, high = (1 << b) >> 1, (1 << b) - 1
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        documents, tokens = _share(lengths.documents, b), _share(lengths.tokens, b)
        print(line(label, f"{lengths.documents[b]:,}", *documents, *tokens).rstrip())
    print()


def _share(counts: npt.NDArray[np.int64], b: int) -> tuple[str, str]:
    """The share of bin b of all, and its bar."""
    bar = "█" * round(_BAR * counts[b] / max(int(counts.max()), 1))
    return f"{counts[b] / max(int(counts.sum()), 1):.2%}", bar


def find_tokenizer(given: Path | None, manifest: dict[str, Any] | None) -> Any | None:
    """Load the tokenizer that made the corpus; None, with a note, where it is not at hand.

    :raises ConfigError: The one of the command line cannot be loaded, or made another corpus.
    """
    made_with = manifest["tokenizer"] if manifest else {}
    folder = Path(str(made_with.get("path", ""))) if given is None else given
    file, digest = folder / "tokenizer.json", made_with.get("sha256")
    if given is None and not (made_with and file.is_file()):
        missing = f"{folder} is not here; " if made_with else ""
        print(printable(f"No document shown: {missing}give --tokenizer to decode them") + "\n")
        return None
    if digest is not None and file.is_file() and sha256_of(file) != digest:
        if given is not None:
            raise ConfigError(
                f"--tokenizer {folder}: not the one that made the corpus: the SHA-256 of its "
                f"tokenizer.json is not that in {MANIFEST}"
            )
        print(printable(f"No document shown: {folder} has changed; give --tokenizer") + "\n")
        return None
    return load_tokenizer(folder)


def print_documents(data: IndexedDataset, count: int, tokenizer: Any) -> list[str]:
    """Print the beginning of ``count`` documents, evenly spread from the first to the last.

    :returns: What is wrong with those that cannot be decoded.
    """
    wrong, lengths, size = [], data.document_lengths(), vocabulary_size(tokenizer)
    chosen = np.linspace(0, data.num_documents - 1, min(count, data.num_documents)).astype(int)
    for index in chosen.tolist():
        start, length = int(lengths[:index].sum()), int(lengths[index])
        ids = data.tokens(start, start + min(length, _EXCERPT))  # not all: it may be the whole file
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            wrong.append(
                f"{data.prefix}.bin: document {index} has ids from {ids.min()} to {ids.max()}, the "
                f"tokenizer has {size}: damaged, or made with another tokenizer"
            )
            continue
        text = tokenizer.decode(ids.tolist())
        lines = [
            part
            for line in text[:_EXCERPT].split("\n")
            for part in textwrap.wrap(printable(line.expandtabs(4)), _WIDTH) or [""]
        ]
        shown = "\n".join(lines[:_EXCERPT_LINES])
        if length > len(ids) or len(text) > _EXCERPT or len(lines) > _EXCERPT_LINES:
            # The cut may have split a character of several tokens, which decodes to U+FFFD.
            shown = shown.rstrip("\ufffd") + " ..."
        name = split_of(Path(data.prefix).name)
        print(f"{printable(name)}, document {index:,}, {length:,} tokens")
        print(textwrap.indent(shown, "    ") + "\n")
    return wrong


def inspect(arguments: argparse.Namespace) -> list[str]:
    """Print what is in the corpora; returns what does not agree with their manifest.

    :raises ConfigError: An argument is wrong, or the folder has nothing to inspect.
    """
    if arguments.documents < 0:
        raise ConfigError(f"--documents {arguments.documents}: must be at least 0")
    corpora = find_corpora(arguments.folder)
    wrong_files = wrong_sizes(corpora)
    wrong = list(wrong_files.values())
    opened = {}
    for name in corpora.names:
        try:
            opened[name] = IndexedDataset(corpora.folder / name)
        except ConfigError as error:
            if not wrong_files.keys() & {f"{name}.bin", f"{name}.idx"}:  # else it is said already
                wrong.append(str(error))
    lengths = measure_lengths(opened)
    if opened:
        print_counts(corpora, opened, lengths.longest)
        print_histogram(lengths)
    train = next((name for name in (f"train{SUFFIX}", *opened) if name in opened), None)
    if train and arguments.documents and opened[train].num_documents:
        tokenizer = find_tokenizer(arguments.tokenizer, corpora.manifest)
        if tokenizer is not None:
            wrong += print_documents(opened[train], arguments.documents, tokenizer)
    if corpora.manifest is None:
        print(printable(f"{arguments.folder}: nothing to verify against: no {MANIFEST} for it"))
        return wrong
    wrong += wrong_counts(corpora, opened, lengths.longest)
    if not arguments.no_verify:
        sys.stdout.flush()  # before the progress, which goes to stderr
        intact = [file for file in corpora.files() if file not in wrong_files]
        wrong += wrong_sums(corpora, intact, Progress(_SCRIPT))
    if not wrong:
        compared = "sizes and counts" if arguments.no_verify else "sizes, counts and SHA-256"
        print(printable(f"{arguments.folder}: {compared} agree with {MANIFEST}"))
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="output of tokenize_fineweb.py, or a PREFIX"
    )
    parser.add_argument(
        "--documents", type=int, default=3, help="how many of train to show (default 3)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of the tokenizer (default: as in manifest.json)"
    )
    parser.add_argument("--no_verify", action="store_true", help="skip the checksums")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # documents are in any script
    wrong: list[str] = []
    status = run_script(_SCRIPT, lambda a: wrong.extend(inspect(a)), parser.parse_args(argv))
    for problem in wrong:
        print(f"{_SCRIPT}: error: {printable(problem)}", file=sys.stderr)
    return status or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
