"""The main job under every launcher, and what its results are good for."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdp_llm.config import load_config
from sdp_llm.plan import plan_from_config
from sdp_llm.training.progress import header
from tests.integration.conftest import (
    BLOCKS,
    EVAL_EVERY,
    EVAL_SAMPLES,
    SEQUENCE,
    STEPS,
    VOCABULARY,
    Finished,
    Run,
    Tiny,
    execute,
    python,
    script,
    two_at_a_time,
    with_deepspeed,
)

PROMPTS = ("the model", "a long text")

# What somebody does who has transformers and the export, and nothing of this project.
LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
logits = model(**tokenizer("the model reads", return_tensors="pt")).logits
print(json.dumps({
    "ours": [name for name in sys.modules if name.startswith(("sdp_llm", "deepspeed"))],
    "problems": [len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
    "kind": type(model).__name__, "dtype": str(model.dtype), "logits": list(logits.shape),
    "ids": tokenizer("the model reads").input_ids,
}))
"""


GRADIENTS_EVERY = 2


def in_folder(folder: Path) -> list[str]:
    return ["--set", f"training.run_dir={folder}"]


def with_views(folder: Path) -> list[str]:
    """The options that show more of a run."""
    monitor = ["csv_monitor.enabled=true", f"csv_monitor.output_path={folder / 'csv'}"]
    return [*monitor, "csv_monitor.job_name=job", f"training.gradient_interval={GRADIENTS_EVERY}"]


@pytest.fixture(scope="session")
def run(tiny: Tiny) -> Run:
    """Two ranks under DeepSpeed's launcher."""
    folder = tiny.folder / "runs" / "deepspeed"
    options = [*in_folder(folder), *with_views(tiny.folder)]
    return Run(execute(*with_deepspeed(tiny.config, *options)), folder)


@dataclass(frozen=True)
class Uses:
    """What was done with the result of the run."""

    loaded: Finished
    evaluated: Finished
    generated: Finished
    started_anew: Finished
    started_again: Finished


@pytest.fixture(scope="session")
def uses(run: Run) -> Uses:
    assert run.finished.status == 0, run.finished.output
    config, model = run.folder / "config.json", run.folder / "model"
    commands: list[list[str | Path]] = [
        [sys.executable, "-c", LOAD, model],
        python("launch/evaluate.py", "--deepspeed_config", config, "--model", model),
        python("launch/generate.py", "--model", model, "--tokens", "5", "--prompt", *PROMPTS),
        with_deepspeed(config, "--resume", "none"),
        with_deepspeed(config),
    ]
    return Uses(*two_at_a_time(commands))


@dataclass(frozen=True)
class Others:
    """The same config under other launchers, and with other settings."""

    torchrun: Run
    simulated: Run
    alone: Run
    alone_simulated: Run
    alone_without_flag: Finished


@pytest.fixture(scope="session")
def others(tiny: Tiny, run: Run) -> Others:
    runs, full = tiny.folder / "runs", ["sdp.coverage=1"]
    config = ["--deepspeed_config", tiny.config]
    # From the folder of the first run: it holds all that starts the same run again.
    saved = ["--deepspeed_config", run.folder / "config.json"]
    torchrun = [script("torchrun"), "--standalone", "--nproc_per_node", "2", "launch/pretrain.py"]
    simulate = python("launch/simulate.py", *config, "--world_size", "2")
    folders = [runs / name for name in ("torchrun", "simulated", "alone", "alone_simulated")]
    *finished, without_flag = two_at_a_time(
        [
            [*torchrun, *saved, *in_folder(folders[0])],
            [*simulate, *in_folder(folders[1])],
            python("launch/pretrain.py", *config, *in_folder(folders[2]), *full),
            [*simulate, *in_folder(folders[3]), *full],
            python("launch/pretrain.py", *config, *in_folder(runs / "none")),
        ]
    )
    pairs = zip(finished, folders, strict=True)
    return Others(*(Run(done, folder) for done, folder in pairs), without_flag)


# -- the run --------------------------------------------------------------------------------------


def test_the_output_has_the_plan_the_lines_and_the_result(run: Run) -> None:
    assert run.finished.status == 0, run.finished.output
    lines = run.finished.stdout.splitlines()
    starts = ["block   0123", "rank 0  P", "rank 1  P", "coverage      1/2", "memory of one"]
    starts += [
        "a rank trains 0.0 M of them (",
        "memory after step 2, MiB",
        "model state",
        "of rank ",
    ]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert f"budget      {STEPS} steps of 8 samples, {STEPS * 8 * SEQUENCE:,} tokens" in lines
    assert lines.count(header()) == 1  # rank 0 alone prints
    after = lines[lines.index(header()) + 1 :]
    logged = [line.split() for line in after if re.match(r"\s+\d+/", line)]
    assert [cells[0] for cells in logged] == [f"{i}/{STEPS}" for i in range(1, STEPS + 1)]
    entries = [entry for entry in run.metrics() if "loss" in entry]
    for cells, entry in zip(logged, entries, strict=True):
        assert cells[1] == f"{entry['loss']:.4f}"
        gap = entry["highest_loss"] - entry["lowest_loss"]
        assert cells[2:4] == [f"{gap:.3f}", f"r{entry['highest_rank']}"]
        has_validation = entry["step"] % EVAL_EVERY == 0
        assert len(cells) == 9 + has_validation + (entry["step"] < STEPS)
        if has_validation:
            assert cells[4] == f"{entry['validation']:.4f}"
    # What is measured is what was predicted.
    assert not any(line.startswith("warning: model state") for line in lines)
    assert not {"\r", "\x1b"} & set(run.finished.stdout)
    closing = f"whole model's validation loss {run.validation()[-1]:.6f} nats per token, "
    assert sum(line.startswith(closing) for line in after) == 1
    assert f'load it with AutoModelForCausalLM.from_pretrained("{run.folder}/model")' in after
    assert "Traceback" not in run.finished.stderr


def test_the_run_folder(run: Run, tiny: Tiny) -> None:
    assert run.finished.status == 0, run.finished.output
    names = {"config.json", "plan.json", "environment.json", "metrics.jsonl", "model"}
    names |= {"status.json", "checkpoints", "prediction.json"}
    assert {path.name for path in run.folder.iterdir()} == names
    views = with_views(tiny.folder)
    given = load_config(tiny.config, [f"training.run_dir={run.folder}", *views])
    assert load_config(run.folder / "config.json") == given
    plan = plan_from_config(given.sdp, 2, BLOCKS)
    saved = json.loads((run.folder / "plan.json").read_text())
    assert saved["world_size"] == 2
    [phase] = saved["phases"]
    assert phase["owners"] == [list(owners) for owners in plan.owner_sets]
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["command"][0] == "launch/pretrain.py"
    assert environment["packages"]["torch"]
    assert environment["packages"]["sdp_llm"]
    assert "commit" in environment
    status = json.loads((run.folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", STEPS)
    assert status["checkpoint"] == f"checkpoints/step-{STEPS}"


def test_the_metrics(run: Run) -> None:
    entries = run.metrics()
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, STEPS + 1))
    measured = [e for e in entries if "validation/loss" in e]
    assert [e["step"] for e in measured] == list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
    assert {e["validation/tokens"] for e in measured} == {EVAL_SAMPLES * SEQUENCE}
    for entry in entries:
        for name, value in entry.items():
            inner = value.values() if isinstance(value, dict) else value
            for number in inner if isinstance(value, (list, dict)) else [value]:
                assert number is None or math.isfinite(number), name
    for entry in (e for e in entries if "loss" in e):
        assert entry["tokens"] == entry["step"] * 8 * SEQUENCE == entry["samples"] * SEQUENCE
        assert entry["lowest_loss"] <= entry["loss"] <= entry["highest_loss"]
        assert entry["lowest_loss"] < entry["highest_loss"]  # two ranks, two subnetworks
        assert 2**27 < entry["memory_now"][0] <= entry["memory_peak"][1] < 2**32
        assert entry["skipped"] == 0
    first, last = measured[0]["validation/loss"], measured[-1]["validation/loss"]
    assert last < first < math.log(VOCABULARY)


def test_the_memory_is_what_was_predicted(run: Run) -> None:
    [entry] = [e for e in run.metrics() if "memory/rank" in e]
    assert entry["step"] == 2
    predicted, measured = entry["memory/predicted"], entry["memory/measured"]
    assert set(predicted) == set(measured) == {"weights", "gradients", "optimizer"}
    for name, size in measured.items():
        assert size == pytest.approx(predicted[name], rel=0.03), name
    prediction = json.loads((run.folder / "prediction.json").read_text())
    [phase] = prediction["phases"]
    ranks = [{name: rank[name] for name in predicted} for rank in phase["memory_bytes"]]
    assert ranks[entry["memory/rank"]] == predicted
    assert len(phase["flops_per_token"]) == 2
    last = [e for e in run.metrics() if "loss" in e][-1]
    expected = last["tokens"] * sum(phase["flops_per_token"]) / 2
    assert last["flops"] == pytest.approx(expected, rel=1e-9)


def test_gradients_are_compared_now_and_then(run: Run) -> None:
    entries = [e for e in run.metrics() if "gradients/norm" in e]
    assert [e["step"] for e in entries] == list(range(GRADIENTS_EVERY, STEPS + 1, GRADIENTS_EVERY))
    norms = {e["step"]: e["grad_norm"] for e in run.metrics() if "loss" in e}
    units = ["embedding", *(f"block {b}" for b in range(BLOCKS)), "head"]
    for entry in entries:
        assert list(entry["gradients/norm"]) == list(entry["gradients/cosine"]) == units
        total = math.hypot(*entry["gradients/norm"].values())
        assert total == pytest.approx(norms[entry["step"]], rel=1e-5)
        cosines = entry["gradients/cosine"]
        # Of two ranks with half of the blocks each, a free block has one owner.
        assert [name for name, value in cosines.items() if value is None] == ["block 1", "block 2"]
        assert all(value is None or 0 < value <= 1 for value in cosines.values())


def test_the_monitor_has_what_the_metrics_have(run: Run, tiny: Tiny) -> None:
    entries = [e for e in run.metrics() if "loss" in e]
    for name in ("loss", "grad_norm", "highest_loss", "tokens_per_second"):
        (path,) = (tiny.folder / "csv").rglob(f"*train_{name}.csv")
        rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
        assert [float(samples) for samples, _ in rows] == [e["samples"] for e in entries]
        assert [float(value) for _, value in rows] == pytest.approx([e[name] for e in entries])
    (path,) = (tiny.folder / "csv").rglob("*validation_loss.csv")
    values = [float(line.split(",")[1]) for line in path.read_text().splitlines()[1:]]
    assert values == pytest.approx(run.validation())


def test_the_report_of_the_run(run: Run, tmp_path: Path) -> None:
    assert run.finished.status == 0, run.finished.output
    output = tmp_path / "report.html"
    done = execute(*python("launch/report.py", run.folder, "--output", output))
    assert done.status == 0, done.output
    text = output.read_text()
    assert f"{run.validation()[-1]:.4f}" in text
    for title in ("Loss", "Peak memory", "Who trains what", "Cosine similarity"):
        assert f"<h2>{title}" in text, title


def test_the_export_loads_without_this_project(uses: Uses, tiny: Tiny) -> None:
    assert uses.loaded.status == 0, uses.loaded.output
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny.tokenizer)("the model reads").input_ids
    assert json.loads(uses.loaded.stdout.splitlines()[-1]) == {
        "ours": [],
        "problems": [0, 0, 0],
        "kind": "LlamaForCausalLM",
        "dtype": "torch.float32",
        "logits": [1, len(ids), VOCABULARY],
        "ids": ids,
    }


def test_the_export_has_the_loss_that_the_run_printed(uses: Uses, run: Run) -> None:
    assert uses.evaluated.status == 0, uses.evaluated.output
    pattern = r"validation loss (\S+) nats per token, (\S+) bits per byte \(([\d,]+) tokens\)"
    [measured] = re.findall(pattern, uses.evaluated.stdout)
    [closing] = re.findall("whole model's " + pattern, run.finished.stdout)
    assert float(measured[0]) == pytest.approx(float(closing[0]), abs=1e-5)
    assert measured[1:] == closing[1:]


def test_the_export_generates(uses: Uses) -> None:
    assert uses.generated.status == 0, uses.generated.output
    texts = [line for line in uses.generated.stdout.splitlines() if line.startswith("> ")]
    assert len(texts) == len(PROMPTS)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert text.startswith(f"> {prompt}")
        assert len(text) > len(f"> {prompt}")


def test_a_second_start_does_not_write_into_the_folder(uses: Uses, run: Run) -> None:
    done = uses.started_anew
    assert done.status != 0, done.output
    assert sorted(line.split("] ")[0] for line in done.error_lines()) == [
        "pretrain: error: [rank 0",
        "pretrain: error: [rank 1",
    ]
    for line in done.error_lines():
        where = f"training.run_dir = {json.dumps(str(run.folder))}"
        assert f"{where}: holds a run already; choose another folder, or remove it" in line
    assert "Traceback" not in done.stderr
    assert uses.started_again.status == 0, uses.started_again.output
    assert "finished already: raise the budget to train on" in uses.started_again.stdout
    assert len(run.losses()) == STEPS


# -- the other launchers --------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_does_the_same_from_the_folder_of_the_run(run: Run, others: Others) -> None:
    assert others.torchrun.losses() == pytest.approx(run.losses(), abs=1e-6)
    assert others.torchrun.validation() == pytest.approx(run.validation(), abs=1e-6)


@pytest.mark.slow
def test_the_simulation_does_the_same(run: Run, others: Others) -> None:
    assert others.simulated.losses() == pytest.approx(run.losses(), abs=1e-5)
    assert others.simulated.validation() == pytest.approx(run.validation(), abs=1e-5)
    norms = [[e["grad_norm"] for e in r.metrics() if "loss" in e] for r in (run, others.simulated)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    saved = [(r.folder / "plan.json").read_text() for r in (run, others.simulated)]
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_plain_python_is_one_rank(run: Run, others: Others) -> None:
    assert json.loads((others.alone.folder / "plan.json").read_text())["world_size"] == 1
    # Plain data parallelism: how many ranks share the batch does not matter.
    assert others.alone.losses() == pytest.approx(others.alone_simulated.losses(), abs=1e-5)
    # And the comparison can tell: half of the coverage trains differently.
    assert others.alone.losses() != pytest.approx(run.losses(), abs=1e-3)


@pytest.mark.slow
def test_plain_python_without_the_flag_says_so(others: Others) -> None:
    done = others.alone_without_flag
    assert done.status == 2, done.output
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert line.startswith("pretrain: error: sdp.coverage = 1/2: one rank can only train with ")
    assert "`--set sdp.coverage=1`" in line


@pytest.mark.slow
def test_accelerate_does_the_same(run: Run, tiny: Tiny) -> None:
    folder = tiny.folder / "runs" / "accelerate"
    # With --cpu, accelerate starts more than one process through MPI only; --multi_gpu means
    # torchrun, and the ranks find out by themselves that there is no GPU to use.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port"]
    options += ["0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [script("accelerate"), "launch", *options, "launch/pretrain.py"]
    config = ["--deepspeed_config", tiny.config, *in_folder(folder)]
    accelerated = Run(execute(*command, *config), folder)
    assert accelerated.losses() == pytest.approx(run.losses(), abs=1e-6)
    assert accelerated.validation() == pytest.approx(run.validation(), abs=1e-6)
