"""Small models of ours in float64, permutations of their prompts, and the gap between them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings, strategies as st

import hooks
from hooks import SymmetryReport
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import models
from tests.support.watching import tiny_gemma2

LENGTH = 9
ids = models.tokens(2, LENGTH)
NAMES = ("as is", "positions removed", "mask removed", "both removed")
EXACT = 1e-10  # in float64


def changes_all(order: list[int]) -> bool:
    return not any(torch.equal(tokens[order], tokens) for tokens in ids)


order = (
    st.permutations(range(LENGTH - 1))
    .map(lambda order: [*order, LENGTH - 1])
    .filter(changes_all)  # others are refused
)
several = st.lists(order, min_size=8, max_size=8)  # a call looks at many at once
few = settings(max_examples=6)


def plain(placement: str = "pre", *, enlarged: float = 3.0, **options: Any) -> QKVNormTransformer:
    """A small model of ours with enlarged weights, in float64."""
    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 32, "d_vocab": 97}
    cfg = QKVNormConfig(placement=placement, d_mlp=20, seed=3, **{**sizes, **options})
    model = QKVNormTransformer(cfg).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(enlarged)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.arange(len(parameter)))
    return model


def ours(placement: str = "pre", **options: Any) -> Any:
    return to_bridge(plain(placement, **options))


def nope(placement: str = "pre", **options: Any) -> Any:
    return ours(placement, positional_embedding_type="none", **options)


def gap(model: Any, **options: Any) -> SymmetryReport:
    return hooks.symmetry_gap(model, ids, **{"progress": False, "permutations": 3, **options})


KINDS: dict[str, Any] = {
    "gpt2": models.tiny_gpt2,
    "llama": models.tiny_llama,
    "qwen3": models.tiny_qwen3,
    "gemma2": tiny_gemma2,
    "learned": lambda: ours("pre"),
    "rotary": lambda: ours("qkv", positional_embedding_type="rotary"),
    "sinusoidal": lambda: ours("none", positional_embedding_type="sinusoidal"),
}
GPT2 = models.tiny_gpt2()
SIZED = ("logits", "tv", "stream", "floor_logits", "floor_tv", "floor_stream", "kl", "moved",
         "added", "nearer")  # fmt: skip


# Not so large that a saturated row hides a swap of two tokens that it hardly attends to.
TWO = {p: nope(p, enlarged=1.0, initializer_range=0.2) for p in ("none", "pre", "qkv")}
BOTH_WAYS = {n: nope(attention_dir="bidirectional", n_layers=n) for n in (1, 2, 4)}


def backwards(n: int) -> list[int]:
    return [*range(n - 2, -1, -1), n - 1]
