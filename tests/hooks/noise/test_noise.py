"""NormNoise: what a factor is a function of, what it changes and what it can't change."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hooks import NormNoise, attention_sites
from tests.support import models
from tests.support.noising import factors, ids, logits
from tests.support.watching import (
    attn,
    watch,
)

# -- factors ----------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.data())
def test_a_factor_is_a_pure_function_of_its_place(data: st.DataObject) -> None:
    """Any part of the corpus, drawn alone, has the factors that it has in the whole."""
    law = data.draw(st.sampled_from(["uniform", "gaussian", "lognormal"]))
    shared = data.draw(st.sampled_from(["none", "heads", "kv", "token"]))
    role = data.draw(st.sampled_from(["q", "k", "v"]))
    noise = NormNoise(sigma=0.1, law=law, shared=shared, seed=data.draw(st.integers(0, 2**40)))
    whole = factors(noise, role, prompts=list(range(5)), n_pos=30)
    prompts = data.draw(st.permutations(range(5)))[: data.draw(st.integers(1, 5))]
    start = data.draw(st.integers(0, 29))
    n_pos = data.draw(st.integers(1, 30 - start))
    part = factors(noise, role, prompts=prompts, n_pos=n_pos, start=start)
    assert torch.equal(part, whole[prompts, start : start + n_pos])
    again = factors(noise, role, prompts=prompts, n_pos=n_pos, start=[start] * len(prompts))
    assert torch.equal(again, part)


def test_padding_is_left_alone_and_shifts_nothing() -> None:
    noise = NormNoise(sigma=0.3)
    plain = factors(noise, prompts=[0, 1, 2], n_pos=6)
    padded = factors(noise, prompts=[0, 1, 2], n_pos=6, start=[0, -2, -9])
    assert torch.equal(padded[0], plain[0])
    assert torch.equal(padded[1, 2:], plain[1, :4])
    assert (padded[1, :2] == 1).all()
    assert (padded[2] == 1).all()


def test_everything_that_names_a_factor_changes_it() -> None:
    base = NormNoise(sigma=0.3, seed=1, draw=1)
    wide = {"n_pos": 50}
    others = {
        "seed": factors(replace(base, seed=2), **wide),
        "draw": factors(replace(base, draw=2), **wide),
        "seed and draw exchanged": factors(replace(base, seed=0, draw=2), **wide),
        "layer": factors(base, layer=1, **wide),
        "q": factors(base, "q", **wide),
        "v": factors(base, "v", **wide),
        "prompt": factors(base, prompts=[1], **wide),
        "position": factors(base, start=1, **wide),
        "head": factors(base, **wide)[:, :, [1, 2, 3, 0]],
        "itself": factors(base, **wide),
    }
    last = others.pop("itself")
    for (a, x), (b, y) in itertools.combinations([*others.items(), ("itself", last)], 2):
        assert not (x == y).any(), (a, b)
        correlation = np.corrcoef(x.flatten(), y.flatten())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(x.numel()), (a, b)


@pytest.mark.parametrize("law", ["uniform", "gaussian", "lognormal"])
def test_factors_have_the_mean_and_rms_of_their_law(law: str) -> None:
    n = 20_000
    drawn = factors(NormNoise(sigma=0.2, law=law), n_pos=n).double() - 1
    assert drawn.dtype == torch.float64
    rms = drawn.square().mean().sqrt()
    assert abs(drawn.mean()) < 5 * 0.2 / math.sqrt(4 * n)
    assert float(rms) == pytest.approx(0.2, rel=0.02)
    if law == "uniform":
        assert 0.99 < float(drawn.abs().max()) / (math.sqrt(3) * 0.2) <= 1 + 1e-6


def test_factors_are_float32_on_the_cpu() -> None:
    drawn = factors(NormNoise(sigma=0.2))
    assert drawn.dtype == torch.float32
    assert drawn.device.type == "cpu"


def _partition(shared: str) -> list[list[tuple[str, int]]]:
    """Groups of (site, head) that have one factor, of q, k and v with three heads each."""
    heads = range(3)
    if shared == "none":
        return [[(r, h)] for r in "qkv" for h in heads]
    if shared == "heads":
        return [[(r, h) for h in heads] for r in "qkv"]
    if shared == "kv":
        return [[("q", h)] for h in heads] + [[("k", h), ("v", h)] for h in heads]
    return [[("q", h) for h in heads], [(r, h) for r in "kv" for h in heads]]


@pytest.mark.parametrize("shared", ["none", "heads", "kv", "token"])
def test_shared_modes_share_exactly_what_they_say(shared: Any) -> None:
    noise = NormNoise(sigma=0.2, shared=shared)
    drawn = {r: factors(noise, r, n_heads=3)[0] for r in ("q", "k", "v")}
    groups = _partition(shared)
    for group in groups:
        role, head = group[0]
        assert all(torch.equal(drawn[r][:, h], drawn[role][:, head]) for r, h in group)
    firsts = [drawn[group[0][0]][:, group[0][1]] for group in groups]
    for x, y in itertools.combinations(firsts, 2):
        assert not (x == y).any()
    # Positions, layers, and prompts never share.
    assert all(f.unique(dim=0).shape[0] == 6 for f in drawn.values())
    assert not (factors(noise, "k", layer=1, n_heads=3)[0] == drawn["k"]).any()
    assert not (factors(noise, "k", prompts=[1], n_heads=3)[0] == drawn["k"]).any()


# -- on the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["dot", "projection"])
@pytest.mark.filterwarnings("ignore:noise at the projection")
def test_no_noise_changes_no_bit(model: Any, at: Any) -> None:
    for law in ("uniform", "gaussian", "lognormal"):
        noise = NormNoise(sigma=0.0, law=law, at=at)
        assert torch.equal(logits(model, ids, noise), logits(model, ids, None))


@pytest.mark.parametrize("rows", ["sparse", "non-sparse"])
def test_no_noise_on_some_rows_changes_no_bit(model: Any, rows: Any) -> None:
    noise = NormNoise(sigma=0.0, on="qk", rows=rows)
    assert torch.equal(logits(model, ids, noise), logits(model, ids, None))


def test_norms_are_scaled_by_the_factor_and_directions_kept(model: Any) -> None:
    noise = NormNoise(sigma=0.4, seed=3)
    for sites in attention_sites(model):
        for role in ("q", "k", "v"):
            site = sites.vector(role).dot
            one = replace(noise, on=role, layers=(sites.layer,))
            clean = site.by_position(watch(model, ids, [site.hook])[site.hook])
            noisy = site.by_position(watch(model, ids, [site.hook], one.hooks(model))[site.hook])
            cosine = torch.cosine_similarity(clean, noisy, dim=-1)
            torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)
            ratio = noisy.norm(dim=-1) / clean.norm(dim=-1)
            wanted = one.factors(
                layer=sites.layer,
                role=role,
                n_heads=site.n_heads,
                prompts=range(len(ids)),
                n_pos=ids.shape[1],
            )
            torch.testing.assert_close(ratio, wanted, rtol=1e-5, atol=0)


def test_noise_acts_and_each_part_of_it_too(model: Any) -> None:
    clean = logits(model, ids, None)
    seen = [clean]
    for on in ("q", "k", "v", "qk", "qkv"):
        seen.append(logits(model, ids, NormNoise(sigma=0.2, on=on)))
    for x, y in itertools.combinations(seen, 2):
        assert (x - y).abs().max() > 0.01


def test_batches_continue_each_other(model: Any) -> None:
    noise = NormNoise(sigma=0.3)
    whole = logits(model, ids, noise)
    for first in range(len(ids)):
        alone = logits(model, ids[first : first + 1], noise, first_prompt=first)
        torch.testing.assert_close(alone, whole[first : first + 1], rtol=1e-4, atol=1e-4)
    assert (logits(model, ids[1:2], noise) - whole[1:2]).abs().max() > 0.01


@pytest.mark.parametrize("rows", ["all", "sparse"])
def test_left_padding_changes_nothing(model: Any, rows: Any) -> None:
    noise = NormNoise(sigma=0.3, on="qk", rows=rows)
    plain = logits(model, ids, noise)
    widths = (0, 3, 5)
    padded = torch.zeros(len(ids), ids.shape[1] + 5, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, width in enumerate(widths):
        first = 5 - width
        padded[row, first : first + ids.shape[1]] = ids[row]
        mask[row, first : first + ids.shape[1]] = 1
    with torch.no_grad():
        got = model.run_with_hooks(
            padded, fwd_hooks=noise.hooks(model, attention_mask=mask), attention_mask=mask
        )
    for row, width in enumerate(widths):
        first = 5 - width
        torch.testing.assert_close(
            got[row, first : first + ids.shape[1]], plain[row], rtol=1e-3, atol=1e-3
        )


def test_other_layers_and_sites_do_not_change_a_factor(llama: Any) -> None:
    """Layer 0's keys under noise on k in layer 0, and under noise on everything."""
    name = attention_sites(llama).layer(0).k.dot.hook
    alone = watch(llama, ids, [name], NormNoise(sigma=0.3, on="k", layers=(0,)).hooks(llama))
    among = watch(llama, ids, [name], NormNoise(sigma=0.3, on="qkv").hooks(llama))
    assert torch.equal(alone[name], among[name])


def test_every_forward_repeats_and_a_draw_is_another(model: Any) -> None:
    noise = NormNoise(sigma=0.2)
    with noise.applied(model) as given_back, torch.no_grad():
        assert given_back is noise
        first, second = model(ids), model(ids)
        shorter = model(ids[:1, :9])
    assert torch.equal(first, second)
    torch.testing.assert_close(shorter[0], first[0, :9], rtol=1e-4, atol=1e-4)
    assert torch.equal(first, logits(model, ids, noise))
    assert (logits(model, ids, replace(noise, draw=1)) - first).abs().max() > 0.01
    assert torch.equal(logits(model, ids, None), model(ids).detach())


def test_a_layer_named_twice_is_not_noised_twice(gpt2: Any) -> None:
    once = logits(gpt2, ids, NormNoise(sigma=0.3, layers=(0,)))
    try:
        twice = logits(gpt2, ids, NormNoise(sigma=0.3, layers=(0, 0)))
    except ValueError:
        return  # refused: fine too
    assert torch.equal(once, twice)


def test_contexts_nest(gpt2: Any) -> None:
    q, k = NormNoise(sigma=0.2, on="q", seed=1), NormNoise(sigma=0.2, on="k", seed=1)
    mask = torch.ones_like(ids)
    both = logits(gpt2, ids, NormNoise(sigma=0.2, on="qk", seed=1))
    with q.applied(gpt2, attention_mask=mask), k.applied(gpt2, attention_mask=mask):
        torch.testing.assert_close(gpt2(ids).detach(), both)


# -- what noise can't change ------------------------------------------------------------------


def test_noise_changes_nothing_before_its_position(model: Any) -> None:
    """A factor at p reaches no earlier logit: a prompt cut at p gives what the whole one gives."""
    noise = NormNoise(sigma=0.4)
    whole = logits(model, ids, noise)
    for p in (1, 2, 7, 23):
        torch.testing.assert_close(
            logits(model, ids[:, :p], noise), whole[:, :p], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_noise_at_one_position_changes_nothing_before(
    model: Any, role: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = NormNoise.factors
    p = 11

    def only_at_p(self: NormNoise, **options: Any) -> Tensor:
        drawn = draw(self, **options)
        keep = torch.arange(drawn.shape[1]) == p
        return torch.where(keep[None, :, None], drawn, torch.ones_like(drawn))

    monkeypatch.setattr(NormNoise, "factors", only_at_p)
    clean, noisy = logits(model, ids, None), logits(model, ids, NormNoise(sigma=0.5, on=role))
    assert torch.equal(noisy[:, :p], clean[:, :p])
    assert not torch.equal(noisy[:, p:], clean[:, p:])


def test_noise_in_a_layer_changes_nothing_in_layers_before() -> None:
    for build in (models.tiny_llama, models.tiny_bloom):
        model = build(n_layers=3)
        names = [attn(layer, "attn_scores") for layer in range(3)]
        clean = watch(model, ids, names)
        noisy = watch(model, ids, names, NormNoise(sigma=0.4, layers=(1,)).hooks(model))
        assert torch.equal(clean[names[0]], noisy[names[0]])
        assert not torch.equal(clean[names[1]], noisy[names[1]])
        assert not torch.equal(clean[names[2]], noisy[names[2]])
        pattern = attn(1, "pattern")
        only_v = NormNoise(sigma=0.4, on="v", layers=(1,))
        assert torch.equal(
            watch(model, ids, [pattern])[pattern],
            watch(model, ids, [pattern], only_v.hooks(model))[pattern],
        )


def _moves(model: Any, layer: int, fwd_hooks: list[Any]) -> int:
    """Rows of a layer whose arg max moved, by more than rounding."""
    name = attn(layer, "attn_scores")
    clean, noisy = (watch(model, ids, [name], h)[name] for h in ([], fwd_hooks))
    before, after = clean.argmax(-1, keepdim=True), noisy.argmax(-1, keepdim=True)
    lead = (noisy.gather(-1, after) - noisy.gather(-1, before)).squeeze(-1)
    return int((lead > 1e-4 * noisy.amax(-1).abs()).sum())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_without_a_bias_only_unequal_keys_move_an_arg_max(name: str, layer: int) -> None:
    model = models.TINY[name]()
    for draw in range(3):
        how = {"layers": (layer,), "law": "lognormal", "draw": draw}
        for on in ("q", "v", "qv"):
            noise = NormNoise(sigma=0.9, on=on, **how)
            assert _moves(model, layer, noise.hooks(model)) == 0
        assert _moves(model, layer, NormNoise(sigma=0.9, on="k", **how).hooks(model)) > 20


def test_a_common_factor_on_all_keys_moves_no_arg_max(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        NormNoise, "factors", lambda self, **o: torch.full((3, o["n_pos"], o["n_heads"]), 0.4)
    )
    noise = NormNoise(sigma=0.1, on="k", layers=(0,))
    assert _moves(llama, 0, noise.hooks(llama)) == 0
    before = watch(llama, ids, [attn(0, "attn_scores")])
    after = watch(llama, ids, [attn(0, "attn_scores")], noise.hooks(llama))
    assert not torch.equal(before[attn(0, "attn_scores")], after[attn(0, "attn_scores")])


def test_with_a_bias_query_noise_moves_arg_maxes(bloom: Any) -> None:
    """M.7 2: the built example. Halving every query of a model with ALiBi moves rows."""
    halve = (attention_sites(bloom).layer(0).q.dot.hook, lambda q, hook: q * 0.5)
    assert _moves(bloom, 0, [halve]) > 0
    noise = NormNoise(sigma=0.5, on="q", layers=(0,))
    assert _moves(bloom, 0, noise.hooks(bloom)) > 0
    values = NormNoise(sigma=0.5, on="v", layers=(0,))
    assert _moves(bloom, 0, values.hooks(bloom)) == 0
