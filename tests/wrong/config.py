"""Config files and values, and models, that are wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sdp_llm.config import load_config
from tests.integration.conftest import POSITIONS
from tests.wrong.scene import Scene, Wrong, check, run, write_model

STRICT = "keys and strings need double quotes; comments"


def text(name: str, content: bytes, *words: str) -> Wrong:
    """A config file of this content."""

    def provoke(scene: Scene) -> None:
        path = scene.folder / "run.json"
        path.write_bytes(content)
        load_config(path)

    return Wrong("config", name, provoke, ("{folder}/run.json", *words))


def path(name: str, make: Callable[[Path], None], *words: str) -> Wrong:
    """A config file that cannot be read."""

    def provoke(scene: Scene) -> None:
        target = scene.folder / "unreadable.json"
        make(target)
        load_config(target)

    return Wrong("config", name, provoke, ("{folder}/unreadable.json", *words))


def model(
    name: str, changes: dict[str, object], *words: str, overrides: tuple[str, ...] = ()
) -> Wrong:
    """A HuggingFace config with these changes, in a run config with these overrides."""

    def provoke(scene: Scene) -> None:
        write_model(scene.folder / "model", **changes)
        never = f"training.run_dir={scene.folder / 'never'}"
        where = f"model.config={scene.folder / 'model'}"
        check(scene.tiny.config, [where, never, *overrides], world_size=2)

    return Wrong("config", name, provoke, words)


CASES = [
    text("empty", b" \n", "the config file is empty", "write a JSON object"),
    text("corrupt", b'{"sdp": {}\n"model": {}}', "line 2, column 1", "',' delimiter"),
    text("a comment", b'{\n// steps\n"training": {}}', "line 2, column 1", STRICT),
    text("a trailing comma", b'{"train_batch_size": 8,}', "line 1, column 24", STRICT),
    text("single quotes", b"{'train_batch_size': 8}", "line 1, column 2", STRICT),
    text("Python's True", b'{"bf16": {"enabled": True}}', "line 1, column 22", STRICT),
    text("YAML", b"train_batch_size: 8\n", "line 1, column 1", STRICT),
    text("two objects", b"{}{}", "line 1, column 3: Extra data", STRICT),
    text("a list", b"[]", "the top level must be a JSON object", "configs/demo.json"),
    text("UTF-16", '{"sdp": {}}'.encode("utf-16"), "not UTF-8 text", "saved as UTF-8"),
    text("a key twice", b'{"sdp": {"seed": 1, "seed": 2}}', "seed: the key is given twice", "keep"),
    text("NaN", b'{"gradient_clipping": NaN}', "NaN is not a JSON number", "give a finite one"),
    text("nested too deeply", b"[" * 100_000, "nested too deeply", "write it flatter"),
    path("missing", lambda path: path.unlink(missing_ok=True), "no such config file", "the path"),
    path("a folder", lambda path: path.mkdir(), "Is a directory", "name a JSON file"),
    path("a dangling link", lambda path: (path.rmdir(), os.symlink("/none", path)), "no such con"),
    run("config", "unknown section", ("trainin.steps=5",), "trainin: unknown key", "training?"),
    run("config", "unknown key", ("training.step=5",), "training.step: unknown", "training.steps?"),
    run(
        "config",
        "a learning rate in quotes",
        ('optimizer.params.lr="1e-4"',),
        'optimizer.params.lr = "1e-4"',
        "expected a number > 0, without quotes",
    ),
    run("config", "infinity", ("gradient_clipping=1e999",), "gradient_clipping = Infinity"),
    run("config", "a flag in quotes", ('bf16.enabled="true"',), '"true": expected true or false'),
    run("config", "a section that is a flag", ("bf16=true",), 'keys such as "enabled"'),
    run("config", "too large a number", ("training.seed=1e30",), "use at most 9223372036854775807"),
    run(
        "config",
        "coverage that no number of owners reaches",
        ("sdp.coverage=1/3",),
        *("sdp.coverage = 1/3", "world size 2", "use 1/2"),
    ),
    run("config", "coverage above 1", ("sdp.coverage=1.5",), "sdp.coverage = 1.5", "≤ 1"),
    run(
        "config",
        "owner sets of another world size",
        ("sdp.coverage=null", "sdp.owner_sets=[[0,1],[0,2],[1],[0,1]]"),
        *("sdp.owner_sets[1] = [0, 2]", "contradicts the world size 2", "start as many ranks"),
    ),
    run(
        "config",
        "owner sets of another depth",
        ("sdp.coverage=null", "sdp.owner_sets=[[0,1],[0]]"),
        *("sdp.owner_sets", "4 blocks"),
    ),
    run(
        "config",
        "more pinned blocks than blocks",
        ("sdp.pinned_first=9",),
        *("sdp.pinned_first", "4 blocks"),
    ),
    run(
        "config",
        "batch that the ranks cannot share",
        ("train_batch_size=9",),
        *("train_batch_size = 9", "world size 2", "such as 8 or 12"),
    ),
    run(
        "config",
        "batch sizes that contradict each other",
        ("train_micro_batch_size_per_gpu=3",),
        *("train_batch_size = 8", "gradient_accumulation_steps 2 x world size 2", "use train_b"),
    ),
    run(
        "config",
        "a warm-up longer than the run",
        ("scheduler.params.warmup_num_steps=7",),
        *("scheduler.params.warmup_num_steps = 7", "total_num_steps = 6", "use fewer than 6"),
    ),
    run(
        "config",
        "a default warm-up longer than the run",
        ("scheduler.params.warmup_num_steps=null",),
        *("scheduler.params.warmup_num_steps = 1000 (the default)", "use fewer than 6"),
    ),
    run(
        "config",
        "optimizer that is not element-wise",
        ("optimizer.type=Lamb",),
        *('optimizer.type = "Lamb"', "only element-wise optimizers", "use one of Adam"),
    ),
    run(
        "config",
        "ZeRO stage 3",
        ("zero_optimization.stage=3",),
        *("zero_optimization.stage = 3", "not supported together with SDP", "use 2"),
    ),
    run("config", "fp16", ("fp16.enabled=true",), "fp16: valid in DeepSpeed but not", "use bf16"),
    run(
        "config",
        "two budgets",
        ("training.tokens=1000",),
        *("training.steps and training.tokens", "exactly one", "set the others to null"),
    ),
    run(
        "config",
        "no budget",
        ("training.steps=null",),
        *("training: exactly one of steps, tokens", "add for example training.steps"),
    ),
    run("config", "no model section", ("model=null",), "model: missing in the config", "add them"),
    run(
        "config",
        "neither a model config nor a checkpoint",
        ("model.config=null",),
        *("model.config: missing", "name a HuggingFace config.json", "model.init_from"),
    ),
    run(
        "config",
        "missing model config",
        ("model.config={folder}/none.json",),
        *("model.config = '{folder}/none.json'", "no such file", "give a HuggingFace config"),
    ),
    run(
        "config",
        "model config that is no JSON",
        ("model.config={folder}/low.bin",),
        *("model.config = '{folder}/low.bin'", "not a valid JSON", "give a HuggingFace config"),
    ),
    run(
        "config",
        "folder without a model config",
        ("model.config={folder}/empty",),
        *("model.config = '{folder}/empty'", "nor a folder with a config.json"),
    ),
    model("unknown model_type", {"model_type": "llamma"}, "`llamma`", "give a HuggingFace config"),
    model("no model_type", {"model_type": None}, "model type `None`", "give a HuggingFace config"),
    model("a model that is no decoder", {"model_type": "t5"}, "t5", "causal language model"),
    model("a negative width", {"hidden_size": -32}, "model.config", "mend the config"),
    model("a width that is text", {"hidden_size": "wide"}, "model.config", "wide"),
    model("a width that heads do not divide", {"hidden_size": 30}, "model.config", "30"),
    model(
        "no block",
        {"num_hidden_layers": 0},
        "model.config",
        "num_hidden_layers = 0: must be at least 1",
    ),
    model("an activation nobody knows", {"hidden_act": "sillu"}, "model.config", "sillu"),
    model(
        "logits that change after the head",
        {"model_type": "granite", "logits_scaling": 8.0},
        *("training.loss_chunk = 4: the model changes what its head returns", "set it to null"),
        overrides=("training.loss_chunk=4",),
    ),
    run(
        "config",
        "attention that is not installed",
        ("model.attn_implementation=flash_attention_2",),
        *("model.attn_implementation = 'flash_attention_2'", "another attention"),
    ),
    run(
        "config",
        "attention that mixes documents",
        ("data.document_mask=true", "model.attn_implementation=flash_attention_2"),
        *("model.attn_implementation = 'flash_attention_2'",),
    ),
    run(
        "config",
        "sequences longer than the positions",
        (f"data.sequence_length={POSITIONS + 1}",),
        *(f"data.sequence_length = {POSITIONS + 1}", "max_position_embeddings", "use at most 64"),
    ),
    run(
        "config",
        "more memory than the limit",
        ("sdp.memory_limit_gib=1e-6",),
        *("sdp.memory_limit_gib = 1e-06", "GiB"),
    ),
]
