"""The `sdp` section: which blocks each rank trains, in which phase of the run."""

# `key` and `items` return dataclasses.field, which is what RUF009 cannot see.
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from sdp_llm.config.declare import items, key
from sdp_llm.config.kinds import (
    COUNT,
    COVERAGE,
    OWNER_SETS,
    POSITIVE,
    SHARE,
    Kind,
    choice,
    number,
    wrong,
)
from sdp_llm.config.residual import RESIDUAL_SCALES, check_residual_scale
from sdp_llm.errors import ConfigError

DEFAULT_COVERAGE = Fraction(1, 2)
MASKINGS = ("forward", "backward")
STRATEGIES = ("balanced", "cyclic", "random")
_MASKING = choice(*MASKINGS)
_STRATEGY = choice(*STRATEGIES)
_OWNER_KEYS = ("coverage", "owners_per_block", "owner_sets")


def _instead(kind: Kind, name: str) -> Any:
    return key(kind, f"instead of sdp.{name}", None)


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a run; None: as in the `sdp` section around it."""

    until: Fraction = key(SHARE, "share of the budget's steps at which the phase ends")
    masking: str | None = _instead(_MASKING, "masking")
    coverage: Fraction | None = _instead(COVERAGE, "coverage")
    owners_per_block: int | None = _instead(POSITIVE, "owners_per_block")
    strategy: str | None = _instead(_STRATEGY, "strategy")
    pinned_first: int | None = _instead(COUNT, "pinned_first")
    pinned_last: int | None = _instead(COUNT, "pinned_last")
    owner_sets: tuple[tuple[int, ...], ...] | None = _instead(OWNER_SETS, "owner_sets")
    seed: int | None = _instead(COUNT, "seed")
    rotate_every: int | None = _instead(COUNT, "rotate_every")

    def given(self) -> dict[str, Any]:
        """The values that the phase has of its own, by key."""
        own = {item.name: getattr(self, item.name) for item in fields(self)[1:]}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class SDPConfig:
    """Which blocks each rank trains; see `sdp_llm.plan`."""

    masking: str = key(
        _MASKING,
        "what a rank does with a block it does not own: skip it, or run it frozen",
        "forward",
    )
    coverage: Fraction | None = key(
        COVERAGE, "share of the ranks that own each free block", None, shown="1/2"
    )
    owners_per_block: int | None = key(POSITIVE, "ranks per free block, instead of coverage", None)
    strategy: str = key(
        _STRATEGY,
        "how free blocks are assigned to ranks: balanced has the least λ of several plans, random "
        "follows the seed, cyclic slides over the ranks",
        "balanced",
    )
    pinned_first: int = key(COUNT, "blocks at the start that every rank owns", 1)
    pinned_last: int = key(COUNT, "blocks at the end that every rank owns", 1)
    owner_sets: tuple[tuple[int, ...], ...] | None = key(
        OWNER_SETS, "the ranks of every block, instead of coverage", None
    )
    seed: int = key(COUNT, "seed of the assignment and of its rotations", 0)
    rotate_every: int = key(
        COUNT, "steps after which the free blocks exchange their owner sets; 0: never", 0
    )
    schedule: tuple[PhaseConfig, ...] | None = items(
        PhaseConfig,
        "phases of the run, each with `until`, the share of the budget at which it ends, and "
        "keys from `masking` to `rotate_every` above where it differs",
    )
    ranks_per_node: int = key(
        POSITIVE,
        "ranks in a row that own the same free blocks, so that those of a node send the "
        "gradients of a block to the other nodes that own it only; 1: no regard to nodes",
        1,
    )
    residual_scale: str = key(
        choice(*RESIDUAL_SCALES),
        "what a block of owner share s = p/n adds is multiplied by 1/s in subnetworks "
        "(inverse_coverage), or by s in the whole model (eval)",
        "none",
    )
    reductions_under_way: int = key(
        POSITIVE,
        "units whose gradients may be under way at a time, at stages 1 and 2; more of them keep "
        "slow links busy and take memory",
        1,
    )
    memory_limit_gib: float | None = key(
        number(above=0), "most memory that a rank may be predicted to need, in GiB", None
    )

    def __post_init__(self) -> None:
        if not _check_owner_keys(self, "sdp"):
            object.__setattr__(self, "coverage", DEFAULT_COVERAGE)
        maskings = [phase.masking or self.masking for phase in self.schedule or ()]
        check_residual_scale(maskings or [self.masking], self.residual_scale)
        end = Fraction(0)
        for i, phase in enumerate(self.schedule or ()):
            path = f"sdp.schedule[{i}]"
            _check_owner_keys(phase, path)
            if phase.until <= end:
                raise wrong(
                    f"{path}.until",
                    float(phase.until),
                    f"expected more than {float(end):g}, where the phase before ends; "
                    "put the phases in the order of the run",
                )
            end = phase.until
        if self.schedule and end != 1:
            raise wrong(
                f"sdp.schedule[{len(self.schedule) - 1}].until",
                float(end),
                "the last phase must end with the run; set it to 1, or add a phase until 1",
            )

    def phases(self) -> tuple[tuple[Fraction, SDPConfig], ...]:
        """Each phase's end, as a share of the budget, and the section with the phase's values.

        Without a schedule there is one phase.
        """
        if self.schedule is None:
            return ((Fraction(1), self),)
        return tuple((phase.until, self._in_phase(phase)) for phase in self.schedule)

    def _in_phase(self, phase: PhaseConfig) -> SDPConfig:
        given = phase.given()
        if not given.keys().isdisjoint(_OWNER_KEYS):
            # Whichever of them the phase names replaces whichever the section names.
            given = dict.fromkeys(_OWNER_KEYS) | given
        if (phase.masking or self.masking) == "backward":
            given["residual_scale"] = "none"  # it has no effect there
        return replace(self, schedule=None, **given)


def _check_owner_keys(config: SDPConfig | PhaseConfig, path: str) -> bool:
    """Whether one of the three keys is given; raises ConfigError for more."""
    given = [f"{path}.{name}" for name in _OWNER_KEYS if getattr(config, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)}: at most one of {', '.join(_OWNER_KEYS)} may be given; "
            "remove the others or set them to null"
        )
    return bool(given)
