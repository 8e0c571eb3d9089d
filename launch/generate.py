"""Continue prompts with an exported model.

python launch/generate.py --model runs/demo/model --prompt "Return the"
"""

from __future__ import annotations

import argparse
import sys

from sdp_llm.cli import Parser, exported_model, run_command
from sdp_llm.errors import ConfigError
from sdp_llm.versions import check_versions, versions


def generate(arguments: argparse.Namespace) -> None:
    """Load the model and its tokenizer with transformers alone, and sample."""
    folder = exported_model(arguments.model)
    for name, least, value in (("tokens", 1, arguments.tokens), ("seed", 0, arguments.seed)):
        if not least <= value < 2**63:
            raise ConfigError(f"--{name} {value}: must be at least {least}, and less than 2**63")
    check_versions(versions())

    from sdp_llm.training.environment import device_type, prepare

    prepare()
    import torch

    from sdp_llm.exported import load_exported
    from sdp_llm.tokenizer import read_tokenizer

    fix = "copy one there, or export with data.tokenizer"
    tokenizer = read_tokenizer(folder, f"--model {folder}", fix)
    model = load_exported(folder).eval().to(device_type())
    torch.manual_seed(arguments.seed)
    for prompt in arguments.prompt:
        # Every document ends with that token: after it another one begins.
        inputs = tokenizer(prompt or tokenizer.eos_token or "", return_tensors="pt").to(
            model.device
        )
        if not inputs["input_ids"].numel():
            raise ConfigError(
                f"--prompt {prompt!r}: the tokenizer of --model {folder} makes no tokens of it; "
                "export with data.tokenizer, or copy the files of one there"
            )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.tokens,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
        print(f"> {tokenizer.decode(output[0], skip_special_tokens=True)}\n")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="an exported model")
    parser.add_argument("--prompt", nargs="+", required=True, help="texts to continue")
    parser.add_argument("--tokens", type=int, default=48, help="to add to each prompt (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sys.exit(run_command("generate", generate, parser.parse_args()))
