"""The self-check as the probe makes it: what it notices, what it remembers, what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import NormNoise, UnsupportedModelError, attention_sites
from hooks.sites.types import LayerSites
from tests.oracles.counts import assert_sample_is_real
from tests.support import models
from tests.support.probes import ids, probe
from tests.support.watching import (
    Found,
    attn,
    tiny_gemma2,
)


def _refusal(model: Any) -> UnsupportedModelError:
    with pytest.raises(UnsupportedModelError) as caught:
        attention_sites(model)
    with pytest.raises(UnsupportedModelError):
        probe(model)  # nothing is reported for it
    error = caught.value
    assert f"layer {error.layer}: {error.check}: wanted {error.wanted}; got {error.got}" == str(
        error
    )
    return error


def test_a_wrong_key_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(self: LayerSites) -> tuple[int, ...]:
        return tuple(head % self.n_kv_heads for head in range(self.n_heads))

    monkeypatch.setattr(LayerSites, "kv_head_of", property(interleaved))
    for name in ("llama", "qwen3"):
        error = _refusal(models.TINY[name]())
        assert error.layer == 0
        assert "k-noise" in error.check
    attention_sites(models.tiny_gpt2())  # one key head for each: the wrong map is the right one


def test_an_ignored_soft_cap_is_noticed() -> None:
    model = tiny_gemma2()
    model.cfg.attn_scores_soft_cap = 0.0
    assert "noise" in _refusal(model).check


def _bent(w: Tensor) -> Tensor:
    """Masks stay. A map that commutes with positive factors, relu say, would be no sabotage."""
    return torch.where(w > -1e30, w.sign() * w.abs().sqrt(), w)


SABOTAGE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "pattern rolled": (attn(1, "pattern"), lambda a: a.roll(1, -2), "pattern"),
    "pattern flat": (attn(1, "pattern"), lambda a: a.sqrt(), "pattern"),
    "scores bent": (attn(1, "attn_scores"), _bent, "noise"),
    "scores frozen": (attn(1, "attn_scores"), lambda w: w[:1].expand_as(w).clone(), ""),
}


@pytest.mark.parametrize("how", SABOTAGE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_sabotage_is_noticed(how: str, name: str) -> None:
    point, edit, check = SABOTAGE[how]
    model = models.TINY[name]()
    model.hook_dict[point].add_hook(lambda tensor, hook: edit(tensor))
    error = _refusal(model)
    assert error.layer == 1
    assert re.search(check, error.check), error


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_another_z_leaves_q_and_k_and_refuses_v(name: str) -> None:
    model = models.TINY[name]()
    model.hook_dict[attn(1, "z")].add_hook(lambda z, hook: z + 1.0)
    assert [sites.averaging for sites in attention_sites(model)] == ["plain", "unverified"]
    assert NormNoise(sigma=0.1, on="qk").hooks(model)
    assert NormNoise(sigma=0.1, on="v", layers=(0,)).hooks(model)
    with pytest.raises(UnsupportedModelError, match="layer 1: noise on v"):
        NormNoise(sigma=0.1, on="v").hooks(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_gate_on_z_is_known(name: str) -> None:
    model = models.TINY[name]()
    gate = torch.rand(8) + 0.5
    model.hook_dict[attn(0, "z")].add_hook(lambda z, hook: z * gate)
    assert [sites.averaging for sites in attention_sites(model)] == ["gated", "plain"]


def test_sabotage_is_noticed_although_another_hook_was_fine() -> None:
    """A hook that came and went must not vouch for one that happens to lie at its address."""
    model = models.tiny_gpt2()
    point = model.hook_dict[attn(0, "attn_scores")]
    vouched = set()
    for _ in range(20):
        point.add_hook(lambda w, hook: w)
        vouched.add(id(point.fwd_hooks[0]))
        attention_sites(model)
        model.reset_hooks()
    met = 0
    for _ in range(2000):
        point.add_hook(lambda w, hook: _bent(w))
        if id(point.fwd_hooks[0]) in vouched:
            met += 1
            with pytest.raises(UnsupportedModelError):
                attention_sites(model)
        model.reset_hooks()
        if met == 3:
            break


def test_doubled_scores_are_another_model_not_a_broken_one() -> None:
    """softmax follows the doubled scores, and noise scales them: all that the check asks."""
    model = models.tiny_llama()
    plain = attention_sites(model).layer(0)
    model.hook_dict[attn(0, "attn_scores")].add_hook(
        lambda w, hook: torch.where(w > -1e30, 2 * w, w)
    )
    doubled = [2 * scale for scale in plain.score_scale]
    assert attention_sites(model).layer(0).score_scale == pytest.approx(doubled)
    assert_sample_is_real(model, moves=50)


class _Forwards:
    __slots__ = ("count",)  # what a hook keeps in attributes is part of the fingerprint

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.original_model.register_forward_pre_hook(self._add)

    def _add(self, module: Any, args: Any) -> None:
        self.count += 1


def test_the_check_is_remembered_and_redone() -> None:
    model = models.tiny_llama()
    forwards = _Forwards(model)
    first = attention_sites(model)
    once = forwards.count
    assert 1 <= once <= 8  # cheap
    assert attention_sites(model) is first
    assert forwards.count == once
    probe(model)
    assert forwards.count == once + 1
    NormNoise(sigma=0.1).hooks(model)
    assert forwards.count == once + 1

    def redone(change: Callable[[], object]) -> None:
        attention_sites(model)
        before = forwards.count
        change()
        attention_sites(model)
        assert forwards.count > before, change
        after = forwards.count
        attention_sites(model)
        assert forwards.count == after

    redone(lambda: model.to(torch.bfloat16))
    redone(lambda: model.to(torch.float64))
    redone(lambda: model.enable_compatibility_mode())
    # Hooks of a user's on the attention may do anything: the check looks again for each.
    redone(lambda: model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q))
    redone(lambda: model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q * 1.5))
    model.reset_hooks()
    # Noise of ours rests during a check and is no reason for another.
    with NormNoise(sigma=0.3).applied(model):  # once, cached steps are tried
        attention_sites(model)
    before = forwards.count
    with NormNoise(sigma=0.3).applied(model), NormNoise(sigma=0.1, seed=1).applied(model):
        attention_sites(model)
    assert forwards.count == before
    fresh = models.tiny_llama()
    assert attention_sites(fresh) is not first


def test_the_check_says_what_it_measured(model: Any) -> None:
    sites = attention_sites(model)
    table = sites.check
    assert set(table["layer"]) == {0, 1}
    for role in "qkv":
        mine = table[table["check"].str.contains(f"{role}-noise")]
        assert set(mine["layer"]) == {0, 1}
        assert (mine["effect"] > 0.01).all()
        assert (mine["error"] < 1e-4).all()
    assert len(sites) == 2
    architecture = model.cfg.architecture
    for layer in sites:
        assert layer.has_bias == (architecture == "BloomForCausalLM")
        assert layer.soft_cap == (20 if architecture == "Gemma2ForCausalLM" else 0)
        assert layer.score_scale == pytest.approx([1 / math.sqrt(8)] * 4, rel=1e-4)
        assert layer.scores_editable
        assert layer.v.shield == "none"
        assert layer.q.shield == ("removed" if architecture == "Qwen3ForCausalLM" else "none")


def test_the_check_leaves_the_model_as_found(model: Any, unchecked: None) -> None:
    with torch.no_grad():
        model(ids)
    before = Found(model)
    hook = model.hook_dict[attn(0, "q")]
    hook.add_hook(lambda q, hook: q)
    after_adding = Found(model)
    attention_sites(model)
    Found(model).assert_same(after_adding)
    model.reset_hooks()
    Found(model).assert_same(before)


def test_an_effect_that_drowns_is_no_pass() -> None:
    """With q and k at zero nothing can be seen: that must not count as verified."""
    model = models.tiny_llama(qk_scale=0.0)
    error = _refusal(model)
    assert "not verifiable" in error.check


def test_scores_too_small_for_the_pattern_show_the_noise_themselves() -> None:
    sites = attention_sites(models.tiny_llama(qk_scale=1e-12))
    assert sites.check["check"].str.startswith("scores under").any()
