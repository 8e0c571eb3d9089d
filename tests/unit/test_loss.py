"""The loss in pieces equals the loss at once, and never holds the logits of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sdp_llm.errors import ConfigError
from sdp_llm.loss import NextTokenLoss, summed_loss

TOKENS = 2 * 9
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "use_cache": False,
}


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(SIZES | sizes))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # without dropout


def tokens() -> Tensor:
    return torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(5))


def gradients(loss: NextTokenLoss, of: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
    of.zero_grad()
    value = loss(of, tokens())
    assert value.dtype == torch.float32
    (value / TOKENS).backward()
    found = {name: p.grad.float() for name, p in of.named_parameters() if p.grad is not None}
    return value.item(), found


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return sum(float((found[n] - g).square().sum()) for n, g in expected.items()) ** 0.5


@pytest.mark.parametrize("chunk", [1, 5, TOKENS, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt_neox", "gpt2"])
def test_pieces_give_the_same_loss_and_gradients(family: str, chunk: int) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    of = model(family, **sizes)
    at_once, expected = gradients(summed_loss, of)
    in_pieces, found = gradients(NextTokenLoss(chunk=chunk), of)
    assert in_pieces == pytest.approx(at_once, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    with torch.no_grad():
        alone = NextTokenLoss(chunk=chunk)(of, tokens())
    assert alone.item() == in_pieces
    assert not alone.requires_grad


def test_a_tied_head_gets_the_gradient_of_both_uses() -> None:
    of = model(tie_word_embeddings=True)
    _, expected = gradients(summed_loss, of)
    _, found = gradients(NextTokenLoss(chunk=4), of)
    name = "model.embed_tokens.weight"
    assert (found[name] - expected[name]).norm() <= 2e-6 * expected[name].norm()


def test_in_bf16_the_loss_is_as_exact_as_at_once() -> None:
    of = model(dtype=torch.bfloat16)
    at_once, expected = gradients(summed_loss, of)
    in_pieces, found = gradients(NextTokenLoss(chunk=5), of)
    assert in_pieces == pytest.approx(at_once, rel=1e-6)
    _, exact = gradients(summed_loss, model().bfloat16().float())
    assert distance(found, exact) <= 1.1 * distance(expected, exact)


def test_documents_stay_apart_in_pieces() -> None:
    of = model()
    at_once, in_pieces = (NextTokenLoss(7, chunk)(of, tokens()).item() for chunk in (None, 4))
    assert in_pieces == pytest.approx(at_once, rel=1e-6)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize("chunk", [None, 4])
def test_pieces_never_hold_all_logits(chunk: int | None) -> None:
    of = model(vocab_size=4000)
    ids = torch.randint(0, 4000, (2, 65))
    with _Largest() as largest:
        NextTokenLoss(chunk=chunk)(of, ids).backward()
    head = 4000 * 32
    assert largest.numel == (2 * 64 * 4000 if chunk is None else head)


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("gemma2", {"head_dim": 8}, "changes what its head returns"),
        ("granite", {"logits_scaling": 8.0}, "changes what its head returns"),
        ("phi", {"num_key_value_heads": 4}, "head has a bias"),
    ],
)
def test_a_model_that_does_more_than_multiply_is_refused(
    family: str, sizes: Mapping[str, Any], why: str
) -> None:
    of = model(family, **sizes)
    with pytest.raises(ConfigError, match=f"training.loss_chunk = 4: the model.*{why}.*to null"):
        NextTokenLoss(chunk=4)(of, tokens())
    with pytest.raises(ConfigError, match=why):
        NextTokenLoss(chunk=4).check(of)
    assert torch.isfinite(summed_loss(of, tokens()))
