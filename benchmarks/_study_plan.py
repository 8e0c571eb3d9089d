"""Which runs answer which question of the study, and in which order they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks._study_cases import (
    DENSE,
    FREE_RATES,
    HALF,
    INITIALIZER_RANGE,
    LATE_BACKWARD,
    LATE_RATES,
    Case,
    Model,
    Run,
)

BASE = Model()
STEPS = 1200  # of the dense model: 2.5 M tokens, 11 per parameter, 25 per block parameter
LONG = STEPS * 3

NARROW, WIDE, WIDEST = Model(16), Model(64), Model(128)
DEEP, SHALLOW = Model(32, 16), Model(32, 4)
# 0.07 times the root of 64 is 0.56, as is 0.02 times that of 768: what a matrix makes of a normed
# input starts as large as in the models that transformers' default is meant for.
LARGER_START = replace(WIDE, initializer_range=0.07)
_RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
# By model and family: the learning rates that are tried with seed 0, and the budget they are tried
# with. The shallow dense model takes that of the deeper one, as all of fewer blocks do.
GRIDS: Mapping[tuple[Model, str], tuple[tuple[float, ...], int]] = {
    (BASE, DENSE): (_RATES, STEPS),
    (BASE, HALF): (_RATES, STEPS),
    (NARROW, DENSE): (_RATES[1:4], STEPS),
    (NARROW, HALF): (_RATES[2:], STEPS),
    (SHALLOW, HALF): (_RATES[:4], STEPS),
    (WIDE, DENSE): (_RATES[1:4], STEPS),
    (WIDE, HALF): (_RATES[1:4], STEPS),
    (DEEP, DENSE): (_RATES[1:3], STEPS),
    (DEEP, HALF): (_RATES[1:3], STEPS),
    (WIDEST, DENSE): ((0.001, *_RATES[:2]), STEPS // 2),
    (WIDEST, HALF): ((0.001, *_RATES[:2]), STEPS // 2),
}
SWEEP = 0

# By model and family, and by case where it has a rate of its own.
Rates = Mapping[tuple[Model, str] | Case, float]


def learning_rate(case: Case, rates: Rates) -> float | None:
    """The best rate of the case's family on the model that was swept for it.

    :param rates: what the sweeps have found, by model and family.
    """
    return rates.get((_swept(case), case.family))


def _swept(case: Case) -> Model:
    """The case's own model, else the one that gives its budget, else the base model.

    Dropout and the spread of the initial weights do not count.
    """
    models = (case.model, case.reference or BASE)
    plain = [replace(m, dropout=0.0, initializer_range=INITIALIZER_RANGE) for m in models]
    return plain[0] if (plain[0], case.family) in GRIDS else plain[1]


def sweep(model: Model, family: str) -> list[Run]:
    """The runs that choose the learning rate of a model."""
    rates, steps = GRIDS[model, family]
    return [Run(Case(model, family, steps), rate, 0) for rate in rates]


def own_sweep(case: Case) -> list[Run]:
    """The runs that choose the learning rate of one of ``TUNED``."""
    return [Run(case, rate, 0) for rate in OWN_RATES[case.dense_steps]]


def _at(kinds: Sequence[str], **budget: bool) -> list[Case]:
    return [Case(BASE, kind, STEPS, **budget) for kind in kinds]


def _smaller(blocks: int, steps: int = STEPS, model: Model = BASE, kind: str = DENSE) -> Case:
    """A model with fewer blocks, at as many operations as the dense steps of ``model``."""
    return Case(replace(model, blocks=blocks), kind, steps, reference=model)


_GROWING = "forward 1/4, 1/2, full, a third each"
_LATE_FULL = "forward 1/4, last 20% full"
_SCALED = "forward 1/4, scale eval"
_EIGHTH = "forward 1/8, scale eval"
_TWO_PINNED = "forward 1/8, two of each pinned, scale eval"
# What is compared at a longer budget, too.
_BOTH = (
    *(HALF, "forward 1/4", _SCALED, _EIGHTH),
    *(_GROWING, "forward 1/2, last 50% backward", LATE_BACKWARD),
)
_LONG = (
    Case(BASE, DENSE, LONG),
    *(_smaller(blocks, LONG) for blocks in (5, 4, 3)),
    *(Case(BASE, kind, LONG) for kind in (*_BOTH, _LATE_FULL, "forward 1/2, scale eval")),
)
_PINNED = ["forward 3/4", "forward 1/4", "backward 1/2", "backward 3/4", "backward 1/4"]
_UNPINNED = ["forward 1/2, no pins", "forward 3/4, no pins", "backward 1/2, no pins"]

# What is compared at the double width, too.
_WIDE = (
    *(Case(WIDE, kind, STEPS) for kind in (DENSE, *_BOTH, _LATE_FULL, "forward 1/2, scale eval")),
    *(_smaller(blocks, STEPS, WIDE) for blocks in (5, 4, 3)),
)
# And at four times the width.
_WIDEST = (
    *(Case(WIDEST, kind, STEPS // 2) for kind in (DENSE, _SCALED, _EIGHTH, _TWO_PINNED)),
    *(_smaller(blocks, STEPS // 2, WIDEST) for blocks in (5, 4, 3)),
)
# And with larger initial weights.
_LARGER_START = (
    *(Case(LARGER_START, kind, STEPS) for kind in (DENSE, _SCALED, _EIGHTH, _TWO_PINNED)),
    *(_smaller(blocks, STEPS, LARGER_START) for blocks in (5, 4, 3)),
)
_SCHEDULES = tuple(
    _at(
        [
            "forward 1/2, rotated every 50, last 50% full",
            _GROWING,
            *(f"forward 1/4, {side} 3, full, a third each" for side in ("first", "last")),
            *(LATE_BACKWARD, _LATE_FULL, _SCALED, _EIGHTH),
            *LATE_RATES,
        ]
    )
)

# By question and in order of what they tell; a case may serve several questions.
QUESTIONS: Mapping[int, tuple[Case, ...]] = {
    1: (
        *_at([DENSE, HALF, *_PINNED, *_UNPINNED, "forward 1/4, no pins"]),
        *_at([HALF, *_PINNED, *_UNPINNED], is_equal_flops=False),
    ),
    2: (
        *_at([DENSE, *_BOTH, "backward 1/2"]),
        *(_smaller(blocks) for blocks in (5, 6, 4, 3, 2)),
        *(_smaller(4, kind=kind) for kind in (_SCALED, "forward 1/2, scale eval")),
        *_LONG,
    ),
    3: (
        *_at([DENSE, HALF, "forward 1/2, rotated every 1"]),
        Case(replace(BASE, dropout=0.1), DENSE, STEPS),
    ),
    4: tuple(
        _at(
            [
                DENSE,
                HALF,
                "forward 1/2, no pins",
                "forward 1/2, first pinned",
                "forward 1/2, last pinned",
                "forward 1/2, two of each pinned",
                *(_EIGHTH, _TWO_PINNED),
            ]
        )
    ),
    5: (
        *_at(
            [
                DENSE,
                HALF,
                *(f"forward 1/2, rotated every {steps}" for steps in (50, 1, 500)),
                *(
                    f"forward 1/2, last {share:.0%} {name}"
                    for share in (0.5, 0.2, 0.1, 0.05)
                    for name in ("full", "backward")
                ),
                "forward 1/2, scale inverse_coverage",
                "forward 1/2, scale eval",
                "forward 1/2, first 20% full",
                *FREE_RATES,
            ]
        ),
        *_SCHEDULES,
    ),
    6: tuple(
        _at(
            [
                HALF,
                "forward 1/2, two halves",
                "forward 1/2, two interleaved",
                "forward 1/2, cyclic",
                "backward 1/2",
                "backward 1/2, two halves",
            ]
        )
    ),
    7: tuple(_at([HALF, "backward 1/2", "forward 1/2, no pins"])),
    8: (
        *(
            Case(model, kind, steps, samples=samples)
            for model, steps, samples in (
                (BASE, STEPS, 1),
                (BASE, LONG, 1),
                (NARROW, STEPS, 1),
                (SHALLOW, STEPS, 1),
                (DEEP, STEPS, 1),
                (WIDEST, STEPS // 2, 1),
                (BASE, STEPS // 2, 2),
            )
            for kind in (DENSE, HALF)
        ),
        *_WIDE,
        *_WIDEST,
        *_LARGER_START,
        *(
            Case(LARGER_START, kind, STEPS)
            for kind in ("forward 1/2, scale eval", LATE_BACKWARD, _GROWING)
        ),
    ),
    9: _SCHEDULES,
}
# The configs of SDP that are named for what they are for, and what the study calls the same.
PRESETS: Mapping[str, str] = {
    "memory": _EIGHTH,
    "balanced": "forward 1/2, scale eval",
    "quality": _TWO_PINNED,
}
# On ranks whose number eight does not divide, in the place of memory.
FEWER_RANKS = _SCALED
# What they are compared at: the column's title, the model and the budget.
COMPARED: Mapping[str, tuple[Model, int]] = {
    "width 32": (BASE, STEPS),
    "width 32, long": (BASE, LONG),
    "width 64": (WIDE, STEPS),
    "width 64, larger weights": (LARGER_START, STEPS),
    "width 128": (WIDEST, STEPS // 2),
}
# What is compared with a rate of its own as well: the best of these with seed 0, by budget.
OWN_RATES = {STEPS: (0.004, 0.008, 0.016), LONG: (0.004, 0.008)}
TUNED = (
    *_at([DENSE, "forward 1/2, scale eval", _SCALED, _EIGHTH, _TWO_PINNED, LATE_BACKWARD]),
    *(_smaller(blocks) for blocks in (5, 4, 3, 2)),
    *(Case(WIDE, kind, STEPS) for kind in (DENSE, _SCALED, _EIGHTH, _TWO_PINNED)),
    *(_smaller(blocks, STEPS, WIDE) for blocks in (5, 4, 3)),
    *(Case(BASE, kind, LONG) for kind in (DENSE, _SCALED, _EIGHTH, _TWO_PINNED)),
    *(_smaller(blocks, LONG) for blocks in (5, 4, 3)),
)
# What the goal is judged by at the largest size: the dense model, quality, and the smaller dense
# model that needs its memory. Three seeds did not tell those two apart, so all get as many again.
DECISIVE = (
    *(Case(WIDEST, kind, STEPS // 2) for kind in (DENSE, _TWO_PINNED)),
    _smaller(5, STEPS // 2, WIDEST),
)
# The dense model on as many tokens as one of 3 blocks: what depth is worth where it costs nothing,
# which bounds what subnetworks of 3 blocks can win by making 8 of them.
AS_MANY_TOKENS = tuple(
    Case(model, DENSE, _smaller(3, STEPS, model).steps()) for model in (BASE, WIDE)
)
PROBED = frozenset(QUESTIONS[7])
# What the defaults hang on.
_FIRST = frozenset(
    (
        *_at([DENSE, HALF, "forward 1/4", "backward 1/2", "forward 1/2, no pins"]),
        *_at([f"forward 1/2, last 50% {name}" for name in ("full", "backward")]),
        *_at(["forward 1/2, rotated every 1", "forward 1/2, rotated every 50, last 50% full"]),
        *_at([_GROWING]),
        _smaller(5),
    )
)
# Whether that holds at another width.
_SECOND = frozenset(
    (
        *(Case(WIDE, kind, STEPS) for kind in (DENSE, _SCALED, _GROWING)),
        _smaller(4, STEPS, WIDE),
        *_at([_SCALED]),
    )
)
# What answers a question where the first tiers do not.
_THIRD = frozenset(
    (
        _smaller(4),
        *(Case(model, kind, STEPS) for kind in (DENSE, HALF) for model in (NARROW, SHALLOW)),
        *_at(["forward 1/2, last 20% full"]),
        *_at(["forward 1/2, two halves", "backward 1/2, two halves"]),
        *_at(["forward 1/2, scale inverse_coverage", "forward 1/2, scale eval"]),
        *_at([HALF], is_equal_flops=False),
        Case(replace(BASE, dropout=0.1), DENSE, STEPS),
    )
)
_FOURTH = frozenset(
    (
        *_at([f"forward 1/2, {which} pinned" for which in ("first", "last", "two of each")]),
        *_at(["forward 3/4"]),
    )
)
# What is trained with every seed before the next begins.
TIERS = (_FIRST, _SECOND, frozenset(_LARGER_START), _THIRD, _FOURTH)


@dataclass(frozen=True)
class Planned:
    """A run of the list; ``run`` is None as long as its learning rate is not known."""

    question: int
    case: Case
    seed: int
    run: Run | None


def tier(case: Case) -> int:
    """The first of ``TIERS`` that has the case; what is in none of them comes last."""
    return next((at for at, cases in enumerate(TIERS) if case in cases), len(TIERS))


def planned(rates: Rates, questions: Sequence[int], seeds: int) -> Iterator[Planned]:
    """All runs in their order, each once: by tier (:func:`tier`), then seed, then question.

    A learning rate is chosen before the first run that needs it. What has a rate of its own comes
    last, with question 2; then the further seeds of ``DECISIVE``, and what depth is worth.
    """
    listed: set[Run | tuple[Case, int]] = set()
    for at, seed in product(range(len(TIERS) + 1), range(seeds)):
        for question in questions:
            for case in QUESTIONS[question]:
                if tier(case) == at:
                    swept = sweep(_swept(case), case.family)
                    rate = learning_rate(case, rates)
                    yield from _of_case(case, question, seed, swept, rate, listed)
    if 2 in questions:
        for seed, case in product(range(seeds), TUNED):
            yield from _of_case(case, 2, seed, own_sweep(case), rates.get(case), listed)
        decisive = product(range(seeds, 2 * seeds), DECISIVE)
        for seed, case in (*decisive, *product(range(seeds), AS_MANY_TOKENS)):
            swept = sweep(_swept(case), case.family)
            yield from _of_case(case, 2, seed, swept, learning_rate(case, rates), listed)


def _of_case(
    case: Case,
    question: int,
    seed: int,
    swept: Sequence[Run],
    rate: float | None,
    listed: set[Run | tuple[Case, int]],
) -> Iterator[Planned]:
    for run in swept:
        if run not in listed:
            listed.add(run)
            yield Planned(SWEEP, run.case, run.seed, run)
    run = None if rate is None else Run(case, rate, seed)
    key = (case, seed) if run is None else run
    if key not in listed:
        listed.add(key)
        yield Planned(question, case, seed, run)
