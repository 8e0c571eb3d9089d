"""Measure an exported model's validation loss in one process.

python launch/evaluate.py --deepspeed_config runs/demo/config.json --model runs/demo/model
"""

from __future__ import annotations

import argparse
import sys

from sdp_llm.cli import config_of, config_parser, exported_model, run_command
from sdp_llm.config import require_sections
from sdp_llm.errors import ConfigError
from sdp_llm.versions import check_versions, versions


def evaluate(arguments: argparse.Namespace) -> None:
    """Parse, load, measure, print."""
    run = config_of(arguments)
    require_sections(run, "data")
    assert run.data is not None
    if run.data.validation is None:
        raise ConfigError("data.validation: missing; name the corpus to measure the loss on")
    folder = exported_model(arguments.model)
    if arguments.micro_batch_size < 1:
        raise ConfigError(
            f"--micro_batch_size {arguments.micro_batch_size}: must be at least 1; give more"
        )
    check_versions(versions())

    from sdp_llm.training.environment import device_type, prepare

    prepare()
    import torch

    from sdp_llm.data.sampler import validation_samples
    from sdp_llm.evaluation import Evaluation
    from sdp_llm.exported import load_exported
    from sdp_llm.loss import NextTokenLoss, target_count
    from sdp_llm.training.budget import check_positions
    from sdp_llm.training.corpora import check_ids, check_tokenizer_of, open_validation
    from sdp_llm.training.documents import separator
    from sdp_llm.training.inputs import load_tokenizer, target_bytes

    corpora = open_validation(run.data)
    [dataset] = corpora.values()
    samples = torch.from_numpy(
        dataset.batch(validation_samples(dataset, run.training.eval_samples))
    )
    tokenizer = None
    if run.data.tokenizer is not None:
        tokenizer = load_tokenizer(run.data.tokenizer)
        check_tokenizer_of(corpora, run.data.tokenizer, tokenizer.eos_token_id)
    model = load_exported(folder)
    check_positions(run, model.config)
    vocabulary = model.config.get_text_config().vocab_size
    check_ids(corpora, vocabulary, f"{folder}/config.json", None, 1)
    attention = model.config._attn_implementation
    eos_id = separator(run.data, model.config, attention, tokenizer, corpora)
    loss = NextTokenLoss(eos_id, run.training.loss_chunk)
    model.to(device_type()).eval()
    total = 0.0
    with torch.no_grad():
        for part in samples.split(arguments.micro_batch_size):
            total += loss(model, part.to(device_type())).item()
    tokens = target_count(samples)
    result = Evaluation(total / tokens, tokens)
    text = ""
    if tokenizer is not None:
        text_bytes = target_bytes(tokenizer, samples)
        text = f", {result.bits_per_byte(text_bytes):.4f} bits per byte"
    print(f"validation loss {result.loss:.6f} nats per token{text} ({tokens:,} tokens)")


if __name__ == "__main__":
    parser = config_parser(__doc__ or "")
    parser.add_argument("--model", required=True, metavar="DIR", help="an exported model")
    parser.add_argument(
        "--micro_batch_size", type=int, default=8, metavar="N", help="samples at once (default 8)"
    )
    sys.exit(run_command("evaluate", evaluate, parser.parse_args()))
