"""What is printed before and after training."""

from __future__ import annotations

from pathlib import Path

import torch

from sdp_llm.config import RunConfig, keys_without_effect
from sdp_llm.data import TrainingData
from sdp_llm.errors import ConfigError
from sdp_llm.plan.report import plan_parts, run_report
from sdp_llm.training.budget import budget_line
from sdp_llm.training.environment import device_type
from sdp_llm.training.inputs import Inputs
from sdp_llm.training.position import Position
from sdp_llm.training.prediction import Prediction
from sdp_llm.training.trainer import Trainer


def summary_card(
    run: RunConfig,
    inputs: Inputs,
    steps: int,
    prediction: Prediction | ConfigError,
    position: Position,
) -> str:
    """The plan, what it costs, the data and the budget.

    :param steps: of the budget, with those before ``position``.
    """
    assert run.model is not None
    name = Path(run.model.config).name.removesuffix(".json")
    schedule = inputs.schedule
    if isinstance(prediction, ConfigError):
        # A model whose cost cannot be predicted (experts, convolutions) trains all the same.
        plan_lines = "\n\n".join([name, *plan_parts(schedule), f"no prediction: {prediction}"])
    else:
        limit = run.sdp.memory_limit_gib
        size, setup = prediction.size, prediction.setup
        plan_lines = run_report(schedule, size, setup, model=name, memory_limit_gib=limit)
    batch = inputs.batch.global_batch
    ranks = schedule.world_size
    device = torch.cuda.get_device_name() if device_type() == "cuda" else "CPU (gloo)"
    lines = [
        plan_lines,
        "",
        f"device      {device}, {ranks} rank{'s' if ranks > 1 else ''}",
        *data_lines(inputs.train, position.samples + (steps - position.step) * batch),
        budget_line(steps, batch, inputs.train.sequence_length, position),
        f"run folder  {run.training.run_dir}",
    ]
    if run.model.init_from is not None:
        lines.append(f"start       weights of {run.model.init_from}")
    ignored = keys_without_effect(run)
    if ignored:
        lines.append(f"no effect   {', '.join(ignored)}")
    return "\n".join(lines) + "\n"


def data_lines(data: TrainingData, num_samples: int) -> list[str]:
    """Each corpus: its samples, and how many of them the run's ``num_samples`` are."""
    lines = []
    uses = data.usage(num_samples)
    for use in uses:
        share = "" if len(uses) == 1 else f"{use.prefix}: share {use.share:.1%}, "
        lines.append(
            f"{share}{use.num_samples:,} samples of {data.sequence_length} tokens; "
            f"this run reads {use.read:,} ({use.epochs:.2f} epochs)"
        )
    return [f"{'' if i else 'data':<12}{line}" for i, line in enumerate(lines)]


def closing_lines(trainer: Trainer) -> str:
    """The whole model's validation loss, and where the result is."""
    lines = []
    result = trainer.last_validation
    if result is not None:
        bits = trainer.bits_per_byte(result)
        text = f", {bits:.4f} bits per byte" if bits is not None else ""
        lines.append(
            f"whole model's validation loss {result.loss:.6f} nats per token{text} "
            f"({result.tokens:,} tokens)"
        )
    if trainer.run.training.export:
        lines.append(
            f'load it with AutoModelForCausalLM.from_pretrained("{trainer.folder.path}/model")'
        )
    return "\n".join(lines)
