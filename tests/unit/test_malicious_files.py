"""No file that the program reads can make it run code: the sentinel is never made.

Each file would make it if it were unpickled, imported, rendered or followed. Where the file cannot
be used without that, the error is a ConfigError; else what is not code of it is read.
"""

from __future__ import annotations

import builtins
import gzip
import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep._reading import read_records, read_rows
from data_prep._source import find_source
from sdp_llm.checkpoint.coverage import MASTER, tensor_key
from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.checkpoint.inspection import inspect_checkpoint
from sdp_llm.checkpoint.load import CheckpointReader, latest_tag
from sdp_llm.checkpoint.save import seal
from sdp_llm.config import parse_config
from sdp_llm.data import IndexedDataset
from sdp_llm.data.manifest import read_manifest
from sdp_llm.errors import ConfigError
from sdp_llm.exported import load_exported
from sdp_llm.files import sha256_of
from sdp_llm.subnetwork.adapter import empty_model
from sdp_llm.subnetwork.measure import load_model_config
from sdp_llm.subnetwork.pretrained import open_pretrained
from sdp_llm.tokenizer import read_tokenizer
from sdp_llm.training.checkpoints import clear_rubbish
from tests.integration.conftest import MODEL, Tiny
from tests.integration.test_checkpoint_commands import write_checkpoint
from tests.wrong.scene import write_model


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return exec, (self.code,)

    @property
    def code(self) -> str:
        return f"open({str(self._sentinel)!r}, 'w').close()"

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Payload]:
    """The payload, beside a person who says yes to whatever is asked."""
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    sentinel = tmp_path / "sentinel"
    yield Payload(sentinel)
    assert not sentinel.exists(), "code was run"
    assert not asked, "a person was asked whether to run code"


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the others would prove nothing."""
    pickle.loads(Payload(tmp_path / "sentinel").pickled)
    assert (tmp_path / "sentinel").exists()


# -- weights --------------------------------------------------------------------------------------


def open_weights(folder: Path) -> None:
    open_pretrained(str(folder), empty_model(LlamaConfig(**MODEL)))


def save_pickle(payload: Payload, path: Path) -> None:
    torch.save({"lm_head.weight": payload}, path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("load", [open_weights, lambda folder: load_exported(str(folder))])
def test_pickled_weights(name: str, load: Any, payload: Payload, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    save_pickle(payload, tmp_path / "model" / name)
    with pytest.raises(ConfigError, match="model"):
        load(tmp_path / "model")


@pytest.mark.parametrize("load", [open_weights, lambda folder: load_exported(str(folder))])
def test_a_pickle_that_is_called_safetensors(load: Any, payload: Payload, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    save_pickle(payload, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ConfigError, match="model"):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_something_else(name: object, payload: Payload, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    save_pickle(payload, tmp_path / "model" / "pytorch_model.bin")
    save_pickle(payload, tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="index"):
        open_weights(tmp_path / "model")


@pytest.mark.parametrize("length", [2**63 - 1, 2**62, 10**9])
def test_a_header_that_claims_to_be_huge(length: int, payload: Payload, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 9)
    with pytest.raises(ConfigError, match="download it again"):
        open_weights(tmp_path / "model")


# -- models and tokenizers ------------------------------------------------------------------------

AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


def write_code(payload: Payload, folder: Path) -> None:
    """Every name under which transformers looks for code beside a model."""
    (folder / "custom_generate").mkdir(exist_ok=True)
    for name in ("evil.py", "custom_generate/generate.py", "conversion.py", "__init__.py"):
        text = f"{payload.code}\nclass Evil: pass\ndef generate(*a, **k): pass\n"
        (folder / name).write_text(text)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_a_model_with_code(model_type: str, payload: Payload, tmp_path: Path) -> None:
    """The code is left alone where transformers has the model, else it is no model."""
    folder = tmp_path / "model"
    if model_type == "llama":
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)
    write_model(folder, model_type=model_type, auto_map=AUTO_MAP, trust_remote_code=True)
    write_code(payload, folder)
    if model_type == "llama":
        assert type(load_model_config(folder)) is LlamaConfig
        model = load_exported(str(folder))
        assert type(model) is LlamaForCausalLM
        model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=1)
        return
    for load in (load_model_config, lambda folder: load_exported(str(folder))):
        with pytest.raises(ConfigError, match="needs code that comes with it, which is never run"):
            load(folder)


def test_an_attention_from_the_hub(payload: Payload, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(tmp_path / "model")
    write_model(tmp_path / "model", attn_implementation="evil/kernel")
    for load in (load_model_config, lambda folder: load_exported(str(folder))):
        with pytest.raises(ConfigError, match="names code on the hub, which is never run"):
            load(tmp_path / "model")
    with pytest.raises(ConfigError, match="names code on the hub, which is never fetched or run"):
        parse_config({"model": {"config": "x", "attn_implementation": "evil/kernel"}})


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Evil", "evil.Evil"])
def test_a_tokenizer_with_code(kind: str, payload: Payload, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((tiny.tokenizer / "tokenizer.json").read_text())
    settings = json.loads((tiny.tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": kind, "auto_map": AUTO_MAP, "trust_remote_code": True}
    # What a template may reach, were it ever rendered outside of a sandbox.
    attack = f"{{{{ self.__init__.__globals__.__builtins__.exec({payload.code!r}) }}}}"
    settings["chat_template"] = attack
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(attack)
    write_code(payload, folder)
    if kind == "LlamaTokenizer":  # one of transformers' own, so that it needs no code
        tokenizer = read_tokenizer(folder, "data.tokenizer", "make one")
        assert tokenizer.decode(tokenizer("the model")["input_ids"])
        return
    with pytest.raises(ConfigError, match="needs code that comes with it, which is never run"):
        read_tokenizer(folder, "data.tokenizer", "make one")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"])
def test_a_pickled_tokenizer(name: str, payload: Payload, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).write_bytes(payload.pickled)
    with pytest.raises(ConfigError, match="not a tokenizer"):
        read_tokenizer(tmp_path / "tokenizer", "data.tokenizer", "make one")


# -- checkpoints ----------------------------------------------------------------------------------


def reader_of(folder: Path) -> CheckpointReader:
    with ExitStack() as stack:
        reader = CheckpointReader(find_checkpoint(folder), stack)
        reader.verify()
        return reader


def resealed(folder: Path, files: dict[str, Path]) -> None:
    """A manifest that names these files with their own sums, and is sealed as it should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"] |= {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in files.items()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal(manifest)}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", LlamaConfig(**MODEL))
    reader_of(tmp_path / "checkpoint")  # it is whole
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"])
def test_pickles_in_a_checkpoint(name: str, payload: Payload, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(payload.pickled)
    resealed(checkpoint, {name: checkpoint / name})
    with pytest.raises(ConfigError, match="take another checkpoint"):
        reader_of(checkpoint)
    (checkpoint / "manifest.json").write_bytes(payload.pickled)
    with pytest.raises(ConfigError, match="take another checkpoint"):
        reader_of(checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "..", "a/b", "x\n"])
def test_a_manifest_that_leads_out_of_its_folder(
    name: str, payload: Payload, checkpoint: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(payload.pickled)
    resealed(checkpoint, {name: outside})
    with pytest.raises(ConfigError, match="does not describe files"):
        reader_of(checkpoint)
    [problem] = inspect_checkpoint(checkpoint).problems
    assert "does not describe files" in problem


@pytest.mark.parametrize("size", [{"a": 1}, [], None, "many"])
def test_a_manifest_with_sizes_that_are_none(size: object, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"]["bytes"] = size
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    [problem] = inspect_checkpoint(checkpoint).problems
    assert "take another checkpoint" in problem


@pytest.mark.parametrize("name", ["../../x", "/etc", "", "..", "a\0b"])
def test_latest_leads_nowhere_else(name: str, payload: Payload, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(name)
    for find in (find_checkpoint, latest_tag):
        with pytest.raises(ConfigError, match="names no folder beside it"):
            find(tmp_path)


@pytest.mark.parametrize("key", ["__class__|x", "master|a|b|c", "", tensor_key(MASTER, "x", -5, 9)])
def test_keys_of_tensors_are_only_names(key: str, payload: Payload, checkpoint: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: torch.zeros(3)}, checkpoint / "rank-00001.safetensors")
    name = "rank-00001.safetensors"
    resealed(checkpoint, {name: checkpoint / name})
    with pytest.raises(ConfigError, match="take another checkpoint"):
        reader_of(checkpoint)


def test_rubbish_is_cleared_in_the_folder_only(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".step-1.partial").symlink_to(tmp_path / "outside")
    clear_rubbish(tmp_path / "run")
    assert (tmp_path / "outside" / "precious").exists()


# -- data -----------------------------------------------------------------------------------------


def test_pickled_corpora(payload: Payload, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.array([payload], dtype=object), allow_pickle=True)
    for content in (payload.pickled, (tmp_path / "array.npy").read_bytes()):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"corpus{suffix}").write_bytes(content)
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ConfigError, match="not a Megatron index"):
            IndexedDataset(tmp_path / "corpus")
        assert read_manifest(tmp_path / "corpus").notes == {}


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**12])
def test_an_index_that_claims_to_be_huge(count: int, tmp_path: Path) -> None:
    (tmp_path / "corpus.bin").write_bytes(b"")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count)
    (tmp_path / "corpus.idx").write_bytes(header)
    with pytest.raises(ConfigError, match="where its header describes"):
        IndexedDataset(tmp_path / "corpus")


def test_a_compressed_file_that_unpacks_to_much_more(tmp_path: Path) -> None:
    """Its one line is longer than memory should hold: it is passed over piece by piece."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(64):
            stream.write(bytes(1 << 20))
        stream.write(b'\n{"text": "after it"}\n')
    source = find_source(str(path), None)
    too_long, after = read_records(source, source.files[0], "text", 1000)
    assert not isinstance(too_long, bytes)
    assert after == b'{"text": "after it"}\n'


def test_parquet_with_a_pickled_type(payload: Payload, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload.pickled,
    }
    fields = [pa.field("evil", pa.string(), metadata=about), pa.field("text", pa.string())]
    table = pa.table({"evil": ["x"], "text": ["fine"]}, schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "a.parquet")
    source = find_source(str(tmp_path / "a.parquet"), None)
    assert list(read_rows(source, source.files[0], "text", range(1))) == ["fine"]
