"""Extract a small English corpus that every Python installation carries, without a network.

Sources: docstrings of the standard library and of the installed packages (parsed with ``ast``,
never imported), the language reference in ``pydoc_data/topics.py``, and the descriptions and
licenses of the installed distributions. One document per module, as JSON lines
``{"text": ..., "source": ...}``.

The documents come in the order of a hash of their names: the same for the same installation, and
an even sample of all packages wherever ``--max_megabytes`` cuts it.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import inspect
import json
import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from data_prep._common import Progress, new_output, run_script
from sdp_llm.cli import Parser
from sdp_llm.errors import ConfigError

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests"}
_MIN_DOCSTRING = 24  # characters; shorter ones are mostly "See above."
_MIN_DOCUMENT = 200  # characters
_MAX_LICENSE = 20_000  # characters; a few vendored license files are megabytes
_LICENSE_SHARE = 0.02  # of the corpus: they are many and much alike


def list_sources() -> list[tuple[str, Path]]:
    """Return (name, path) of every candidate file, ordered by a hash of the name.

    Names are relative to the folder that is searched, so that they do not depend on where Python
    is installed.
    """
    roots = {"stdlib": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
    sources = []
    for label, root in roots.items():
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [f for f in subfolders if f not in _SKIPPED_FOLDERS]
            for file in files:
                path = Path(folder, file)
                if file.endswith(".py") or path.parent.suffix == ".dist-info" or _is_license(path):
                    sources.append((f"{label}/{path.relative_to(root).as_posix()}", path))
    return sorted(sources, key=lambda source: hashlib.sha256(source[0].encode()).digest())


def _is_license(path: Path) -> bool:
    inside = any(part.endswith(".dist-info") for part in path.parts)
    return inside and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the cleaned docstrings of a module, outermost first; nothing if it does not parse."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # templates and code for other Python versions are part of real installations
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
            pending.extend(reversed(node.body))


def topics(source: bytes) -> Iterator[str]:
    """Yield the texts of ``pydoc_data/topics.py``: the values of its one dictionary."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield inspect.cleandoc(value.value)


def read_pieces(name: str, path: Path) -> Iterator[str]:
    """Yield the pieces of text of one file; see the module's docstring for which."""
    try:
        source = path.read_bytes()
    except OSError:
        return  # a dangling link or an unreadable file is no reason to stop
    if name.endswith("pydoc_data/topics.py"):
        yield from topics(source)
    elif name.endswith(".py"):
        yield from docstrings(source)
    elif path.name == "METADATA":
        # Headers, a blank line, the project's README.
        yield source.decode("utf-8", errors="ignore").partition("\n\n")[2].strip()
    elif _is_license(path):
        yield source.decode("utf-8", errors="ignore")[:_MAX_LICENSE].strip()


def documents(max_bytes: int, progress: Progress) -> Iterator[dict[str, str]]:
    """Yield ``{"text", "source"}`` until the texts reach ``max_bytes`` of UTF-8.

    A piece of text (one docstring) appears once, in the first module that has it.
    """
    seen: set[bytes] = set()
    total = licenses = count = 0
    for name, path in list_sources():
        is_license = _is_license(path)
        if is_license and licenses > _LICENSE_SHARE * max_bytes:
            continue
        pieces = []
        for piece in read_pieces(name, path):
            key = hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=16).digest()
            if len(piece) >= _MIN_DOCSTRING and key not in seen:
                seen.add(key)
                pieces.append(piece)
        # "replace": a docstring may spell a lone surrogate, which no UTF-8 file can hold.
        text = "\n\n".join(pieces).encode("utf-8", "replace").decode()
        if len(text) < _MIN_DOCUMENT:
            continue
        size = len(text.encode())
        total, count, licenses = total + size, count + 1, licenses + size * is_license
        yield {"text": text, "source": name}
        progress.update(f"{count} documents, {total / 1e6:.1f} of {max_bytes / 1e6:.1f} MB")
        if total >= max_bytes:
            return


def write_corpus(arguments: argparse.Namespace) -> None:
    """Write ``--output`` and print what is in it."""
    if not 0 < arguments.max_megabytes < math.inf:
        raise ConfigError(f"--max_megabytes {arguments.max_megabytes}: must be above 0, and finite")
    output: Path = arguments.output
    progress = Progress("python_corpus")
    count = size = 0
    warnings.simplefilter("ignore")  # invalid escapes in other people's code
    gc.disable()  # syntax trees hold no cycles; collecting them takes half of the time
    try:
        with new_output(output) as made, made.open("w", encoding="utf-8") as stream:
            for document in documents(int(arguments.max_megabytes * 1e6), progress):
                stream.write(json.dumps(document, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(document["text"].encode())
    finally:
        gc.enable()
    progress.update(f"done in {progress.seconds:.0f} s", last=True)
    print(f"{output}: {count} documents, {size / 1e6:.2f} MB of text")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--max_megabytes", type=float, default=6.0, help="UTF-8 text to collect (default 6)"
    )
    return run_script("python_corpus", write_corpus, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
