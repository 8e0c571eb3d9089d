"""The hub that other tests download from gets along with the real client libraries."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.hub import DROPPED, GATED, REVISION, Fault, Faults, HubServer

README = """---
configs:
- config_name: default
  data_files: [{split: train, path: sample/*/*}]
- config_name: sample-x
  data_files: [{split: train, path: sample/x/*}]
---
"""
ROWS = 20

# Lists the train split of sample-x, reads its first file in both ways, and prints the findings.
CLIENT = """
import json, sys
import pyarrow.parquet as pq
from datasets import load_dataset, load_dataset_builder
from huggingface_hub import HfFileSystem

files = list(load_dataset_builder("org/name", name="sample-x").config.data_files["train"])
hub = HfFileSystem()
with hub.open(files[0], block_size=1 << 20) as stream:
    texts = pq.read_table(stream, columns=["text"])["text"].to_pylist()
stream = load_dataset("parquet", data_files=files[:1], split="train", streaming=True)
print(json.dumps({
    "files": files,
    "sizes": [hub.info(file)["size"] for file in files],
    "texts": texts,
    "streamed": [row["text"] for row in stream],
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("repository")
    (made / "README.md").write_text(README)
    for name in ("x/000", "x/001", "y/000"):
        path = made / "sample" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{name} row {row}" for row in range(ROWS)]
        pq.write_table(pa.table({"text": texts, "id": list(range(ROWS))}), path)
    return made


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer(folder) as running:
        yield running


def get(hub: HubServer, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(hub.url + path, method=method, headers=headers)
    try:
        answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers, answer.read()


def test_clients_get_every_row_through_faults(tmp_path: Path, folder: Path) -> None:
    faults: Faults = {
        "GET */000.parquet": [429, Fault(429, {"Retry-After": "0"}), 503, DROPPED],
        "GET */tree/*": [502],
        "HEAD */README.md": [500],
    }
    with HubServer(folder, faults=faults) as hub:
        made = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env=hub.environment(tmp_path, longest_sleep=0.01),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    paths = [f"sample/x/{i:03}.parquet" for i in range(2)]
    assert found["files"] == [f"hf://datasets/org/name@{REVISION}/{path}" for path in paths]
    assert found["sizes"] == [(folder / path).stat().st_size for path in paths]
    assert found["texts"] == found["streamed"] == [f"x/000 row {row}" for row in range(ROWS)]
    assert "HTTP Error 429 thrown while requesting GET" in made.stderr
    assert "Rate limited. Waiting 1.0s" in made.stderr
    statuses = [status for request, status in hub.requests if request.endswith("000.parquet")]
    assert statuses[:5] == [429, 429, 503, 206, 206]
    assert hub.count("GET */000.parquet") == len(statuses)
    assert hub.count("* */001.parquet") == hub.count("* */y/000.parquet") == 0


def test_ranges(hub: HubServer, folder: Path) -> None:
    path = f"/datasets/org/name/resolve/{REVISION}/README.md"
    content = (folder / "README.md").read_bytes()
    status, headers, body = get(hub, path)
    assert (status, body, headers["X-Repo-Commit"]) == (200, content, REVISION)
    status, head, body = get(hub, path, "HEAD")
    assert (status, body, head["ETag"]) == (200, b"", headers["ETag"])
    assert head["Content-Length"] == str(len(content))
    for wanted, part in [("5-9", content[5:10]), ("7-", content[7:]), ("9-9999", content[9:])]:
        status, headers, body = get(hub, path, Range=f"bytes={wanted}")
        assert (status, body) == (206, part)
        assert headers["Content-Range"].endswith(f"/{len(content)}")
    assert get(hub, path, Range=f"bytes={len(content)}-")[0] == 416


def test_what_is_missing_is_named(hub: HubServer) -> None:
    missing = {
        f"/datasets/org/name/resolve/{REVISION}/none": "EntryNotFound",
        f"/api/datasets/org/name/tree/{REVISION}/none": "EntryNotFound",
        "/datasets/org/name/resolve/abc/README.md": "RevisionNotFound",
        "/api/datasets/org/name/revision/abc": "RevisionNotFound",
        "/api/datasets/org/other": "RepoNotFound",
        "/datasets/org/other/resolve/main/README.md": "RepoNotFound",
    }
    for path, code in missing.items():
        status, headers, _ = get(hub, path)
        assert (status, headers["X-Error-Code"]) == (404, code), path


def test_faults_come_in_order_and_are_counted(folder: Path) -> None:
    faults: Faults = {
        "GET */README.md": [429, GATED, DROPPED],
        "* /api/*": itertools.repeat(Fault(503, {"Retry-After": "7"})),
    }
    path = "/datasets/org/name/resolve/main/README.md"
    with HubServer(folder, faults=faults) as hub:
        assert get(hub, path, "HEAD")[0] == 200
        assert get(hub, path)[0] == 429
        status, headers, _ = get(hub, path)
        assert (status, headers["X-Error-Code"]) == (403, "GatedRepo")
        with pytest.raises(IncompleteRead):
            get(hub, path)
        assert get(hub, path)[0] == 200
        for _ in range(3):
            status, headers, _ = get(hub, "/api/datasets/org/name")
            assert (status, headers["Retry-After"]) == (503, "7")
        assert hub.count("GET */README.md") == 4
        assert hub.count("* /api/*") == 3
        assert [status for _, status in hub.requests] == [200, 429, 403, 200, 200, 503, 503, 503]
