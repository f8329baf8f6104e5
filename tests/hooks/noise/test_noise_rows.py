"""Noise on some rows only, in generation and in half precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import NormNoise, UnsupportedModelError, attention_sites
from hooks.noise import norm_noise
from hooks.sites.types import AttentionSites
from tests.support import models
from tests.support.noising import ids, logits
from tests.support.watching import (
    attn,
    keeps_cache,
    tiny_gemma2,
    watch,
)


@pytest.fixture(scope="module", params=[*models.TINY, "gemma2"])
def any_scores(request: pytest.FixtureRequest) -> Any:
    if request.param == "gemma2":
        return tiny_gemma2()
    return models.TINY[request.param]()


@pytest.mark.parametrize("rows", ["sparse", "non-sparse"])
@pytest.mark.parametrize("on", ["q", "k", "qk"])
def test_rows_are_recomputed_by_hand(any_scores: Any, rows: Any, on: str) -> None:
    """cap(f_q f_k s + b) in the chosen rows, bit for bit the clean scores in all others."""
    model = any_scores
    noise = NormNoise(sigma=0.3, on=on, rows=rows, layers=(1,))
    sites = attention_sites(model).layer(1)
    names = [sites.scores, sites.pattern, sites.q.dot.hook, sites.k.dot.hook]
    clean = watch(model, ids, names)
    noisy = watch(model, ids, names, noise.hooks(model))
    scores, got = clean[sites.scores].double(), noisy[sites.scores].double()
    shown = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    if model.cfg.architecture == "Gemma2ForCausalLM":
        shown = scores[0, 0] > -1e30  # a sliding window
        assert shown.any(0).all()
    shown = shown.expand_as(scores)
    top = clean[sites.pattern].amax(-1)
    chosen = top >= 0.95 if rows == "sparse" else top < 0.70
    assert chosen.float().mean() > 0.05
    assert (~chosen).any()
    assert torch.equal(noisy[sites.scores][~chosen], clean[sites.scores][~chosen])
    q, k = (clean[names[i]].double() for i in (2, 3))
    group = q.shape[2] // k.shape[2]
    factor = torch.ones_like(scores)
    shape = {"prompts": range(3), "n_pos": ids.shape[1], "layer": 1}
    if "q" in on:
        drawn = noise.factors(role="q", n_heads=q.shape[2], **shape).double()
        factor = factor * drawn.transpose(1, 2)[:, :, :, None]
    if "k" in on:
        drawn = noise.factors(role="k", n_heads=k.shape[2], **shape).double()
        drawn = drawn.repeat_interleave(group, dim=2)
        factor = factor * drawn.transpose(1, 2)[:, :, None, :]
    s = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, dim=2)) / math.sqrt(8)
    cap = 20.0 if model.cfg.architecture == "Gemma2ForCausalLM" else 0.0
    wanted = cap * torch.tanh(factor * s / cap) if cap else factor * s + (scores - s)
    at = chosen[..., None] & shown
    torch.testing.assert_close(got[at], wanted[at], rtol=1e-4, atol=1e-4)
    hidden = ~shown
    assert torch.equal(noisy[sites.scores][hidden], clean[sites.scores][hidden])
    # The pattern follows, so the rows really changed.
    moved = (noisy[sites.pattern] - clean[sites.pattern]).abs().amax(-1)
    assert (moved[~chosen] == 0).all()
    assert moved[chosen].max() > 0.01


def test_rows_are_judged_in_the_running_pass(llama: Any) -> None:
    """Layer 1's rows are chosen by its scores under noise in layer 0, not by clean ones."""
    noise = NormNoise(sigma=0.5, on="k", rows="sparse")
    names = [attn(1, "attn_scores"), attn(1, "pattern")]
    first = replace(noise, layers=(0,))
    running = watch(llama, ids, names, first.hooks(llama))
    both = watch(llama, ids, names, noise.hooks(llama))
    chosen = running[names[1]].amax(-1) >= 0.95
    clean = watch(llama, ids, names)[names[1]].amax(-1) >= 0.95
    assert (chosen != clean).any()
    changed = (both[names[0]] != running[names[0]]).any(-1)
    assert not changed[~chosen].any()
    assert changed[chosen][3:].any()


def test_rows_need_scores_that_can_be_edited(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention_sites(llama)
    deaf = AttentionSites(
        tuple(replace(s, scores_editable=s.layer != 1) for s in found), found.check
    )
    monkeypatch.setattr(norm_noise, "attention_sites", lambda model: deaf)
    with pytest.raises(ValueError, match=r"rows='sparse': layer 1: wanted scores whose edits"):
        NormNoise(sigma=0.1, on="qk", rows="sparse").hooks(llama)
    NormNoise(sigma=0.1, on="qk", rows="sparse", layers=(0,)).hooks(llama)
    NormNoise(sigma=0.1, on="qk").hooks(llama)


LOST = "generate with a cache: wanted .*use_past_kv_cache=False"


def _generate(model: Any, start: Tensor, cached: bool) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the logits at each new position."""
    steps: list[Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        steps.append((output.logits if hasattr(output, "logits") else output[0])[:, -1].detach())

    handle = model.original_model.register_forward_hook(record)
    try:
        out = model.generate(
            start,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            verbose=False,
            return_type="tokens",
        )
    finally:
        handle.remove()
    return out.tolist(), torch.stack(steps)


@pytest.mark.parametrize(("on", "rows"), [("qkv", "all"), ("qk", "non-sparse")])
def test_generate_with_a_cache_keeps_each_tokens_factor(model: Any, on: str, rows: Any) -> None:
    noise = NormNoise(sigma=0.3, on=on, rows=rows)
    start = ids[:2, :5]
    if rows != "all" and model.cfg.architecture == "BloomForCausalLM":
        with pytest.raises(ValueError, match="wanted whole sequences"), noise.applied(model):
            _generate(model, start, cached=True)
        return
    if not keeps_cache(model):
        with pytest.raises(UnsupportedModelError, match=LOST), noise.applied(model):
            _generate(model, start, cached=True)
        return
    with noise.applied(model):
        with_cache, a = _generate(model, start, cached=True)
        without, b = _generate(model, start, cached=False)
    assert with_cache == without
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    clean, c = _generate(model, start, cached=True)
    assert (a - c).abs().max() > 0.01
    if on == "qkv":
        assert clean != with_cache


def test_a_cached_step_under_plain_hooks_is_refused(model: Any) -> None:
    noise = NormNoise(sigma=0.3)
    with (
        model.hooks(fwd_hooks=noise.hooks(model)),
        pytest.raises(ValueError, match=r"cached.*NormNoise\.applied"),
    ):
        _generate(model, ids[:2, :5], cached=True)
    with model.hooks(fwd_hooks=noise.hooks(model)):
        plain, _ = _generate(model, ids[:2, :5], cached=False)
    kept = keeps_cache(model)
    with noise.applied(model):
        if kept:
            assert _generate(model, ids[:2, :5], cached=True)[0] == plain
        assert _generate(model, ids[:2, :5], cached=False)[0] == plain


def test_a_norm_removes_noise_at_the_projection_and_says_so() -> None:
    model = models.tiny_qwen3()
    clean = logits(model, ids, None)
    with pytest.warns(UserWarning, match=r"noise at the projection of q, k is removed"):
        at_projection = logits(model, ids, NormNoise(sigma=0.2, on="qk", at="projection"))
    at_dot = logits(model, ids, NormNoise(sigma=0.2, on="qk"))
    scale = (at_dot - clean).abs().max()
    assert scale > 0.1
    assert (at_projection - clean).abs().max() < 1e-3 * scale  # the norm's eps
    # Nothing shields v, and nothing is said.
    v = logits(model, ids, NormNoise(sigma=0.2, on="v", at="projection"))
    assert torch.equal(v, logits(model, ids, NormNoise(sigma=0.2, on="v")))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_without_a_norm_both_places_agree(name: str) -> None:
    """Rotary embedding keeps lengths."""
    model = models.TINY[name]()
    dot, projection = (
        logits(model, ids, NormNoise(sigma=0.3, at=a)) for a in ("dot", "projection")
    )
    torch.testing.assert_close(dot, projection, rtol=1e-3, atol=1e-3)
    assert (dot - logits(model, ids, None)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("bloom", torch.bfloat16), ("gpt2", torch.float16)],
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = models.TINY[name]().to(dtype)
    clean = logits(model, ids, None)
    for rows in ("all", "sparse"):
        noise = NormNoise(sigma=0.3, on="qk", rows=rows)
        out = logits(model, ids, noise)
        assert out.dtype == clean.dtype == dtype
        assert (out - clean).abs().max() > 0.01
        assert torch.equal(logits(model, ids, replace(noise, sigma=0.0)), clean)
    site = attention_sites(model).layer(0).k.dot
    noise = NormNoise(sigma=0.3, on="k", layers=(0,))
    before = watch(model, ids, [site.hook])[site.hook]
    after = watch(model, ids, [site.hook], noise.hooks(model))[site.hook]
    factor = noise.factors(layer=0, role="k", n_heads=site.n_heads, prompts=range(3), n_pos=24)
    assert torch.equal(after, (before.float() * factor[..., None]).to(dtype))
