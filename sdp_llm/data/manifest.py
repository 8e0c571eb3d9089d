"""What ``data_prep`` notes about a corpus: ``manifest.json`` in the corpus's folder.

Read here are ``tokenizer.eos_id``, ``tokenizer.sha256`` (of its tokenizer.json),
``splits.<name>.largest_id`` and ``files.<file name>.bytes``. All of it is optional, because corpora
also come from other tools; a file that is no JSON object, and values of another type, count as
not there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUFFIX = "_text_document"


@dataclass(frozen=True)
class Manifest:
    """The notes on one corpus.

    :param prefix: path of the corpus without ``.bin`` and ``.idx``.
    :param notes: what its manifest holds; empty where there is none.
    """

    prefix: Path
    notes: dict[str, Any]

    @property
    def eos_id(self) -> int | None:
        """The id that ends every document."""
        return self._find(int, "tokenizer", "eos_id")

    @property
    def tokenizer_sha256(self) -> str | None:
        """The SHA-256 of the tokenizer.json that the corpus was made with, in hexadecimal."""
        return self._find(str, "tokenizer", "sha256")

    @property
    def largest_id(self) -> int | None:
        """The largest token id of the corpus.

        None unless the sizes of its files are those of the manifest: another corpus may have been
        put in their place.
        """
        for suffix in (".bin", ".idx"):
            path = Path(f"{self.prefix}{suffix}")
            if self._find(int, "files", path.name, "bytes") != path.stat().st_size:
                return None
        return self._find(int, "splits", self.prefix.name.removesuffix(_SUFFIX), "largest_id")

    def _find(self, kind: type, *keys: str) -> Any:
        node: Any = self.notes
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        # In Python True is an int.
        return node if isinstance(node, kind) and not isinstance(node, bool) else None


def read_manifest(prefix: str | os.PathLike[str]) -> Manifest:
    """The notes on the corpus at ``prefix``."""
    path = Path(prefix)
    try:
        notes = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        notes = {}
    return Manifest(path, notes if isinstance(notes, dict) else {})
