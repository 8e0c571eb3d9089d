"""Train one run of the study through the library's own trainer, and write what came of it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import provenance
from benchmarks._study_alignment import alignment
from benchmarks._study_cases import FREE_RATES, LATE_RATES, WORLD_SIZE, LateRate, Run
from benchmarks._study_merged import accumulate
from benchmarks._study_results import result_path
from sdp_llm.config import RunConfig, parse_config
from sdp_llm.data.sampler import validation_samples
from sdp_llm.files import replace_text
from sdp_llm.optim import build_optimizer, build_scheduler
from sdp_llm.plan import analyze
from sdp_llm.subnetwork.init import module_seed
from sdp_llm.training.backends import SimulationBackend, Step
from sdp_llm.training.environment import device_type
from sdp_llm.training.inputs import Inputs, load_inputs
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.trainer import Trainer

PROBES = 8  # in a run that is probed
PROBE_SAMPLES = 64  # of the validation corpus


class StudyBackend(SimulationBackend):
    """The simulation with all workers in one pass, and probes of the gradients on the way.

    :param is_probed: measure the alignment of gradients before the first step and at equal
        distances after it.
    :param late_rate: of the schedule's last phase.
    """

    def __init__(
        self, run: RunConfig, inputs: Inputs, is_probed: bool, late_rate: LateRate | None = None
    ) -> None:
        super().__init__(run, inputs, torch.device(device_type()))
        simulation = self._simulation
        simulation.accumulate = lambda batch, micro: accumulate(simulation, batch, micro)
        torch.manual_seed(module_seed(run.training.seed, "dropout"))
        self.alignment: list[dict[str, Any]] = []
        self._late_rate = late_rate
        self._interval = max(1, inputs.schedule.total_steps // PROBES) if is_probed else 0
        assert inputs.validation is not None
        indices = validation_samples(inputs.validation, PROBE_SAMPLES)
        usable = len(indices) // WORLD_SIZE * WORLD_SIZE
        probe = torch.from_numpy(inputs.validation.batch(indices[:usable]))
        self._probe = probe.to(self._device)

    def rescale_free_blocks(self, run: RunConfig, factor: float) -> None:
        """Begin anew with an optimizer whose learning rate for free blocks is ``factor`` times."""
        simulation = self._simulation
        plan = simulation.plan
        free = {
            simulation.masters[spec.name]
            for unit in simulation.layout.units
            if unit.block is not None and len(plan.owner_sets[unit.block]) < plan.world_size
            for spec in unit.parameters
        }
        groups = []
        for group in simulation.optimizer.param_groups:
            for is_free in (False, True):
                chosen = [p for p in group["params"] if (p in free) == is_free]
                rate = simulation.optimizer.defaults["lr"] * (factor if is_free else 1.0)
                groups.append({"params": chosen, "weight_decay": group["weight_decay"], "lr": rate})
        simulation.optimizer = build_optimizer(run, groups)
        total_steps = self._schedule.total_steps
        self._scheduler = build_scheduler(run, simulation.optimizer, total_steps)

    def step(self, tokens: Tensor) -> Step:
        if self._interval and self._steps % self._interval == 0:
            found = alignment(self._simulation, self._probe, 1)
            self.alignment.append({"step": self._steps, **found})
        last = self._schedule.phases[-1]
        if self._late_rate is not None and self._steps >= last.start:
            assert self._scheduler is not None
            factor = self._late_rate.at(self._steps - last.start, last.stop)
            rates = self._scheduler.get_last_lr()
            for group, rate in zip(self._simulation.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return super().step(tokens)


def train(study_run: Run, data: Path, output: Path, is_probed: bool) -> dict[str, Any]:
    """Train and return the result, which is also written to ``output/results``.

    :param data: folder of the tokenized corpus.
    :param output: folder of the study.
    :raises ConfigError: for data that cannot be read.
    """
    torch.set_num_threads(1)
    case = study_run.case
    model = output / "models" / f"{case.model}.json"
    model.parent.mkdir(parents=True, exist_ok=True)
    replace_text(model, case.model.config().to_json_string())
    config = study_run.config(str(data), str(output))
    run_dir = Path(config["training"]["run_dir"])
    shutil.rmtree(run_dir, ignore_errors=True)  # what a killed process left
    run = parse_config(config)
    inputs = load_inputs(run, WORLD_SIZE)
    folder = RunFolder(run, inputs.schedule, is_writer=True)
    folder.begin()
    started = time.process_time()  # others may stop this process for a while
    backend = StudyBackend(run, inputs, is_probed, LATE_RATES.get(case.kind))
    if case.kind in FREE_RATES:
        backend.rescale_free_blocks(run, FREE_RATES[case.kind])
    trainer = Trainer(run, inputs, backend, folder, inputs.schedule.total_steps)
    trainer.fit()
    seconds = time.process_time() - started
    assert trainer.last_validation is not None
    validations, training_loss = _logged(folder.path)
    result = {
        "id": study_run.id,
        **study_run.to_json(),
        "world_size": WORLD_SIZE,
        "steps": trainer.step,
        "tokens": trainer.position.tokens,
        "loss": trainer.last_validation.loss,
        "validation_tokens": trainer.last_validation.tokens,
        "training_loss": training_loss,
        "validations": validations,
        "lam": analyze(inputs.schedule.phases[0].plan).lam,
        "alignment": backend.alignment,
        "cpu_seconds": round(seconds, 1),
        "config": config,
        "device": _device_name(),
        **provenance(),
    }
    path = result_path(output, study_run)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _device_name() -> str:
    return torch.cuda.get_device_name() if device_type() == "cuda" else "cpu"


def _logged(run_dir: Path) -> tuple[list[dict[str, float]], float]:
    """All validations, and the mean training loss of the last log line's steps."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    validated = [entry for entry in entries if "validation/loss" in entry]
    trained = [entry["loss"] for entry in entries if "loss" in entry]
    return [{"step": e["step"], "loss": e["validation/loss"]} for e in validated], trained[-1]
