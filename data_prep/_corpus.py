"""The corpus while it grows: appended to in the order of the source, resumable after any kill.

OUTPUT.partial holds ``state.json``, which says how much of the files beside it counts; what a
killed run wrote beyond that is cut off. Its folder ``complete`` becomes OUTPUT at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep._common import refuse_existing, remove_own, sync_tree
from data_prep._encoding import EncodedPiece
from data_prep._seen import HASH, SeenTexts, in_validation
from sdp_llm.data.indexed import write_index
from sdp_llm.errors import ConfigError
from sdp_llm.files import replace_text, sha256_of

SPLITS = ("train", "validation")
DUPLICATE = "duplicate"
_SAVE_SECONDS = 2.0  # between states: forcing files to the disk takes a while on some disks
_SLICE_TOKENS = 4 << 20  # copied at a time: bounds the memory of appending a piece


@dataclass
class Counts:
    """What went into one split: documents, tokens with their eos, bytes of text.

    ``largest_id`` and ``longest_document`` (in tokens) are -1 and 0 while it is empty.
    """

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    largest_id: int = -1
    longest_document: int = 0


@dataclass
class State:
    """What a run has committed.

    Attributes:
        settings: What decides the bytes of the output; a run continues only with the same.
        file_number: File of the next piece.
        part: Its number in that file.
        read: Rows of the source.
        dropped: Reason -> rows left out.
        failed_files: The files that could not be read whole, and why.
    """

    settings: dict[str, Any]
    file_number: int = 0
    part: int = 0
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    failed_files: list[dict[str, str]] = field(default_factory=list)
    splits: dict[str, Counts] = field(default_factory=lambda: {s: Counts() for s in SPLITS})

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(counts.tokens for counts in self.splits.values())

    @classmethod
    def from_json(cls, text: str) -> State:
        """Read what ``json.dumps(asdict(state))`` wrote."""
        values = json.loads(text)
        values["splits"] = {split: Counts(**counts) for split, counts in values["splits"].items()}
        return cls(**values)


class GrowingCorpus:
    """Appends encoded pieces to the token files of both splits.

    :param folder: OUTPUT.partial; what an earlier run committed there is continued.
    :param settings: see :class:`State`; JSON values.
    :param dtype: Of the token ids.
    :raises ConfigError: The folder was begun with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], dtype: npt.DTypeLike) -> None:
        self.folder = folder
        self.complete = folder / "complete"
        self.pieces = folder / "pieces"
        self._dtype = np.dtype(dtype)
        self.state = self._load_state(settings)
        self.complete.mkdir(exist_ok=True)
        self.pieces.mkdir(exist_ok=True)
        for leftover in self.pieces.glob("*.tmp"):
            leftover.unlink()
        self._seen = SeenTexts() if settings["dedup"] else None
        self._open_files = ExitStack()
        self._files = {path: self._reopen(path, size) for path, size in self._sizes().items()}
        if self._seen is not None:
            for hashes in self._saved_hashes():
                self._seen.add(hashes)
        self._committed: list[EncodedPiece] = []
        self.save()  # the settings count from now on: pieces may be left by this run

    def _load_state(self, settings: dict[str, Any]) -> State:
        try:
            state = State.from_json((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return State(settings)
        if not state.read and state.settings != settings:
            shutil.rmtree(self.pieces, ignore_errors=True)  # nothing is lost but a few pieces
            return State(settings)
        check_settings(self.folder, state.settings, settings)
        return state

    def _path(self, split: str, suffix: str) -> Path:
        if suffix == ".lengths":
            return self.folder / f"{split}.lengths"
        return self.complete / f"{split}_text_document{suffix}"

    def _sizes(self) -> dict[Path, int]:
        """The files that grow, and how many bytes of each count."""
        sizes = {}
        if self._seen is not None:
            sizes[self.folder / "hashes"] = self.state.documents * HASH.itemsize
        for split, counts in self.state.splits.items():
            sizes[self._path(split, ".bin")] = counts.tokens * self._dtype.itemsize
            sizes[self._path(split, ".lengths")] = counts.documents * 4
        return sizes

    def _reopen(self, path: Path, size: int) -> IO[bytes]:
        stream = self._open_files.enter_context(path.open("ab"))
        if path.stat().st_size < size:
            raise ConfigError(
                f"{path}: shorter than {self.folder / 'state.json'} says; remove {self.folder} "
                "to start again"
            )
        stream.truncate(size)
        return stream

    def _saved_hashes(self) -> Iterator[npt.NDArray[Any]]:
        with (self.folder / "hashes").open("rb") as stream:
            while data := stream.read(HASH.itemsize << 20):
                yield np.frombuffer(data, HASH)

    def append(self, piece: EncodedPiece, file: str, next_piece: tuple[int, int]) -> None:
        """Append the documents of a piece that are new, and count the others.

        :param file: What the manifest calls the file if it could not be read.
        :param next_piece: (file number, part) of the piece that follows.
        """
        limit = self.state.settings["max_documents"]
        room = piece.read if limit is None else min(piece.read, limit - self.state.read)
        rows = piece.rows()
        rows = rows[rows["position"] < room]
        self.state.read += room
        dropped = Counter(reason for at, reason in piece.dropped if at < room)
        if piece.failure is not None:
            self.state.failed_files.append({"file": file, "error": piece.failure})
        new = np.ones(len(rows), dtype=bool) if self._seen is None else self._seen.add(rows["hash"])
        dropped[DUPLICATE] += int((~new).sum())
        self.state.dropped = dict(dropped + Counter(self.state.dropped))
        if self._seen is not None:
            self._files[self.folder / "hashes"].write(rows["hash"][new].tobytes())
        fraction = self.state.settings["validation_fraction"]
        held_out = in_validation(rows["hash"], fraction)
        for split, chosen in (("train", new & ~held_out), ("validation", new & held_out)):
            self._append_split(split, rows, chosen, piece)
        self.state.file_number, self.state.part = next_piece
        self._committed.append(piece)
        if time.monotonic() >= self._next_save:
            self.save()

    def _append_split(
        self,
        split: str,
        rows: npt.NDArray[Any],
        chosen: npt.NDArray[np.bool_],
        piece: EncodedPiece,
    ) -> None:
        lengths = rows["tokens"][chosen]
        if not len(lengths):
            return
        counts = self.state.splits[split]
        counts.documents += len(lengths)
        counts.tokens += int(lengths.sum(dtype=np.int64))
        counts.utf8_bytes += int(rows["bytes"][chosen].sum())
        counts.longest_document = max(counts.longest_document, int(lengths.max()))
        self._files[self._path(split, ".lengths")].write(lengths.tobytes())
        ends = np.cumsum(rows["tokens"], dtype=np.int64)
        start = first = 0
        while first < len(rows):
            end = max(first + 1, int(np.searchsorted(ends, start + _SLICE_TOKENS, "right")))
            stop = int(ends[end - 1])
            if chosen[first:end].any():
                mask = np.repeat(chosen[first:end], rows["tokens"][first:end])
                tokens = piece.ids(self._dtype, start, stop)[mask]
                counts.largest_id = max(counts.largest_id, int(tokens.max()))
                self._files[self._path(split, ".bin")].write(tokens.tobytes())
            start, first = stop, end

    def save(self) -> None:
        """Make what was appended count, and remove the pieces that it came from."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        replace_text(self.folder / "state.json", json.dumps(asdict(self.state)))
        for piece in self._committed:
            piece.remove()
        self._committed.clear()
        self._next_save = time.monotonic() + _SAVE_SECONDS

    def close(self) -> None:
        """Close the files; what was not saved is lost. A save has nothing to do then."""
        self._files.clear()
        self._open_files.close()

    def finish(self, output: Path, manifest: dict[str, Any], say: Callable[[str], None]) -> None:
        """Write the indices and the manifest, and give the corpus its name ``output``.

        :param say: Told what is going on, since checksums of a large corpus take minutes.
        """
        self.save()
        self.close()
        self._seen = None  # most of the memory
        for split in SPLITS:
            say(f"writing the index of {split}")
            # The memory map must not outlive this: some disks remove no file that has one.
            write_index(self._path(split, ".idx"), self._lengths(split), self._dtype)
        files = {}
        for path in sorted(self.complete.glob("*_text_document.*")):
            say(f"checksum of {path.name}")
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        text = json.dumps({**manifest, "files": files}, indent=2)
        (self.complete / "manifest.json").write_text(text + "\n")
        sync_tree(self.complete)
        refuse_existing(output)
        self.complete.rename(output)
        remove_own(self.folder)

    def _lengths(self, split: str) -> npt.NDArray[np.int32]:
        path = self._path(split, ".lengths")
        if not path.stat().st_size:  # which mmap refuses
            return np.empty(0, "<i4")
        return np.memmap(path, dtype="<i4", mode="r")


def check_settings(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError naming the first setting in which two runs into ``where`` differ.

    What the older one does not know yet is not compared.
    """
    for key, now in new.items():
        before = old.get(key, now)
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list):
            pairs = enumerate(zip_longest(before, now))
            at, (before, now) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
            key = f"{key}[{at}]"
        raise ConfigError(
            f"--output: {where} was begun with {key} = {json.dumps(before)}, now it is "
            f"{json.dumps(now)}; give the same, another --output, or remove {where}"
        )
