"""One process's part of a run, from where it begins to how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdp_llm.activity import ACTIVITY
from sdp_llm.agree import agree
from sdp_llm.config import RunConfig
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan, Schedule
from sdp_llm.processes import was_killed
from sdp_llm.subnetwork.adapter import ModelLayout
from sdp_llm.training.backends import EngineBackend
from sdp_llm.training.budget import steps_from
from sdp_llm.training.checkpoints import (
    check_space,
    checkpoint_bytes,
    checkpoint_line,
    largest_share,
)
from sdp_llm.training.exhausted import out_of_memory_explained
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.memory import MemoryCheck, model_state_bytes
from sdp_llm.training.position import Position
from sdp_llm.training.prediction import Prediction, predict
from sdp_llm.training.progress import say as print_line
from sdp_llm.training.resume import Start, facts_to_compare, find_start
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.training.saver import Saver
from sdp_llm.training.status import (
    FINISHED,
    RUNNING,
    Status,
    describe_status,
    read_status,
)
from sdp_llm.training.summary import closing_lines, summary_card
from sdp_llm.training.trainer import Trainer
from sdp_llm.training.watchdog import Watchdog


def train(
    run: RunConfig,
    inputs: Inputs,
    backend: EngineBackend,
    folder: RunFolder,
    resume: str,
    watchdog: Watchdog | None = None,
) -> None:
    """Find the start, train, and leave a status that says how it ended. Collective.

    :param resume: as in :func:`sdp_llm.training.resume.find_start`.
    :param watchdog: knows whose failure another rank's is.
    :raises ConfigError: on every rank, when it cannot begin.
    :raises TrainingStopped: on every rank, when it cannot go on.
    """

    def say(text: str) -> None:
        if backend.rank == 0:
            print_line(text)

    start = find_start(run, inputs, backend, resume)
    position = start.position
    ACTIVITY.step = position.step
    steps = steps_from(run, inputs.batch, position, inputs.schedule.total_steps)
    for line in _start_lines(start, inputs.schedule, steps):
        say(line)
    # One rank looks: on a shared disk another may see an older one, and would go on alone.
    before = agree(lambda: read_status(folder.path) if backend.rank == 0 else {})[0]
    if was_killed(before):
        say(f"the run before was {describe_status(before)}")
    was_finished = before.get("state") == FINISHED
    if start.checkpoint is not None and was_finished and position.step >= steps:
        say("finished already: raise the budget to train on, or take another training.run_dir")
        return
    _train_from(start, steps, run, inputs, backend, folder, say, watchdog)


def _train_from(
    start: Start,
    steps: int,
    run: RunConfig,
    inputs: Inputs,
    backend: EngineBackend,
    folder: RunFolder,
    say: Callable[[str], None],
    watchdog: Watchdog | None,
) -> None:
    """Train up to ``steps``; from when the status says that it runs, it also says how it ended."""
    position = start.position
    layout = backend.engine.sharded.subnetwork.layout
    size = checkpoint_bytes(run, layout.numel)
    agree(lambda: check_space(run, folder.checkpoints, size, position.step, steps))
    newest = f"checkpoints/{start.checkpoint.name}" if start.is_own and start.checkpoint else None
    status = Status(folder.path, backend.rank, steps, start.began_from)
    with (
        _failure_told(status, position, watchdog),
        out_of_memory_explained(run, inputs, backend.rank),  # the status has its line, too
    ):
        status.write(state=RUNNING, step=position.step, checkpoint=newest)
        prediction = predict(run, inputs)
        # What a folder has of another run is none of this one's history.
        for line in folder.begin(position.step if start.is_own else 0, prediction):
            say(line)
        say(summary_card(run, inputs, steps, prediction, position))
        say(checkpoint_line(run, layout.numel, _largest_share(inputs.schedule, layout)) + "\n")
        saved_step = position.step if newest else None
        saver = _saver(run, inputs, backend, folder, status, say, size, saved_step)
        memory_check = _memory_check(prediction, backend, folder, say)
        trainer = Trainer(
            run,
            inputs,
            backend,
            folder,
            steps,
            saver=saver,
            position=position,
            prediction=prediction,
            memory_check=memory_check,
        )
        if trainer.fit():
            status.write(state=FINISHED, step=trainer.step)
            say(closing_lines(trainer))


@contextmanager
def _failure_told(status: Status, position: Position, watchdog: Watchdog | None) -> Iterator[None]:
    """Within, what ends the run leaves a status that says why."""
    if watchdog is not None:
        watchdog.on_failure = status.fail
    try:
        yield
    except BaseException as error:
        reason = watchdog.reason_of(error) if watchdog else f"{type(error).__name__}: {error}"
        status.fail(f"step {position.step}: {reason}")
        raise


def _saver(
    run: RunConfig,
    inputs: Inputs,
    backend: EngineBackend,
    folder: RunFolder,
    status: Status,
    say: Callable[[str], None],
    size: int,
    saved_step: int | None,
) -> Saver:
    return Saver(
        run.training,
        backend,
        folder,
        status,
        say,
        facts=facts_to_compare(run, inputs),
        size=size,
        saved_step=saved_step,
    )


def _memory_check(
    prediction: Prediction | ConfigError,
    backend: EngineBackend,
    folder: RunFolder,
    say: Callable[[str], None],
) -> MemoryCheck | None:
    """What compares the prediction with the first steps; None where there is none."""
    if isinstance(prediction, ConfigError):
        return None
    engine = backend.engine
    return MemoryCheck(prediction, backend.rank, lambda: model_state_bytes(engine), say, folder.log)


def _largest_share(schedule: Schedule, layout: ModelLayout) -> int:
    """The most elements that one rank writes into a checkpoint, in any phase."""

    def in_phase(plan: Plan) -> int:
        owners = (plan.owners(unit.block) for unit in layout.units)
        sizes = (unit.numel for unit in layout.units)
        return largest_share(zip(owners, sizes, strict=True), schedule.world_size)

    return max(in_phase(phase.plan) for phase in schedule.phases)


def _start_lines(start: Start, schedule: Schedule, steps: int) -> list[str]:
    if start.checkpoint is None:
        return list(start.messages)
    position, last = start.position, schedule.phases[-1]
    line = (
        f"continuing from {start.checkpoint}: step {position.step} of {steps}, "
        f"{position.samples:,} samples, {position.tokens:,} tokens"
    )
    lines = [*start.messages, line]
    if steps <= last.start:
        lines.append(
            f"warning: the run ends at step {steps}, before its last phase begins at step "
            f"{last.start}: phases are shares of the budget at one batch size"
        )
    return lines
