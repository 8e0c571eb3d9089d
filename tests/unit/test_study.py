"""What the study of quality plans, counts and concludes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks import _study_queue, _study_report, study
from benchmarks._record import ROOT
from benchmarks._study_alignment import alignment, cosine
from benchmarks._study_cases import (
    DENSE,
    HALF,
    KINDS,
    LATE_BACKWARD,
    LOSS_CHUNK,
    SEQUENCE_LENGTH,
    WORLD_SIZE,
    Case,
    LateRate,
    Model,
    Run,
    size_of,
)
from benchmarks._study_cost import run_cost, run_schedule
from benchmarks._study_merged import accumulate
from benchmarks._study_numbers import difference, fit, mean
from benchmarks._study_page import fill
from benchmarks._study_plan import (
    AS_MANY_TOKENS,
    BASE,
    GRIDS,
    PRESETS,
    QUESTIONS,
    SHALLOW,
    STEPS,
    TIERS,
    TUNED,
    WIDE,
    learning_rate,
    own_sweep,
    planned,
    sweep,
    tier,
)
from benchmarks._study_queue import Settings, missing, train_missing
from benchmarks._study_report import gap_trend
from benchmarks._study_results import (
    TOGETHER,
    Results,
    best_rates,
    read_results,
    write_together,
)
from benchmarks._study_rows import dense_of, rows_of, table
from benchmarks._study_train import StudyBackend
from sdp_llm.config import RunConfig, parse_config, resolve_batch
from sdp_llm.data import IndexedDatasetWriter
from sdp_llm.plan import analyze, make_plan, plan_from_config
from sdp_llm.plan.schedule_cost import schedule_cost
from sdp_llm.simulation import Simulation
from sdp_llm.training.budget import run_size, total_steps
from sdp_llm.training.inputs import load_inputs

RATES = dict.fromkeys([*GRIDS, *TUNED], 0.004)
CASES = tuple(dict.fromkeys(case for cases in QUESTIONS.values() for case in cases))


def test_every_run_is_listed_once_by_tier_and_seed() -> None:
    entries = list(planned(RATES, sorted(QUESTIONS), 3))
    runs = [entry.run for entry in entries]
    assert None not in runs
    ids = [run.id for run in runs if run]
    assert len(set(ids)) == len(ids) == len(set(runs))
    order = [
        (tier(entry.case), entry.seed)
        for entry in entries
        if entry.question and entry.case in CASES
    ]
    assert order == sorted(order)
    assert {(entry.case, entry.seed) for entry in entries} >= {
        (case, seed) for case in CASES for seed in range(3)
    }
    assert set(CASES) >= frozenset().union(*TIERS)
    assert sum(map(len, TIERS)) == len(frozenset().union(*TIERS))


def test_a_run_waits_for_the_sweep_that_chooses_its_rate() -> None:
    entries = list(planned({}, [1], 1))
    assert entries[0].run == sweep(BASE, DENSE)[0]
    waiting = [entry for entry in entries if entry.run is None]
    assert Case(BASE, DENSE, STEPS) in [entry.case for entry in waiting]
    known = list(planned({(BASE, DENSE): 0.008, (BASE, HALF): 0.002}, [1], 1))
    assert not [entry for entry in known if entry.run is None]


def test_models_without_a_sweep_take_the_rate_of_the_base() -> None:
    rates = {(BASE, DENSE): 0.008, (BASE, HALF): 0.004, (WIDE, DENSE): 0.002}
    assert learning_rate(Case(Model(32, 5), DENSE, 10), rates) == 0.008
    assert learning_rate(Case(Model(dropout=0.1), DENSE, 10), rates) == 0.008
    assert learning_rate(Case(BASE, "backward 1/2", 10), rates) == 0.004
    assert learning_rate(Case(WIDE, DENSE, 10), rates) == 0.002
    assert learning_rate(Case(Model(64, 5), DENSE, 10, reference=WIDE), rates) == 0.002
    # Swept for SDP alone.
    rates[SHALLOW, HALF] = 0.016
    assert learning_rate(Case(SHALLOW, HALF, 10), rates) == 0.016
    assert learning_rate(Case(SHALLOW, DENSE, 10), rates) == 0.008


def test_the_best_rate_is_chosen_from_a_complete_sweep_only() -> None:
    runs = sweep(BASE, DENSE)
    losses = {run: {"loss": abs(run.rate - 0.008)} for run in runs}
    own = Case(BASE, DENSE, STEPS)  # whose rates are some of those
    assert own in TUNED
    assert best_rates(losses) == {(BASE, DENSE): 0.008, own: 0.008}
    del losses[runs[0]]
    assert best_rates(losses) == {own: 0.008}
    del losses[own_sweep(own)[0]]
    assert best_rates(losses) == {}


def test_what_is_tuned_is_paired_with_the_dense_model_that_is(results: Results) -> None:
    small = next(case for case in TUNED if case.model.blocks == 3)
    dense = Case(BASE, DENSE, STEPS)
    found = _with_losses(results, {dense: 4.0, small: 3.75}, 0.008)
    [row] = rows_of([small], found, are_tuned=True)
    assert row.gap is not None
    assert row.gap.value == pytest.approx(-0.25)
    assert "| 0.008 |" in fill("<!-- table tuned -->\n<!-- end -->\n", found)


def _with_losses(results: Results, losses: Mapping[Case, float], rate: float) -> Results:
    """These cases with seed 0 and a rate of their own, which is ``rate``."""
    runs = {Run(case, rate, 0): loss for case, loss in losses.items()}
    own = {run: {**_result(run), "loss": loss} for run, loss in runs.items()}
    return Results({**results.by_run, **own}, {**RATES, **dict.fromkeys(losses, rate)})


def _cells(table: str, first: str) -> list[list[str]]:
    """The cells of the rows that begin so."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [cells for cells in rows if cells and cells[0] == first]


def test_depth_is_compared_with_three_blocks_on_as_many_tokens(results: Results) -> None:
    [few] = [c for c in TUNED if c.model == Model(32, 3) and c.dense_steps == STEPS]
    deep = AS_MANY_TOKENS[0]
    assert deep.tokens() == few.tokens()
    found = _with_losses(results, {few: 4.25}, 0.008)
    common = Run(deep, 0.004, 0)
    found = Results({**found.by_run, common: {**_result(common), "loss": 4.125}}, found.rates)
    dense, _ = _cells(fill("<!-- table depth -->\n<!-- end -->", found), "dense, 8 blocks")
    assert dense[4] == "-0.125"  # the only seed that both have
    assert float(dense[3]) > 1.5


def test_presets_have_the_rate_of_their_own_where_it_is_known(results: Results) -> None:
    memory, dense = (Case(BASE, kind, STEPS) for kind in (PRESETS["memory"], DENSE))
    found = _with_losses(results, {memory: 3.5, dense: 4.0}, 0.008)
    [row] = _cells(fill("<!-- table presets -->\n<!-- end -->", found), "memory")
    assert row[2] == "-0.500"


def test_equal_flops_are_equal_within_rounding() -> None:
    for case in CASES:
        dense = dense_of(case)
        spent, given = (c.flops_per_token() * c.steps() for c in (case, dense))
        if case.is_equal_flops:
            assert abs(spent - given) <= 0.5 * case.flops_per_token() + 1e-6, case
        else:
            assert case.steps() == dense.steps(), case


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_run_config_with_the_librarys_own_budget(kind: str) -> None:
    case = Case(BASE, kind, STEPS)
    config = Run(case, 0.004, 1).config("data", "out")
    assert config["training"]["steps"] == case.steps()
    config["training"] = {"flops_of_dense_steps": STEPS}
    run = parse_config(config)
    steps = total_steps(run, BASE.config(), resolve_batch(run, WORLD_SIZE), WORLD_SIZE)
    assert steps == case.steps()


def test_runs_survive_their_way_to_another_process() -> None:
    for case in CASES:
        run = Run(case, 0.002, 2)
        assert Run.from_json(run.to_json()) == run


def _run(tmp_path: Path, kind: str) -> RunConfig:
    """A run of about 20 steps."""
    for split in ("train", "validation"):
        with IndexedDatasetWriter(tmp_path / f"{split}_text_document", "uint16") as writer:
            writer.add_document([1] * (WORLD_SIZE * SEQUENCE_LENGTH + 1))
    config = Run(Case(BASE, kind, 20), 0.004, 0).config(str(tmp_path), str(tmp_path))
    model = tmp_path / "models" / f"{BASE}.json"
    model.parent.mkdir(exist_ok=True)
    model.write_text(BASE.config().to_json_string())
    return parse_config(config)


def _backend(run: RunConfig, late_rate: LateRate | None = None) -> StudyBackend:
    return StudyBackend(run, load_inputs(run, WORLD_SIZE), is_probed=False, late_rate=late_rate)


def _rates(backend: StudyBackend, steps: int) -> list[float]:
    """What each step is taken with."""
    taken = []
    optimizer = backend._simulation.optimizer
    optimizer.register_step_pre_hook(lambda *_: taken.append(optimizer.param_groups[0]["lr"]))
    for _ in range(steps):
        backend.step(torch.ones(WORLD_SIZE, SEQUENCE_LENGTH + 1, dtype=torch.long))
    return taken


def test_the_rate_of_free_blocks_is_theirs_alone(tmp_path: Path) -> None:
    run = _run(tmp_path, "forward 1/2, free blocks' rate x 2")
    backend = _backend(run)
    backend.rescale_free_blocks(run, 2.0)
    _rates(backend, 3)
    simulation = backend._simulation
    rates = {p: group["lr"] for group in simulation.optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(simulation.masters.values())
    for unit in simulation.layout.units:
        is_free = unit.block not in (None, 0, BASE.blocks - 1)
        for spec in unit.parameters:
            assert rates[simulation.masters[spec.name]] == backend.lr * (2 if is_free else 1)


def test_the_late_rate_is_that_of_the_last_phase_alone(tmp_path: Path) -> None:
    run = _run(tmp_path, LATE_BACKWARD)
    plain = _backend(run)
    total = plain._schedule.total_steps
    start = plain._schedule.phases[1].start
    expected = _rates(plain, total)
    doubled = _rates(_backend(run, LateRate(2.0)), total)
    assert doubled == expected[:start] + [rate * 2 for rate in expected[start:]]
    warmed = _rates(_backend(run, LateRate(warmup=2 / total)), total)
    factors = [1 / 3, 2 / 3, *[1.0] * (total - start - 2)]
    late = [rate * factor for rate, factor in zip(expected[start:], factors, strict=True)]
    assert warmed == pytest.approx(expected[:start] + late, rel=1e-12)


def test_the_plans_of_equal_load_differ_in_lambda() -> None:
    lams = []
    for kind in (HALF, "forward 1/2, cyclic", "forward 1/2, two halves"):
        sdp = parse_config({"sdp": dict(KINDS[kind])}).sdp
        found = analyze(plan_from_config(sdp, WORLD_SIZE, BASE.blocks))
        assert set(found.load) == {3}
        lams.append(found.lam)
    assert lams == sorted(lams)
    assert lams[0] < 0.4
    assert lams[-1] == pytest.approx(1.0)


def _simulation(coverage: str, masking: str, pinned: int, scale: str = "none") -> Simulation:
    plan = make_plan(
        WORLD_SIZE,
        4,
        coverage=Fraction(coverage),
        pinned_first=pinned,
        pinned_last=pinned,
    )
    config = Model(hidden=16, blocks=4).config()
    config.vocab_size = 64
    return Simulation(
        config,
        plan,
        lambda groups: torch.optim.SGD(groups),
        masking=masking,
        residual_scale=scale,
    )


@pytest.mark.parametrize(
    ("coverage", "masking", "pinned", "scale"),
    [
        ("1", "forward", 1, "none"),
        ("1/2", "forward", 1, "none"),
        ("1/4", "forward", 0, "inverse_coverage"),
        ("1/2", "backward", 1, "none"),
    ],
)
def test_workers_in_one_pass_get_the_gradients_of_the_oracle(
    coverage: str, masking: str, pinned: int, scale: str
) -> None:
    batch = torch.randint(0, 64, (2 * WORLD_SIZE, 9), generator=torch.Generator().manual_seed(0))
    oracle, merged = (_simulation(coverage, masking, pinned, scale) for _ in range(2))
    losses = oracle.accumulate(batch, 1)
    assert accumulate(merged, batch, 1) == [pytest.approx(sum(losses) / WORLD_SIZE, rel=1e-6)]
    for name, master in oracle.masters.items():
        found = merged.masters[name].grad
        assert master.grad is not None
        assert found is not None
        assert (found - master.grad).norm() <= 1e-6 * master.grad.norm(), name


def test_alignment_leaves_the_simulation_as_it_was() -> None:
    simulation = _simulation("1/2", "forward", 1)
    plan, weights = simulation.plan, [m.detach().clone() for m in simulation.masters.values()]
    tokens = torch.randint(0, 64, (2 * WORLD_SIZE, 9), generator=torch.Generator().manual_seed(0))
    found = alignment(simulation, tokens, 1)
    assert (simulation.plan, simulation.masking) == (plan, "forward")
    for before, master in zip(weights, simulation.masters.values(), strict=True):
        assert torch.equal(before, master)
    # Pinned blocks and the rest see every sample through the whole model under backward masking.
    pinned = [found["backward"]["units"][name] for name in ("embedding", "block 0", "head")]
    assert pinned == [pytest.approx(1.0, abs=1e-5)] * 3
    assert found["backward"]["units"]["block 1"] < 0.999
    assert found["forward"]["units"]["block 0"] < 0.9999
    assert len(found["forward"]["ranks"]) == WORLD_SIZE


def test_tensors_are_made_where_the_model_is() -> None:
    """As a model on a GPU needs it: nothing lands on the default device."""
    simulation = _simulation("1/2", "forward", 1)
    batch = torch.randint(0, 64, (WORLD_SIZE, 9), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        simulation.accumulate(batch)
        found = alignment(simulation, batch, 1)
        simulation.step(batch)
    assert math.isfinite(found["forward"]["ranks"][0])


def test_the_cosine_of_parts_is_that_of_the_whole() -> None:
    a, b = torch.arange(1.0, 7.0), torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, -2.0])
    parts = [(p @ q, p @ p, q @ q) for p, q in zip(a.split(2), b.split(2), strict=True)]
    dots = [tuple(float(value) for value in part) for part in parts]
    assert cosine(dots) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_the_standard_error_is_that_of_the_mean() -> None:
    found = mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3)
    assert found.error == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 6))
    assert str(mean([2.0])) == "2.000"
    with pytest.raises(ValueError, match="at least one"):
        mean([])


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 1.0, 3: 0.0})
    assert found is not None
    assert (found.value, found.count) == (pytest.approx(1.5), 2)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_a_trend_and_its_uncertainty_are_found() -> None:
    x = [0.0, 1.0, 2.0, 3.0, 4.0]
    noise = [0.1, -0.2, 0.1, 0.1, -0.1]
    targets = [1.0 + 0.5 * a + e for a, e in zip(x, noise, strict=True)]
    found = fit({"1": [1.0] * 5, "x": x}, targets)
    assert found is not None
    slope = sum((a - 2) * t for a, t in zip(x, targets, strict=True)) / 10
    offset = sum(targets) / 5 - 2 * slope
    left = sum((t - offset - slope * a) ** 2 for a, t in zip(x, targets, strict=True))
    assert found.values == (pytest.approx(offset), pytest.approx(slope))
    assert found.errors[1] == pytest.approx(math.sqrt(left / 3 / 10))
    assert fit({"1": [1.0, 1.0], "x": [0.0, 1.0]}, [1.0, 2.0]) is None
    assert fit({"1": [1.0] * 3, "x": [2.0] * 3}, [1.0, 2.0, 3.0]) is None


def _result(run: Run) -> dict[str, Any]:
    """A result as training writes it, with a gap that grows by 0.1 with each doubling of tokens."""
    case = run.case
    parameters = size_of(case.model).numel
    gap = 0.0
    if case.family == HALF:
        gap = 0.1 * math.log2(dense_of(case).tokens() / parameters)
    units = {"embedding": 0.5, **{f"block {b}": 0.1 * b for b in range(case.model.blocks)}}
    probe = {"units": units, "norms": units, "ranks": [0.4, 0.6]}
    return {
        "id": run.id,
        **run.to_json(),
        "config": run.config("/data", "/output"),
        "loss": 4.0 + gap + 0.01 * run.seed,
        # As if it was not kept at first.
        **({"training_loss": 3.5 + gap} if run.seed else {}),
        "steps": case.steps(),
        "world_size": WORLD_SIZE,
        "cpu_seconds": 100.0,
        "lam": 0.5,
        "alignment": [{"step": s, "forward": probe, "backward": probe} for s in (0, 10)],
    }


@pytest.fixture(scope="module")
def results() -> Results:
    """Of all runs with two seeds, but one."""
    runs = [entry.run for entry in planned(RATES, sorted(QUESTIONS), 2)]
    lost = Run(Case(BASE, HALF, STEPS), 0.004, 1)
    return Results({run: _result(run) for run in runs if run and run != lost}, RATES)


def test_only_what_has_no_result_is_missing(results: Results, tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, sorted(QUESTIONS), 2, 1)
    assert [entry.run for entry in missing(settings, results)] == [
        Run(Case(BASE, HALF, STEPS), 0.004, 1)
    ]


def test_a_row_says_how_many_seeds_it_has_and_pairs_its_gap(results: Results) -> None:
    dense, half, backward = rows_of(
        [Case(BASE, kind, STEPS) for kind in (DENSE, HALF, "backward 1/2")], results
    )
    assert (dense.loss.count, half.loss.count, backward.loss.count) == (2, 1, 2)
    assert dense.gap is None
    assert half.gap is not None
    assert half.gap.error is None
    assert backward.gap is not None
    # Both seeds differ from the dense ones by the same.
    assert backward.gap.value == pytest.approx(half.gap.value)
    assert backward.gap.error == pytest.approx(0.0, abs=1e-9)
    lines = table([dense, half]).splitlines()
    assert [lines[row].split("|")[2].strip() for row in (2, 3)] == ["-", f"{half.lam:.2f}"]
    assert lines[2].split("|")[4].strip() == "1.00"
    assert lines[3].split("|")[7:9] == ["               - ", "     1 "]
    assert lines[2].split("|")[7].strip() == "+0.510"


@pytest.mark.parametrize("kind", ["forward 1/2, last 20% full", "forward 1/2, rotated every 50"])
def test_the_cost_of_a_run_is_that_of_its_config(kind: str) -> None:
    run = Run(Case(BASE, kind, STEPS), 0.004, 1)
    content = run.config("data", "out")
    content["training"]["loss_chunk"] = LOSS_CHUNK
    config = parse_config(content)
    size, setup = run_size(config, BASE.config(), resolve_batch(config, WORLD_SIZE), "nccl")
    schedule = run_schedule(run)
    assert schedule.total_steps == run.case.steps()
    expected = schedule_cost(size, schedule, setup).whole
    cost = run_cost(run)
    assert cost.memory[0] == expected.memory
    assert cost.sent[0] == expected.traffic.mean * run.case.steps()
    assert cost.flops == pytest.approx(expected.compute.mean * run.case.tokens() / WORLD_SIZE)
    assert cost.parameters == size.numel


def test_the_tables_of_a_page_are_made_anew(results: Results) -> None:
    page = "Before.\n<!-- table pins -->\nold\n<!-- end -->\nAfter.\n"
    filled = fill(page, results)
    assert filled.startswith("Before.\n<!-- table pins -->\n| training")
    assert "| forward 1/2, last pinned" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- end -->\nAfter.\n")
    assert fill(filled, results) == filled
    with pytest.raises(KeyError):
        fill(page.replace("pins", "nothing"), results)


def test_the_tables_of_the_study_are_those_of_its_runs() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert "<!-- table flops -->" in page
    assert fill(page, read_results(ROOT / "docs" / "study")) == page


def test_the_presets_of_the_readme_have_the_gaps_of_the_study() -> None:
    page = fill("<!-- table presets -->\n<!-- end -->", read_results(ROOT / "docs" / "study"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[3:-1]]
    found = {row[0] if row[0] != "-" else row[1]: row[2:] for row in cells}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    for name, row in {**PRESETS, "smaller": "dense, 5 blocks"}.items():
        line = next(
            li for li in readme.splitlines() if li.startswith(f"| `llama_134m_{name}.json`")
        )
        gaps = [cell.strip() or "-" for cell in line.split("|")[6:-1]]
        assert gaps == found[name if name in PRESETS else row], name


def test_the_pages_of_the_study_are_those_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_study_report, "pictures", Mock())
    pages = ROOT / "docs" / "study"
    made = [
        path
        for path in _study_report.write_report(read_results(pages), tmp_path)
        if path.suffix == ".md"
    ]
    assert {path.name for path in made} == {path.name for path in pages.glob("*.md")}
    for path in made:
        assert path.read_text("utf-8") == (pages / path.name).read_text("utf-8"), path.name


def test_runs_in_one_file_are_results_again(results: Results, tmp_path: Path) -> None:
    write_together(results, tmp_path / TOGETHER)
    assert str(tmp_path) not in (tmp_path / TOGETHER).read_text()
    found = read_results(tmp_path)
    assert found.by_run.keys() == results.by_run.keys()
    run = Run(Case(BASE, DENSE, STEPS), 0.004, 0)
    assert found.by_run[run]["loss"] == results.by_run[run]["loss"]
    assert "config" not in found.by_run[run]


def test_runs_are_on_the_device_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Mock()
    started.return_value.poll.return_value = 1
    monkeypatch.setattr(_study_queue.subprocess, "Popen", started)
    for device in ("cpu", "cuda"):
        assert train_missing(Settings(tmp_path, tmp_path / device, [7], 1, 1, device))
        found = [call.kwargs["env"]["DS_ACCELERATOR"] for call in started.call_args_list]
        assert set(found) == {device}
        started.reset_mock()


def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "validation_text_document.idx").touch()
    arguments = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["study.py", "run", *arguments])
    assert study.main() == 2
    assert "error: --device cuda: torch finds no GPU here" in capsys.readouterr().err


def test_a_report_without_matplotlib_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--output", str(tmp_path), "--pages", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study.py", "report", *arguments])
    assert study.main() == 2
    assert "error: report: PNG needs matplotlib, which is not" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_has_a_page_and_a_picture_for_every_question(
    results: Results, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks._study_report import write_report

    names = {path.name for path in write_report(results, tmp_path)}
    assert names >= {f"question_{question}.md" for question in range(1, 10)}
    assert names >= {f"question_{question}.png" for question in range(2, 10)}
    assert names >= {"question_1_flops.png", "question_1_steps.png", "learning_rates.md"}


def test_the_trend_of_the_gap_is_found(results: Results) -> None:
    trend = gap_trend(rows_of(QUESTIONS[8], results))
    assert trend is not None
    slopes = dict(zip(trend.names, trend.values, strict=True))
    assert slopes["tokens"] == pytest.approx(0.1)
    assert slopes["depth"] == pytest.approx(0.0, abs=1e-9)
    assert slopes["size"] == pytest.approx(0.0, abs=1e-9)
    # Twice the parameters halve the tokens per parameter of as many tokens.
    trend = gap_trend(rows_of(QUESTIONS[8], results), is_per_parameter=False)
    assert trend is not None
    slopes = dict(zip(trend.names, trend.values, strict=True))
    assert slopes["size"] == pytest.approx(-0.1)


def test_a_report_of_nothing_has_no_questions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks._study_report import write_report

    names = [path.name for path in write_report(Results({}, {}), tmp_path)]
    assert names == ["learning_rates.md", TOGETHER]
