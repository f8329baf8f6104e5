"""Counts and rates of the probe against forward passes with the noise really in them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hooks import NormNoise, attention_sites
from hooks.collapse.reduce import LayerReducer, Workers
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.tally import Tally
from tests.oracles import probability as reference
from tests.oracles.agreement import compare
from tests.oracles.counts import assert_sample_is_real
from tests.support import models
from tests.support.probes import SIGMAS, ids, probe
from tests.support.watching import (
    attn,
    tiny_opt,
    watch,
)


def test_sampled_counts_are_those_of_real_forward_passes(model: Any) -> None:
    assert_sample_is_real(model, moves=20, on="qk")


@pytest.mark.parametrize("shared", ["heads", "kv", "token"])
def test_sampled_counts_are_real_for_shared_factors(llama: Any, shared: Any) -> None:
    assert_sample_is_real(llama, moves=100, on="qkv", shared=shared)


@pytest.mark.parametrize(("law", "sigma"), [("gaussian", 0.2), ("lognormal", 0.8)])
def test_sampled_counts_are_real_for_other_laws(llama: Any, law: str, sigma: float) -> None:
    assert_sample_is_real(llama, moves=20, law=law, sigma=sigma)


def test_scores_that_no_hook_shows_are_read_at_the_softmax() -> None:
    model = tiny_opt()
    assert all(sites.tapped for sites in attention_sites(model))
    assert_sample_is_real(model, moves=5)


@pytest.mark.parametrize("on", ["q", "qk"])
@pytest.mark.parametrize("method", ["exact", "sample"])
def test_factors_above_two_count(on: str, method: Any) -> None:
    """With a bias a query twice and more as long moves rows that no half-width below 1 moves.

    The built example: scores and biases are drawn so that the bias decides, 1.5 against a gap
    of 0.5 and less, and what the probe counts is held against the definition.
    """
    sites = attention_sites(models.tiny_bloom()).layer(0)
    n_pos, draws, sigma = 6, 200, 2.5
    generator = torch.Generator().manual_seed(0)
    s = 0.1 * torch.randn(1, 4, n_pos, n_pos, generator=generator)
    bias = torch.zeros_like(s)
    bias[..., 0] = 1.5
    s[..., 0], s[..., 1] = 0.0, 0.5  # 1.5 against 0.5: only f_q > 3 helps a query alone
    mask = torch.ones(n_pos, n_pos).tril().bool()
    w = (s + bias).masked_fill(~mask, -torch.inf)
    settings = ProbeSettings(
        sigmas=(sigma,), on=on, law="lognormal", method=method, shared="none", sparse=0.1,
        layers=(0,), draws=draws, seed=3, keep=999,
    )  # fmt: skip
    tally = Tally(settings, (sites,), 1)
    noise = NormNoise(sigma=sigma, on=on, law="lognormal", seed=3)
    LayerReducer(tally, 0, sites, noise, [0], Workers()).add(w, w.softmax(-1), s)
    moved = 0
    for draw in range(draws):
        how = {"layer": 0, "n_heads": 4, "prompts": [0], "n_pos": n_pos}
        at = replace(noise, draw=draw)
        f = at.factors(role="q", **how).transpose(1, 2)[..., None]
        if "k" in on:
            f = f * at.factors(role="k", **how).transpose(1, 2)[:, :, None, :]
        noisy = (f * s + bias).masked_fill(~mask, -torch.inf)
        moved += int((noisy.argmax(-1) != 0).sum())
    assert moved > 200
    rate = float(tally.sums["loose"].sum()) / int(tally.rows.sum())
    wanted = moved / draws / int(tally.rows.sum())
    assert rate == pytest.approx(wanted, abs=1e-9 if method == "sample" else 0.15 * wanted)


def test_sampled_counts_are_real_where_a_user_edits_q() -> None:
    """What a hook of the user's does to q is part of the model."""
    model = models.tiny_llama()
    model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q + 0.7)
    plain = probe(models.tiny_llama(), sigmas=[0.3])
    assert not np.array_equal(plain.rows, probe(model, sigmas=[0.3]).rows)
    assert_sample_is_real(model, moves=50)


def test_exact_and_sampled_agree_over_the_whole_family(model: Any) -> None:
    tokens = models.tokens(6, 32)
    exact = probe(model, tokens, sigmas=SIGMAS, draws=0)
    sampled = probe(model, tokens, sigmas=SIGMAS, draws=60, method="sample")
    assert exact.n_sparse > 200
    assert exact.to_frame("model")["loose"].iloc[1] > 0
    for name in ("loose", "centred"):
        agreement = compare(exact, sampled, name)
        assert agreement.cells >= 4
        assert agreement.events > 500
        assert agreement.holds, agreement


@pytest.mark.parametrize(
    ("name", "law", "sigmas"),
    [
        ("llama", "gaussian", [0.1, 0.2]),
        ("llama", "lognormal", [0.3, 2.0]),
    ],
)
def test_exact_and_sampled_agree_under_other_laws(name: str, law: str, sigmas: list[float]) -> None:
    built = models.TINY[name]()
    exact = probe(built, sigmas=sigmas, law=law, draws=0)
    sampled = probe(built, sigmas=sigmas, law=law, draws=150, method="sample")
    agreement = compare(exact, sampled)
    assert agreement.events > 200
    assert agreement.holds, agreement


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "sigma", "on"),
    [("gaussian", 0.2, "qk"), ("lognormal", 1.5, "qk"), ("lognormal", 1.5, "q")],
)
def test_exact_and_sampled_agree_with_a_bias_under_other_laws(
    law: str, sigma: float, on: str
) -> None:
    bloom, tokens = models.tiny_bloom(), ids[:2, :10]
    exact = probe(bloom, tokens, sigmas=[sigma], law=law, draws=0, on=on)
    sampled = probe(bloom, tokens, sigmas=[sigma], law=law, draws=400, method="sample", on=on)
    agreement = compare(exact, sampled)
    assert exact.n_sparse >= 10
    assert agreement.events > 20
    assert agreement.holds, agreement


def test_exact_counts_are_recomputed_from_the_cache(llama: Any) -> None:
    """Every column of the frame from run_with_cache, numpy and a quadrature of the tests' own."""
    sigma = 0.3
    frame = probe(llama, sigmas=[sigma]).to_frame().set_index(["layer", "head"])
    for layer in range(2):
        names = [attn(layer, "attn_scores"), attn(layer, "pattern")]
        seen = watch(llama, ids, names)
        scores, pattern = (seen[n].double().numpy() for n in names)
        for head in range(4):
            plain, centred, content, level = [], [], [], []
            for b in range(3):
                for row in range(1, 24):  # row 0 sees one key
                    if pattern[b, head, row].max() < 0.95:
                        continue
                    w = scores[b, head, row, : row + 1]
                    star = int(w.argmax())
                    p = reference.unbiased_uniform(w[star], np.delete(w, star), sigma)
                    c = w - w.mean()
                    plain.append(p)
                    level.append(w[star])
                    centred.append(reference.unbiased_uniform(c[star], np.delete(c, star), sigma))
                    content += [p] if star else []
            got = frame.loc[(layer, head)]
            assert (got["rows"], got["sinks"]) == (len(plain), len(plain) - len(content))
            for column, values in (
                ("loose", plain),
                ("loose_content", content),
                ("loose_centred", centred),
            ):
                assert got[column] == pytest.approx(np.mean(values), abs=2e-6), column
            assert got["score_level"] == pytest.approx(np.mean(level), rel=1e-5)
            assert got["se"] == 0
    assert frame["loose"].min() > 0
    assert (frame["loose_centred"] - frame["loose"]).abs().max() > 1e-3


def test_values_never_collapse_and_queries_only_with_a_bias(model: Any) -> None:
    for on in ("v", "q", "qv"):
        report = probe(model, sigmas=[0.5], on=on, draws=4)
        frame = report.to_frame("model").iloc[0]
        assert frame["rows"] > 50
        if model.cfg.architecture == "BloomForCausalLM" and "q" in on:
            assert frame["loose"] > 0
            continue
        assert frame[["loose", "strict", "loose_content", "loose_centred"]].tolist() == [0] * 4
        assert report.sigma_at(0.01) == math.inf
        assert len(report.fragile()) == 0
    k, qk, qkv = (probe(model, sigmas=[0.5], on=on).to_frame("model") for on in ("k", "qk", "qkv"))
    assert qk["loose"].equals(qkv["loose"])
    assert k["loose"][0] > 0.05


def test_each_layer_is_perturbed_alone_on_clean_inputs(model: Any) -> None:
    both = probe(model, sigmas=SIGMAS)
    for layer in (0, 1):
        one = probe(model, sigmas=SIGMAS, layers=[layer])
        assert one.settings.layers == (layer,)
        for name in ("rows", "level", "examined", "single_key"):
            assert np.array_equal(getattr(one, name)[0], getattr(both, name)[layer])
        for name in ("loose", "strict", "centred"):
            assert np.array_equal(getattr(one, name)[:, 0], getattr(both, name)[:, layer])
