"""A hub on this machine: as much of the HuggingFace hub's HTTP API as `datasets` asks for.

A folder is served as one dataset repository at one revision. Clients read where the hub is when
they are imported, so each is a process of its own, with :meth:`HubServer.environment`::

    with HubServer(folder, faults={"GET */000.parquet": [429, DROPPED]}) as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
    assert hub.count("GET */000.parquet") == 3
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers

_SHORT_SLEEP = """import time
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, {}))
"""

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What the hub answers in place of the right answer.

    Attributes:
        status: HTTP status; 200 stands for the right answer, cut short.
        headers: More headers, such as ``{"Retry-After": "0"}``.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


Faults = Mapping[str, Iterable[int | Fault]]

DROPPED = Fault(200)  # the connection ends after half of the body
GATED = Fault(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access."})


class HubServer:
    """Serve ``folder`` as the dataset ``repository``, from the ``with`` on until its end.

    :param folder: The files of the repository, with its README.md.
    :param repository: ``organization/name``.
    :param faults: Pattern -> the faults that the first requests which match it meet, one each; an
        int stands for a Fault of that status. A pattern is matched with "METHOD /path", such as
        ``GET */000.parquet`` or ``* /api/*``; the path has no query and no escapes.
        ``itertools.repeat(503)`` never ends.
    :param newest: The commit of main; the same files are at REVISION, too.
    """

    def __init__(
        self,
        folder: Path,
        repository: str = "org/name",
        faults: Faults | None = None,
        newest: str = REVISION,
    ) -> None:
        self.folder = folder
        self.newest = newest
        self.repository = repository
        self._faults: dict[str, Iterator[int | Fault]] = {
            pattern: iter(kinds) for pattern, kinds in (faults or {}).items()
        }
        self._lock = threading.Lock()
        self._requests: list[tuple[str, int]] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(
            # Asked every 10 ms whether to stop; the default of 0.5 s is what a test would wait.
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.01},
        )

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, longest_sleep: float | None = None) -> dict[str, str]:
        """Return a client's environment: this one, with this hub and no other host.

        :param home: Folder for the client's caches; made when it is missing.
        :param longest_sleep: Seconds that ``time.sleep`` takes at most, in the client and in the
            processes that it starts. The waits before retries have no other setting.
        """
        made = {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else `datasets` asks a bucket on S3
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if longest_sleep is not None:
            startup = home / "startup"  # Python imports sitecustomize before anything else
            startup.mkdir(parents=True, exist_ok=True)
            (startup / "sitecustomize.py").write_text(_SHORT_SLEEP.format(longest_sleep))
            others = os.environ.get("PYTHONPATH")
            made["PYTHONPATH"] = f"{startup}{os.pathsep}{others}" if others else str(startup)
        return made

    @property
    def requests(self) -> list[tuple[str, int]]:
        """The requests in the order of their arrival: "METHOD /path" and the status answered."""
        with self._lock:
            return list(self._requests)

    def count(self, pattern: str) -> int:
        """How many requests matched ``pattern``, faults included."""
        return sum(fnmatchcase(request, pattern) for request, _ in self.requests)

    def next_fault(self, request: str) -> Fault | None:
        """Take the next fault of the first pattern that ``request`` matches and that has any."""
        with self._lock:
            for pattern, kinds in self._faults.items():
                if fnmatchcase(request, pattern) and (kind := next(kinds, None)) is not None:
                    return kind if isinstance(kind, Fault) else Fault(kind)
        return None

    def record(self, request: str, status: int) -> None:
        """Remember one request for :attr:`requests`."""
        with self._lock:
            self._requests.append((request, status))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a client went away: tests kill some in mid-answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and body go out as two writes; without this the second waits 40 ms for an ACK.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; ``HubServer.requests`` has the log."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {path}"
        fault = self.server.hub.next_fault(request)
        if fault is not None and fault.status != 200:
            answer = fault.status, b"", dict(fault.headers)
        else:
            answer = self._right_answer(path, query, body)
        self.server.hub.record(request, answer[0])
        self._send(*answer, cut=fault is not None and fault.status == 200)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def _right_answer(self, path: str, query: dict[str, list[str]], body: bytes) -> _Answer:
        hub = self.server.hub
        if path.startswith(resolve := f"/datasets/{hub.repository}/resolve/"):
            revision, _, inner = path.removeprefix(resolve).partition("/")
            return self._known(revision) or self._file(inner, self._commit(revision))
        api = f"/api/datasets/{hub.repository}"
        if path == api:
            return _json(self._info("main"))
        route = re.fullmatch(rf"{re.escape(api)}/(revision|tree|paths-info)/([^/]+)/?(.*)", path)
        if route is None:
            return _missing("RepoNotFound")
        kind, revision, inner = route.groups()
        if (unknown := self._known(revision)) is not None:
            return unknown
        if kind == "revision":
            return _json(self._info(revision))
        if kind == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return _json([e for e in self._entries("", recursive=True) if e["path"] in wanted])
        if not (hub.folder / inner).is_dir():
            return _missing("EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        return _json(self._entries(inner, recursive))

    def _known(self, revision: str) -> _Answer | None:
        known = ("main", REVISION, self.server.hub.newest)
        return None if revision in known else _missing("RevisionNotFound")

    def _commit(self, revision: str) -> str:
        return self.server.hub.newest if revision == "main" else revision

    def _info(self, revision: str) -> dict[str, Any]:
        files = [e for e in self._entries("", recursive=True) if e["type"] == "file"]
        return {
            "id": self.server.hub.repository,
            "sha": self._commit(revision),
            "private": False,
            "gated": False,
            "siblings": [{"rfilename": e["path"], "size": e["size"]} for e in files],
        }

    def _entries(self, inner: str, recursive: bool) -> list[dict[str, Any]]:
        root = self.server.hub.folder
        found = (root / inner).rglob("*") if recursive else (root / inner).iterdir()
        entries = []
        for path in sorted(found):
            name, folder = path.relative_to(root).as_posix(), path.is_dir()
            entries.append(
                {
                    "type": "directory" if folder else "file",
                    "path": name,
                    "size": 0 if folder else path.stat().st_size,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
            )
        return entries

    def _file(self, inner: str, commit: str) -> _Answer:
        path = self.server.hub.folder / inner
        if not path.is_file():
            return _missing("EntryNotFound")
        content = path.read_bytes()
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            return 200, b"", {**headers, "Content-Length": str(len(content))}
        wanted = _range(self.headers, len(content))
        if wanted is None:
            return 200, content, headers
        start, stop = wanted
        if start >= stop:
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"}
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop], headers


def _range(headers: Message, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that a request names, or None where it wants all."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if match is None:
        return None
    last = int(match[2]) if match[2] else size - 1
    return int(match[1]), min(last + 1, size)


def _json(value: Any) -> _Answer:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _missing(code: str) -> _Answer:
    # The hub tells 404s apart by this header, and the client raises another error for each.
    return 404, b"", {"X-Error-Code": code, "X-Error-Message": code}
