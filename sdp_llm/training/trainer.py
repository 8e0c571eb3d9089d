"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from sdp_llm.activity import ACTIVITY, DATA, LOG, VALIDATE
from sdp_llm.config import RunConfig
from sdp_llm.data.sampler import rank_slice, validation_samples
from sdp_llm.errors import ConfigError, Interrupted
from sdp_llm.evaluation import Evaluation
from sdp_llm.plan import Phase
from sdp_llm.training.backends import Backend, Step
from sdp_llm.training.batches import StepBatches, read_batches
from sdp_llm.training.environment import device_type
from sdp_llm.training.health import Health
from sdp_llm.training.inputs import Inputs, load_tokenizer, target_bytes
from sdp_llm.training.memory import MemoryCheck
from sdp_llm.training.metrics import Meter
from sdp_llm.training.position import Position
from sdp_llm.training.prediction import Prediction
from sdp_llm.training.progress import HEADER_EVERY, LogLine, ProgressBar, format_line, header, say
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.saver import Saver
from sdp_llm.world import all_reduce


class Trainer:
    """Trains a backend for a budget of steps, logs, validates, saves and exports.

    :param total_steps: optimizer steps of the budget, with those before ``position``.
    :param saver: writes checkpoints; None: there are none.
    :param position: how far the backend has come.
    :param prediction: counts the operations; without one they are not known.
    :param memory_check: looks at the first steps; None: nothing is compared.
    """

    def __init__(
        self,
        run: RunConfig,
        inputs: Inputs,
        backend: Backend,
        folder: RunFolder,
        total_steps: int,
        saver: Saver | None = None,
        position: Position | None = None,
        prediction: Prediction | ConfigError | None = None,
        memory_check: MemoryCheck | None = None,
    ) -> None:
        assert run.data is not None
        self.run = run
        self.inputs = inputs
        self.backend = backend
        self.folder = folder
        self.total_steps = total_steps
        self.position = position or Position()
        self.last_validation: Evaluation | None = None
        self._fresh_validation: Evaluation | None = None
        self._saver = saver
        self._memory_check = memory_check
        self._phase: Phase | None = None
        self._prediction = prediction if isinstance(prediction, Prediction) else None
        self._flops_per_token = 0.0
        self._meter = Meter()
        self._health = Health(run, inputs, backend, folder, self.say, self.position)
        self._lines = 0
        self._bar = ProgressBar(total_steps, self.step, is_speaking=backend.rank == 0)
        self._validation = self._validation_tokens()
        self._validation_bytes = self._count_bytes()

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.position.step

    def fit(self) -> bool:
        """Train to the end of the budget, validate and export. Collective.

        :returns: False when it was asked to stop, and saved, before the end.
        :raises TrainingStopped: on every rank, after too many non-finite gradients in a row, when
            ranks have different weights of one unit, or when it was asked to stop and cannot save.
        """
        # A validation that was due when the run was stopped comes first.
        must_stop = self.backend.must_stop() or not self._validate_if_due()
        batches = self._batches()
        try:
            while not must_stop and self.step < self.total_steps:
                must_stop = self._train_step(batches)
        finally:
            self._bar.close()
        if must_stop:
            self._stop()
            return False
        if self.run.training.export:
            assert self.run.data is not None
            self.say(f"exporting to {self.folder.path / 'model'}")
            self.backend.export(self.folder.path / "model", self.run.data.tokenizer)
        return True

    def _train_step(self, batches: Iterator[Tensor]) -> bool:
        """One optimizer step and what is due after it; True when the run must stop."""
        phase = self.inputs.schedule.phase_at(self.step)
        if self._phase is not phase:
            self._enter(phase)
        self._meter.start()
        ACTIVITY.enter(DATA)
        result = self.backend.step(next(batches))
        self._meter.pause()
        self._meter.add(result.losses)
        batch = self.inputs.batch.global_batch
        self.position.step += 1
        ACTIVITY.end_step(self.step)
        self.position.samples += batch
        tokens = batch * self.inputs.train.sequence_length
        self.position.tokens += tokens
        self.position.flops += tokens * self._flops_per_token
        self._count_skipped(result)
        if result.is_skipped and self._saver is not None:
            self._saver.finish()  # what was begun before is there, should the run stop now
        self._health.look(result, self.position)
        self._bar.advance()
        if result.gradients is not None:
            self.folder.log({"step": self.step, **result.gradients})
        if self._memory_check is not None:
            self._memory_check.after(self.step, result.is_skipped)
        must_stop = result.must_stop or not self._validate_if_due()
        is_last = self.step == self.total_steps
        is_save_due = self._saver is not None and self._saver.is_due(
            self.step, is_last, result.is_skipped
        )
        # What was measured up to a checkpoint or to the end of a phase is logged before it.
        is_log_due = self.step % self.run.steps_per_print == 0 or self.step == phase.stop
        if is_last or is_log_due or is_save_due or must_stop:
            self.log(result.grad_norm)
        if self._saver is not None and not must_stop:
            self._saver.finish_written(result.is_written)
            if is_save_due:
                self._saver.save(self.position, can_wait=not is_last)
            self._saver.warn_if_too_slow(self._meter.last_step_seconds)
        return must_stop

    def _enter(self, phase: Phase) -> None:
        """Say which phase comes, where there are several."""
        self._phase = phase
        if self._prediction is not None:
            self._flops_per_token = self._prediction.flops_per_token(phase)
        phases = self.inputs.schedule.phases
        if len(phases) > 1:
            number = phases.index(phase) + 1
            steps = f"steps {phase.start + 1:,} to {phase.stop:,}"
            self.say(f"phase {number} of {len(phases)}, {steps}: {phase}")

    def _stop(self) -> None:
        if self._saver is not None:
            self._saver.save_and_stop(self.position, self.total_steps)

    def _validate_if_due(self) -> bool:
        """Validate where that is due and not done; False when asked to stop meanwhile."""
        interval = self.run.training.eval_interval
        is_due = self.step == self.total_steps or (interval and self.step % interval == 0)
        if not is_due or self.step in (0, self.position.validated):
            return True
        try:
            self.validate()
        except Interrupted:
            return False
        self.position.validated = self.step
        return True

    def validate(self) -> None:
        """Measure the whole model's loss on the validation samples. Collective.

        :raises Interrupted: on every rank, when one of them is asked to stop meanwhile.
        """
        if self._validation is None:
            return
        ACTIVITY.enter(VALIDATE)
        micro_batch = self.run.training.eval_micro_batch_size or self.inputs.batch.micro_batch
        result = self.backend.evaluate(self._validation, micro_batch)
        self.last_validation = self._fresh_validation = result
        values = {"validation/loss": result.loss}
        bits = self.bits_per_byte(result)
        if bits is not None:
            values["validation/bits_per_byte"] = bits
        self.folder.log({"step": self.step, **values, "validation/tokens": result.tokens})
        self.backend.monitor(values, self.position.samples)

    def bits_per_byte(self, result: Evaluation) -> float | None:
        """The validation loss in bits per byte of text; None without a tokenizer."""
        return result.bits_per_byte(self._validation_bytes) if self._validation_bytes else None

    def log(self, grad_norm: float) -> None:
        """Print one line and append it to the metrics. Collective."""
        ACTIVITY.enter(LOG)
        self.backend.wait_for_weights()
        reduced = self._meter.reduce()
        self.position.seconds += reduced.seconds
        batch = self.inputs.batch.global_batch
        tokens = reduced.steps * batch * self.inputs.train.sequence_length
        # Of the steps since the last line: ranks, or a phase, may have changed since the first.
        step_seconds = reduced.seconds / reduced.steps
        to_validation = self._steps_to_validation()
        line = LogLine(
            step=self.step,
            total_steps=self.total_steps,
            phase=self.inputs.schedule.number_at(self.step - 1),
            loss=reduced.loss,
            lowest_loss=reduced.lowest_loss,
            lowest_rank=reduced.lowest_rank,
            highest_loss=reduced.highest_loss,
            highest_rank=reduced.highest_rank,
            loss_std=reduced.loss_std,
            validation=self._fresh_validation.loss if self._fresh_validation else None,
            lr=self.backend.lr,
            grad_norm=grad_norm,
            skipped=self.position.skipped,
            tokens_per_second=tokens / reduced.seconds,
            memory_now=reduced.memory_now,
            memory_peak=reduced.memory_peak,
            to_validation=None if to_validation is None else step_seconds * to_validation,
            eta=step_seconds * (self.total_steps - self.step),
        )
        self._fresh_validation = None
        if self._lines % HEADER_EVERY == 0:
            self.say(header())
        self.say(format_line(line))
        self._bar.show(line)
        self._lines += 1
        self.folder.log({**asdict(line), **self._counts()})
        self.backend.monitor(line.monitored(), self.position.samples)

    def _counts(self) -> dict[str, float | None]:
        """What the metrics have since the first step; ``flops`` is None where it is not known."""
        position = self.position
        return {
            "samples": position.samples,
            "tokens": position.tokens,
            "seconds": position.seconds,
            "flops": None if self._prediction is None else position.flops,
        }

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.backend.rank == 0:
            say(text)

    def _steps_to_validation(self) -> int | None:
        """Steps to the next validation; None where there is none."""
        if self._validation is None or self.step == self.total_steps:
            return None
        left = self.total_steps - self.step
        interval = self.run.training.eval_interval
        return min(left, interval - self.step % interval) if interval else left

    def _batches(self) -> Iterator[Tensor]:
        """This process's part of the global batch of each step to come."""
        assert self.run.data is not None
        global_batch = self.inputs.batch.global_batch
        batches = StepBatches(
            self.inputs.train,
            self.run.training.seed,
            samples_consumed=self.position.samples,
            global_batch=global_batch,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
        )
        return read_batches(
            batches,
            self.total_steps - self.step,
            num_workers=self.run.data.num_workers,
            pin_memory=device_type() == "cuda",
        )

    def _count_skipped(self, result: Step) -> None:
        position = self.position
        position.skipped += result.is_skipped
        position.skipped_in_a_row = position.skipped_in_a_row + 1 if result.is_skipped else 0

    def _validation_tokens(self) -> Tensor | None:
        """This process's part of the validation samples, ``[samples, sequence + 1]``."""
        dataset = self.inputs.validation
        if dataset is None:
            return None
        indices = validation_samples(dataset, self.run.training.eval_samples)
        world_size = self.backend.world_size
        padded = -(-len(indices) // world_size) * world_size
        return torch.from_numpy(
            dataset.batch(indices[rank_slice(padded, self.backend.rank, world_size)])
        )

    def _count_bytes(self) -> int | None:
        assert self.run.data is not None
        if self._validation is None or self.run.data.tokenizer is None:
            return None
        own = target_bytes(load_tokenizer(self.run.data.tokenizer), self._validation)
        count = torch.tensor(own, device=device_type())
        return int(all_reduce(count, "bytes of the validation text"))
