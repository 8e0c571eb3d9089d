"""What a run looks at after every step: skipped steps, spikes of the loss, differing weights."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from sdp_llm.config import RunConfig
from sdp_llm.data import Place
from sdp_llm.data.sampler import rank_slice
from sdp_llm.errors import TrainingStopped
from sdp_llm.ranks import say_ranks
from sdp_llm.training.backends import Backend, Step
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.position import Position
from sdp_llm.training.run_folder import RunFolder
from sdp_llm.world import all_gather

WINDOW = 128  # steps whose median a spike is measured by
FEWEST = 16  # steps until there is a median to speak of
_SHOWN = 4  # samples of a rank in a printed line; metrics.jsonl has all


def is_spike(loss: float, before: Sequence[float], factor: float) -> bool:
    """Whether ``loss`` is above ``factor`` times the median of those before it.

    Never with fewer than ``FEWEST`` of them.
    """
    return len(before) >= FEWEST and loss > factor * median(before)


class Health:
    """Looks at each step and says, or stops, what is not as it should be.

    :param start: how far the run had come; its weights are the same on all ranks then.
    """

    def __init__(
        self,
        run: RunConfig,
        inputs: Inputs,
        backend: Backend,
        folder: RunFolder,
        say: Callable[[str], None],
        start: Position,
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._backend = backend
        self._folder = folder
        self._say = say
        self._same_at = start.step
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, result: Step, position: Position) -> None:
        """Look at the step that ``position`` has just counted. Collective.

        :raises TrainingStopped: on every rank, after too many non-finite steps in a row, or where
            ranks have different weights of one unit.
        """
        if result.is_skipped or self._run.training.spike_factor is not None:
            self._backend.wait_for_weights()
            losses = all_gather(result.losses, "losses of the step").flatten().tolist()
            if self._backend.rank == 0:
                self._report(result, losses, position)
        limit = self._run.training.max_skipped_steps
        if position.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"step {position.step}: the loss or gradient was not finite in {limit} steps in a "
                f"row (training.max_skipped_steps = {limit}), and nothing was saved since; lower "
                "the learning rate or look at the data"
            )
        interval = self._run.training.check_interval
        if interval and position.step % interval == 0:
            self._compare_weights(position.step)

    def _report(self, result: Step, losses: list[float], position: Position) -> None:
        """On rank 0: say what is wrong with the losses of the step, and what was read for them.

        :param losses: of each worker of the run.
        """
        bad = [worker for worker, loss in enumerate(losses) if not math.isfinite(loss)]
        if result.is_skipped:
            what = "the gradient" if not bad else f"the loss of {say_ranks(bad)}"
            limit = self._run.training.max_skipped_steps
            count = f"{position.skipped_in_a_row} in a row, the run stops at {limit}"
            self._say(f"step {position.step}: skipped, {what} is not finite ({count})")
            for worker in bad:
                self._say_samples("skipped step", worker, len(losses), None, position)
        factor = self._run.training.spike_factor
        for worker, loss in enumerate(losses if factor is not None else []):
            before = self._losses[worker]
            if not math.isfinite(loss):
                continue
            assert factor is not None
            if is_spike(loss, before, factor):
                self._say(
                    f"step {position.step}: the loss of rank {worker} is a spike: {loss:.4f}, "
                    f"{loss / median(before):.2f} times the median of {len(before)} steps before"
                )
                self._say_samples("loss spike", worker, len(losses), loss, position)
            before.append(loss)

    def _say_samples(
        self, incident: str, worker: int, workers: int, loss: float | None, position: Position
    ) -> None:
        batch = self._inputs.batch.global_batch
        part = rank_slice(batch, worker, workers)
        first = position.samples - batch + part.start
        seed = self._run.training.seed
        places = self._inputs.train.locate(seed, first, part.stop - part.start)
        more = f" and {len(places) - _SHOWN} more, in metrics.jsonl" if places[_SHOWN:] else ""
        self._say(f"  rank {worker} read {'; '.join(map(str, places[:_SHOWN]))}{more}")
        entry: dict[str, Any] = {"step": position.step, "incident": incident, "rank": worker}
        self._folder.log(entry | {"rank_loss": loss, "read": [_entry(place) for place in places]})

    def _compare_weights(self, step: int) -> None:
        differing = self._backend.differing_units()
        if not differing:
            self._same_at = step
            return
        name, camps = next(iter(differing.items()))
        more = f" (and of {len(differing) - 1} more units)" if len(differing) > 1 else ""
        raise TrainingStopped(
            f"step {step}: the weights of {name}{more} are not the same on all ranks that hold "
            f"them: {' against '.join(say_ranks(camp) for camp in camps)}; look at the hardware of "
            f"these ranks, and go on from a checkpoint of step {self._same_at} or before "
            "(--resume PATH), when they were the same"
        )


def _entry(place: Place) -> dict[str, Any]:
    documents = [place.first_document, place.last_document]
    return {"corpus": place.prefix, "sample": place.sample, "documents": documents}
