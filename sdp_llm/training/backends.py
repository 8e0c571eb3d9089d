"""What the trainer drives: the distributed engine, or the simulation on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.activity import ACTIVITY, COMPUTE, EXPORT, LOAD
from sdp_llm.checkpoint.background import BackgroundSave
from sdp_llm.checkpoint.export import copy_tokenizer
from sdp_llm.config import RunConfig
from sdp_llm.engine import SDPEngine
from sdp_llm.evaluation import Evaluation
from sdp_llm.initialization import initialize
from sdp_llm.loss import target_count
from sdp_llm.optim import build_optimizer, build_scheduler
from sdp_llm.sharding.probe import GradientProbe
from sdp_llm.sharding.replicas import differing_units
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.init import module_seed
from sdp_llm.training.inputs import Inputs
from sdp_llm.world import all_reduce


@dataclass(frozen=True)
class Step:
    """One optimizer step of this process.

    ``losses`` (1-D, on the device) has the mean loss, in nats per token, of each worker that this
    process runs; ``grad_norm`` is global and before clipping; ``must_stop`` says, on all ranks
    alike, that one of them was asked to stop, ``is_written`` that the save in the background is on
    the disk; ``gradients`` has, where they were measured and by unit, the "gradients/norm" and the
    "gradients/cosine" of its owners.
    """

    losses: Tensor
    grad_norm: float
    is_skipped: bool
    must_stop: bool = False
    is_written: bool = False
    gradients: dict[str, dict[str, float | None]] | None = None


class Backend(Protocol):
    """Trains on this process's part of each global batch."""

    rank: int
    world_size: int

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        ...

    def step(self, tokens: Tensor) -> Step:
        """One optimizer step on this process's samples ``[samples, sequence + 1]``."""
        ...

    def must_stop(self) -> bool:
        """Whether one of the processes was asked to stop. Collective."""
        ...

    def wait_for_weights(self) -> None:
        """Wait for what the last step sent, before other collectives than the methods here."""
        ...

    def differing_units(self) -> dict[str, list[list[int]]]:
        """The units whose weights differ between ranks, and which ranks agree. Collective."""
        ...

    def evaluate(self, samples: Tensor, micro_batch: int) -> Evaluation:
        """The whole model's loss over the samples of all processes. Collective.

        :raises Interrupted: on every process, when one of them is asked to stop meanwhile.
        """
        ...

    def export(self, folder: Path, tokenizer: str | None) -> None:
        """Write the whole model as a HuggingFace checkpoint. Collective."""
        ...

    def monitor(self, values: dict[str, float], samples: int) -> None:
        """Hand values to the config's monitors (tensorboard, wandb, csv_monitor)."""
        ...


class EngineBackend:
    """One rank of a distributed run.

    :param is_asked: whether this rank was asked to stop.
    """

    def __init__(
        self,
        run: RunConfig,
        inputs: Inputs,
        is_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine: SDPEngine
        steps = inputs.schedule.total_steps
        self.engine, *_ = initialize(inputs.model, run, total_num_steps=steps)
        self.engine.optimizer.flags = self._flags
        self._is_asked = is_asked
        self._in_background: BackgroundSave | None = None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._loss = inputs.loss
        # Dropout, where a model has it, differs between ranks and repeats between runs.
        torch.manual_seed(module_seed(run.training.seed, f"rank {self.rank}"))

    @property
    def lr(self) -> float:
        return float(self.engine.get_lr()[0])

    def step(self, tokens: Tensor) -> Step:
        engine = self.engine
        tokens = tokens.to(engine.device, non_blocking=True)
        targets = target_count(tokens)
        total = torch.zeros(1, device=engine.device)
        gradients = None
        for part in tokens.split(engine.train_micro_batch_size_per_gpu()):
            ACTIVITY.enter(COMPUTE)
            loss = self._loss(engine, part) / targets
            probe = self._probe()
            engine.probe_gradients(probe)
            engine.backward(loss, scale_wrt_gas=False)
            gradients = None if probe is None else _by_unit(probe)
            total += loss.detach()
            engine.step()
        norm = engine.get_global_grad_norm()
        assert norm is not None
        asked, written = engine.optimizer.flag_counts
        is_written = written == self.world_size
        is_skipped = not engine.was_step_applied()
        return Step(total, norm, is_skipped, asked > 0, is_written, gradients)

    def _probe(self) -> GradientProbe | None:
        """For the last micro-batch of a step that is to be measured: it holds the averages."""
        engine, interval = self.engine, self.engine.run.training.gradient_interval
        if not interval or not engine.is_gradient_accumulation_boundary():
            return None
        is_due = (engine.global_steps + 1) % interval == 0
        return GradientProbe(engine.sharded) if is_due else None

    def _flags(self) -> tuple[bool, bool]:
        """What each step's agreement asks all ranks."""
        pending = self._in_background
        return self._is_asked(), pending is not None and pending.is_written()

    def wait_for_weights(self) -> None:
        self.engine.wait_for_weights()

    def must_stop(self) -> bool:
        self.wait_for_weights()
        flag = torch.tensor(float(self._is_asked()), device=self.engine.device)
        return bool(all_reduce(flag, "request to stop", dist.ReduceOp.MAX))

    def differing_units(self) -> dict[str, list[list[int]]]:
        return differing_units(self.engine.sharded)

    def evaluate(self, samples: Tensor, micro_batch: int) -> Evaluation:
        return self.engine.evaluate(samples, micro_batch, self._loss, self.must_stop)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write ``folder/tag`` and name it the latest. Collective.

        :raises ConfigError: on every rank, when one cannot write.
        """
        self.engine.save_checkpoint(folder, tag, state)

    def begin_save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Begin what :meth:`save` does, in the background; :meth:`finish_save` comes next."""
        pending = self.engine.save_checkpoint_in_background(folder, tag, state)
        self._in_background = pending

    def finish_save(self) -> float:
        """Wait for the save in the background and give it its name. Collective.

        :returns: the seconds in which this rank wrote.
        :raises ConfigError: on every rank, when one could not write.
        """
        assert self._in_background is not None
        pending, self._in_background = self._in_background, None
        return pending.finish()

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint. Collective.

        :returns: the ``state`` it was saved with.
        :raises DamagedCheckpoint: on every rank, when a file is not what was saved.
        :raises ConfigError: on every rank, when it is of another model.
        """
        ACTIVITY.enter(LOAD)
        return self.engine.load_checkpoint(path.parent, path.name)[1]

    def export(self, folder: Path, tokenizer: str | None) -> None:
        ACTIVITY.enter(EXPORT)
        self.engine.save_pretrained(folder, tokenizer)

    def monitor(self, values: dict[str, float], samples: int) -> None:
        if self.engine.monitor.enabled and self.rank == 0:
            self.engine.monitor.write_events([(k, v, samples) for k, v in values.items()])


def _by_unit(probe: GradientProbe) -> dict[str, dict[str, float | None]]:
    results = probe.results()
    return {
        "gradients/norm": {name: norm for name, (norm, _) in results.items()},
        "gradients/cosine": {name: cosine for name, (_, cosine) in results.items()},
    }


class SimulationBackend:
    """All workers of a run, in this one process."""

    rank, world_size = 0, 1

    def __init__(self, run: RunConfig, inputs: Inputs, device: torch.device) -> None:
        assert run.model is not None
        self._schedule = inputs.schedule
        self._steps = 0
        plan, masking = self._schedule.at(0)
        self._simulation = Simulation(
            inputs.model,
            plan,
            lambda groups: build_optimizer(run, groups),
            masking=masking,
            seed=run.training.seed,
            init_from=run.model.init_from,
            max_norm=run.gradient_clipping,
            decay_all=run.training.decay_all,
            dtype=torch.bfloat16 if run.bf16.enabled else torch.float32,
            device=device,
            attn_implementation=run.model.attn_implementation,
            loss=inputs.loss,
            residual_scale=run.sdp.residual_scale,
        )
        self._device = device
        self._micro_batch = inputs.batch.micro_batch
        self._config = inputs.model
        total_steps = inputs.schedule.total_steps
        self._scheduler = build_scheduler(run, self._simulation.optimizer, total_steps)
        if run.model.gradient_checkpointing:
            self._simulation.model.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def lr(self) -> float:
        return float(self._simulation.optimizer.param_groups[0]["lr"])

    def step(self, tokens: Tensor) -> Step:
        result = self._simulation.step(tokens.to(self._device), self._micro_batch)
        if self._scheduler is not None and not result.is_skipped:
            self._scheduler.step()
        self._steps += 1
        if self._schedule.changes_at(self._steps):
            self._simulation.change_plan(*self._schedule.at(self._steps))
        return Step(torch.tensor(result.losses), result.grad_norm, result.is_skipped)

    def must_stop(self) -> bool:
        """Never: it is one process that any signal ends."""
        return False

    def wait_for_weights(self) -> None:
        """Nothing is sent."""

    def differing_units(self) -> dict[str, list[list[int]]]:
        """None: the workers share their weights."""
        return {}

    def evaluate(self, samples: Tensor, micro_batch: int) -> Evaluation:
        parts = [part.to(self._device) for part in samples.split(micro_batch)]
        return Evaluation(self._simulation.evaluate(parts), target_count(samples))

    def export(self, folder: Path, tokenizer: str | None) -> None:
        model = self._simulation.model
        model.config.use_cache = self._config.use_cache
        model.save_pretrained(folder, state_dict=self._simulation.exported())
        copy_tokenizer(tokenizer, folder)

    def monitor(self, values: dict[str, float], samples: int) -> None:
        """Nothing: monitors belong to DeepSpeed's engine."""
