"""Noise that is refused, and what a context leaves behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hooks import NormNoise, attention_sites
from tests.support import models
from tests.support.noising import ids, logits
from tests.support.watching import (
    Found,
    shape_checks_off,
    watch,
)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sigma": -0.1}, r"sigma: wanted a finite number >= 0; got -0\.1"),
        ({"sigma": math.nan}, "got nan"),
        ({"sigma": 0.6}, r"wanted < 0\.57735 for uniform noise .*got 0\.6"),
        ({"sigma": 0.21, "law": "gaussian"}, r"wanted <= 0\.2 for gaussian"),
        ({"law": "cauchy"}, r"law: wanted one of .*got 'cauchy'"),
        ({"on": ""}, r"on: wanted some of 'q', 'k', 'v', each once; got ''"),
        ({"on": "qq"}, "each once; got 'qq'"),
        ({"on": "qkx"}, "got 'qkx'"),
        ({"shared": "all"}, r"shared: wanted one of \['none', 'heads', 'kv', 'token'\]; got 'all'"),
        ({"at": "norm"}, r"at: wanted one of \['dot', 'projection'\]; got 'norm'"),
        ({"rows": "dense"}, "rows: wanted one of .*got 'dense'"),
        ({"rows": "sparse", "on": "qkv"}, r"rows: .*wanted on='q', 'k' or 'qk'.*got on='qkv'"),
        ({"rows": "sparse", "on": "q", "at": "projection"}, r"at='dot'; got on='q', at='proj"),
        ({"seed": -1}, "seed: wanted an integer >= 0; got -1"),
        ({"draw": -1}, "draw: wanted an integer >= 0; got -1"),
    ],
)
def test_impossible_noise_is_refused(bad: dict[str, Any], message: str) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match=message):
        NormNoise(**({"sigma": 0.1} | bad))


def test_hooks_refuse_what_they_can_not_place(gpt2: Any) -> None:
    with pytest.raises(ValueError, match=r"wanted one of the attention layers \[0, 1\]; got 7"):
        NormNoise(sigma=0.1, layers=(7,)).hooks(gpt2)
    noise = NormNoise(sigma=0.1)
    with pytest.raises(ValueError, match="first_prompt: wanted an integer >= 0; got -1"):
        noise.hooks(gpt2, first_prompt=-1)
    for row, message in (([1, 0, 1, 1], "a gap in row 1"), ([0, 0, 0, 0], "none in 1")):
        with pytest.raises(ValueError, match=message):
            noise.hooks(gpt2, attention_mask=torch.tensor([[1, 1, 1, 1], row]))
    with pytest.raises(ValueError, match="one row for each of 3 prompts; got 2"):
        logits(gpt2, ids, noise, attention_mask=torch.ones(2, 24, dtype=torch.long))


def test_active_dropout_is_refused() -> None:
    model = models.tiny_gpt2()
    model.train()
    with pytest.raises(ValueError, match=r"wanted model\.eval\(\); got Dropout\(p=0\.1\)"):
        NormNoise(sigma=0.1).hooks(model)
    assert model.training
    model.eval()
    NormNoise(sigma=0.1).hooks(model)


def test_a_context_leaves_nothing_behind(model: Any, unchecked: None) -> None:
    attention_sites(model)
    before = Found(model)
    with NormNoise(sigma=0.1).applied(model):
        assert any(p.has_hooks() for p in model.hook_dict.values())
    Found(model).assert_same(before)
    with pytest.raises(RuntimeError, match="mine"), NormNoise(sigma=0.1).applied(model):
        raise RuntimeError("mine")
    Found(model).assert_same(before)


def test_a_users_hooks_stay_and_act_first(gpt2: Any) -> None:
    site = attention_sites(gpt2).layer(0).q.dot.hook
    noise = NormNoise(sigma=0.3, on="q", layers=(0,))
    factor = noise.factors(layer=0, role="q", n_heads=4, prompts=range(3), n_pos=24)[..., None]
    gpt2.hook_dict[site].add_hook(lambda q, hook: q + 1.0)
    try:
        clean = watch(gpt2, ids, [site])[site]  # with the user's edit
        with noise.applied(gpt2):
            noisy = watch(gpt2, ids, [site])[site]
        torch.testing.assert_close(noisy, clean * factor)
        assert torch.equal(watch(gpt2, ids, [site])[site], clean)
    finally:
        gpt2.reset_hooks()
