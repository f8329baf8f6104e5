"""Which norms interference finds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from hooks import UnsupportedModelError, attention_sites
from hooks.model.inputs import short_input
from hooks.sites.norm import inner_norms
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import models
from tests.support.interference import KINDS, measure, raw_norm
from tests.support.watching import (
    tiny_bert,
    tiny_gemma2,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_the_norm_found_is_the_module_s(name: str, dtype: torch.dtype) -> None:
    model = {**models.TINY, "gemma2": tiny_gemma2}[name]().to(dtype)
    with torch.no_grad():
        sites = attention_sites(model)
        norms = inner_norms(model, sites, sites.layers, short_input(model, 1, set()))
    room = 8 * torch.finfo(dtype).eps
    for layer, norm in enumerate(norms):
        gain, bias, centred, eps = raw_norm(model, layer)
        torch.testing.assert_close(norm.gain, gain, rtol=room, atol=room * float(bias.abs().max()))
        torch.testing.assert_close(norm.bias, bias, rtol=0, atol=0)
        assert norm.centred == centred
        assert norm.eps == pytest.approx(eps, rel=0.1, abs=2e-8)
        assert norm.after == f"blocks.{layer}.ln1.hook_out"


def tiny_olmo2() -> Any:
    return models.bridge(Olmo2ForCausalLM, Olmo2Config(**models.llama_like({})))


def random_of(placement: str) -> Any:
    sizes = {"d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 32}
    cfg = QKVNormConfig(placement=placement, d_vocab=models.VOCAB, **sizes)
    return to_bridge(QKVNormTransformer(cfg).eval())


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("none", lambda: random_of("none")),
        ("qkv", lambda: random_of("qkv")),
        ("bert", tiny_bert),
        ("olmo2", tiny_olmo2),
    ],
)
def test_models_without_a_norm_before_attention_are_refused_by_name(name: str, build: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="the norm in front of the attention") as caught:
        measure(build(), models.tokens(batch=1, pos=8))
    assert caught.value.layer == 0
    assert "none before q and k" in str(caught.value)


def test_a_norm_of_another_form_is_refused() -> None:
    model = KINDS["llama"]()
    bent = lambda y, hook: y + 0.05 * y.square()  # noqa: E731
    edit = [("blocks.1.ln1.hook_out", bent)]
    refused = pytest.raises(UnsupportedModelError, match=r"layer 1: .* roundings off")
    with model.hooks(fwd_hooks=edit), refused:
        measure(model)
    measure(model, batch_size=2)
