"""What one run of the study is: a model, a kind of training, a budget, a rate and a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import LlamaConfig

from sdp_llm.config import parse_config
from sdp_llm.plan.cost import dense_flops_per_token, steps_for_dense_flops
from sdp_llm.plan.schedule_cost import mean_flops_per_token
from sdp_llm.plan.size import CostSetup, ModelSize
from sdp_llm.subnetwork.measure import model_size

WORLD_SIZE = 8
SEQUENCE_LENGTH = 256
VOCABULARY = 2048
LOSS_CHUNK = 64  # tokens, in the closed forms
VALIDATIONS = 5  # in a run
FIRST_SEED = 1234
INITIALIZER_RANGE = 0.02  # transformers' default

DENSE = "dense"
HALF = "forward 1/2"


@dataclass(frozen=True)
class Model:
    """A Llama of the study; its name tells its shape.

    Attributes:
        initializer_range: standard deviation of the initial weights.
    """

    hidden: int = 32
    blocks: int = 8
    dropout: float = 0.0
    initializer_range: float = INITIALIZER_RANGE

    def __str__(self) -> str:
        dropout = f"-dropout{self.dropout:g}" if self.dropout else ""
        spread = self.initializer_range
        initial = f"-init{spread:g}" if spread != INITIALIZER_RANGE else ""
        return f"h{self.hidden}-b{self.blocks}{dropout}{initial}"

    def config(self) -> LlamaConfig:
        """The HuggingFace config."""
        heads = max(2, self.hidden // 32)
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=self.blocks,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=SEQUENCE_LENGTH,
            tie_word_embeddings=False,
            attention_dropout=self.dropout,
            initializer_range=self.initializer_range,
        )


@cache
def size_of(model: Model) -> ModelSize:
    """What the closed forms take, for one sample per worker and micro-batch.

    The loss counts in pieces, as in the configs: otherwise the logits would be most of the memory.
    """
    return model_size(model.config(), 1, SEQUENCE_LENGTH, loss_chunk=LOSS_CHUNK)


def explicit(*free: str) -> dict[str, Any]:
    """The ``sdp`` section with these owners of the free blocks, such as "0123", ends pinned."""
    world = list(range(WORLD_SIZE))
    return {"owner_sets": [world, *([int(rank) for rank in owners] for owners in free), world]}


def phases(*given: tuple[float, Mapping[str, Any]], coverage: str = "1/2") -> dict[str, Any]:
    """Forward masking at this coverage, with phases that end at these shares of the run."""
    return {"coverage": coverage, "schedule": [{"until": until, **own} for until, own in given]}


_NO_PINS = {"pinned_first": 0, "pinned_last": 0}
_BACKWARD = {"masking": "backward"}
_FULL = {"coverage": "1"}
FINISHES = (0.05, 0.1, 0.2, 0.5)  # shares of the run
ROTATIONS = (1, 50, 500)  # steps
# The learning rate of the free blocks over that of the shared parameters, by name of the kind.
FREE_RATES = {f"forward 1/2, free blocks' rate x {factor:g}": factor for factor in (0.5, 2.0)}
LATE_BACKWARD = "forward 1/4, last 20% backward"


@dataclass(frozen=True)
class LateRate:
    """What the learning rate of a run's last phase is multiplied by.

    Attributes:
        factor: after the warm-up.
        warmup: steps in which it rises there from zero, linearly, as a share of the run's.
    """

    factor: float = 1.0
    warmup: float = 0.0

    def at(self, step: int, total_steps: int) -> float:
        """The factor of a step, counted from the begin of the phase."""
        return self.factor * min(1.0, (step + 1) / (round(self.warmup * total_steps) + 1))


LATE_RATES = {
    f"{LATE_BACKWARD}, {name}": rate
    for name, rate in (
        ("rate x 0.5", LateRate(0.5)),
        ("rate x 2", LateRate(2.0)),
        ("warmed up again", LateRate(warmup=0.02)),
    )
}
# By name: the `sdp` section, without the seed.
KINDS: Mapping[str, Mapping[str, Any]] = {
    DENSE: {"coverage": "1"},
    "forward 3/4": {"coverage": "3/4"},
    HALF: {"coverage": "1/2"},
    "forward 1/4": {"coverage": "1/4"},
    "backward 3/4": {"coverage": "3/4", **_BACKWARD},
    "backward 1/2": {"coverage": "1/2", **_BACKWARD},
    "backward 1/4": {"coverage": "1/4", **_BACKWARD},
    "forward 3/4, no pins": {"coverage": "3/4", **_NO_PINS},
    "forward 1/2, no pins": {"coverage": "1/2", **_NO_PINS},
    "forward 1/4, no pins": {"coverage": "1/4", **_NO_PINS},
    "backward 1/2, no pins": {"coverage": "1/2", **_BACKWARD, **_NO_PINS},
    "forward 1/2, first pinned": {"coverage": "1/2", "pinned_last": 0},
    "forward 1/2, last pinned": {"coverage": "1/2", "pinned_first": 0},
    "forward 1/2, two of each pinned": {"coverage": "1/2", "pinned_first": 2, "pinned_last": 2},
    "forward 1/2, cyclic": {"coverage": "1/2", "strategy": "cyclic"},
    "forward 1/2, two halves": explicit("0123", "0123", "0123", "4567", "4567", "4567"),
    "forward 1/2, two interleaved": explicit("0123", "4567", "0123", "4567", "0123", "4567"),
    "backward 1/2, two halves": {
        **explicit("0123", "0123", "0123", "4567", "4567", "4567"),
        **_BACKWARD,
    },
    **{
        f"forward 1/2, rotated every {steps}": {"coverage": "1/2", "rotate_every": steps}
        for steps in ROTATIONS
    },
    **{
        f"forward 1/2, last {share:.0%} {name}": phases((1 - share, {}), (1.0, phase))
        for share in FINISHES
        for name, phase in (("full", _FULL), ("backward", _BACKWARD))
    },
    **{
        f"forward 1/4, last 20% {name}": phases((0.8, {}), (1.0, phase), coverage="1/4")
        for name, phase in (("full", _FULL), ("backward", _BACKWARD))
    },
    "forward 1/8, two of each pinned, scale eval": {
        "coverage": "1/8",
        "residual_scale": "eval",
        "pinned_first": 2,
        "pinned_last": 2,
    },
    "forward 1/8, last 20% backward": phases((0.8, {}), (1.0, _BACKWARD), coverage="1/8"),
    "forward 1/2, scale inverse_coverage": {
        "coverage": "1/2",
        "residual_scale": "inverse_coverage",
    },
    "forward 1/2, scale eval": {"coverage": "1/2", "residual_scale": "eval"},
    "forward 1/4, scale eval": {"coverage": "1/4", "residual_scale": "eval"},
    "forward 1/8, scale eval": {"coverage": "1/8", "residual_scale": "eval"},
    "forward 1/2, rotated every 50, last 50% full": phases(
        (0.5, {"rotate_every": 50}), (1.0, _FULL)
    ),
    **{
        f"forward 1/4, {name}, full, a third each": phases(
            (0.333, {"coverage": "1/4"}), (0.667, second), (1.0, _FULL)
        )
        # As many blocks on a rank in the second phase, in the mean.
        for name, second in (
            ("1/2", {}),
            ("first 3", {"coverage": "1/4", "pinned_first": 3}),
            ("last 3", {"coverage": "1/4", "pinned_last": 3}),
        )
    },
    "forward 1/2, first 20% full": phases((0.2, _FULL), (1.0, {})),
    **{name: {"coverage": "1/2"} for name in FREE_RATES},
    **{name: phases((0.8, {}), (1.0, _BACKWARD), coverage="1/4") for name in LATE_RATES},
}


@dataclass(frozen=True)
class Case:
    """What is compared: everything of a run but its learning rate and seed.

    Attributes:
        kind: one of ``KINDS``.
        dense_steps: the budget, in optimizer steps of ``reference`` at coverage 1.
        is_equal_flops: as many operations as those steps; otherwise as many steps.
        reference: None: the model itself.
        samples: per worker and optimizer step.
    """

    model: Model
    kind: str
    dense_steps: int
    is_equal_flops: bool = True
    reference: Model | None = None
    samples: int = 1

    @property
    def family(self) -> str:
        """What the learning rate is chosen for."""
        return DENSE if self.kind == DENSE else HALF

    def flops_per_token(self) -> float:
        """Of a rank, forward and backward, in the mean over the ranks and phases."""
        return _flops_per_token(self.model, self.kind)

    def steps(self) -> int:
        """Optimizer steps of the budget."""
        if not self.is_equal_flops:
            return self.dense_steps
        dense = dense_flops_per_token(size_of(self.reference or self.model), CostSetup())
        return steps_for_dense_flops(self.dense_steps, self.flops_per_token(), dense)

    def tokens(self) -> int:
        """Training tokens of the budget."""
        return self.steps() * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return WORLD_SIZE * self.samples * SEQUENCE_LENGTH


@cache
def _shape(model: Model) -> dict[str, Any]:
    shape: dict[str, Any] = model.config().to_dict()
    return shape


@cache
def _flops_per_token(model: Model, kind: str) -> float:
    sdp = parse_config({"sdp": dict(KINDS[kind])}).sdp
    return mean_flops_per_token(size_of(model), sdp, WORLD_SIZE, CostSetup())


@dataclass(frozen=True)
class Run:
    """One training run."""

    case: Case
    rate: float
    seed: int

    @property
    def id(self) -> str:
        """A readable name and a hash of everything that decides the run."""
        case = self.case
        kind = case.kind.replace(" ", "-").replace("/", "o").replace(",", "").replace("%", "pc")
        budget = f"{'f' if case.is_equal_flops else 's'}{case.dense_steps}"
        content = [self._config("", "", ""), _shape(case.model)]
        text = json.dumps(content, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{case.model}-{kind}-{budget}-lr{self.rate:g}-seed{self.seed}-{digest}"

    def config(self, data: str, output: str) -> dict[str, Any]:
        """The run config, which ``launch/simulate.py --world_size 8`` takes too.

        :param data: folder of the tokenized corpus.
        :param output: folder of the study, where the model's config and the run folder are.
        """
        return self._config(data, output, f"{output}/runs/{self.id}")

    def _config(self, data: str, output: str, run_dir: str) -> dict[str, Any]:
        case, steps = self.case, self.case.steps()
        interval = -(-steps // VALIDATIONS)
        return {
            "train_batch_size": WORLD_SIZE * case.samples,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": self.rate,
                    "betas": [0.9, 0.95],
                    "eps": 1e-8,
                    "weight_decay": 0.1,
                },
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": "auto",
                    "warmup_num_steps": max(2, steps // 20),
                    "warmup_type": "linear",
                    "cos_min_ratio": 0.1,
                },
            },
            "gradient_clipping": 1.0,
            "steps_per_print": interval,
            "sdp": {**KINDS[case.kind], "seed": self.seed},
            "model": {"config": f"{output}/models/{case.model}.json"},
            "data": {
                "train": f"{data}/train_text_document",
                "validation": f"{data}/validation_text_document",
                "sequence_length": SEQUENCE_LENGTH,
            },
            "training": {
                "run_dir": run_dir,
                "steps": steps,
                "seed": FIRST_SEED + self.seed,
                "eval_interval": interval,
                "eval_samples": 256,
                "eval_micro_batch_size": 8,
                "save_interval": 0,
                "export": False,
            },
        }

    def to_json(self) -> dict[str, Any]:
        """For the process that trains it."""
        case = {name: getattr(self.case, name) for name in ("kind", "dense_steps", "samples")}
        case |= {"is_equal_flops": self.case.is_equal_flops, "model": vars(self.case.model)}
        reference = self.case.reference
        case["reference"] = None if reference is None else vars(reference)
        return {"case": case, "rate": self.rate, "seed": self.seed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Run:
        """What :meth:`to_json` made."""
        case = dict(content["case"])
        case["model"] = Model(**case["model"])
        case["reference"] = Model(**case["reference"]) if case["reference"] else None
        return cls(Case(**case), content["rate"], content["seed"])
