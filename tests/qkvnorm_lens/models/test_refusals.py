"""What our models and their bridges refuse, and what they say to take instead."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import hooks
from hooks import UnsupportedModelError, attention_sites
from qkvnorm_lens.models.bridge import to_bridge, to_plain
from tests.support import models
from tests.support.our_models import make, tokens


def test_compatibility_mode_is_refused_and_changes_nothing() -> None:
    bridge = to_bridge(make(placement="qkv"))
    clean = bridge(tokens())
    with pytest.raises(RuntimeError, match="does not support compatibility mode"):
        bridge.enable_compatibility_mode()
    assert torch.equal(bridge(tokens()), clean)


ABSENT = ("attn.hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_a_hook_that_no_model_of_ours_has_is_refused(
    placement: str, attn_implementation: str, name: str
) -> None:
    """By every way to ask for it, and the message names hooks that are there."""
    bridge = to_bridge(make(placement=placement, attn_implementation=attn_implementation))
    clean, cache = bridge.run_with_cache(tokens())
    where = f"blocks.1.{name}"

    def touch(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * 0

    for ask in (
        lambda: bridge.add_hook(where, touch),
        lambda: bridge.run_with_hooks(tokens(), fwd_hooks=[(where, touch)]),
        lambda: bridge.run_with_hooks(tokens(), bwd_hooks=[(where, touch)]),
        lambda: bridge.run_with_cache(tokens(), names_filter=where),
        lambda: bridge.run_with_cache(tokens(), names_filter=["blocks.0.attn.hook_z", where]),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(where)}: no .*; wanted") as refused:
            ask()
        advice = str(refused.value).partition("wanted ")[2]
        wanted = re.findall(r"[a-z.]*hook_\w+", advice)
        assert wanted
        assert all(f"blocks.1.{other}" in cache for other in wanted)
    assert where not in bridge.hook_dict
    assert where not in cache
    assert torch.equal(bridge(tokens()), clean)


@pytest.mark.parametrize("flag", ["use_attn_result", "use_attn_in", "use_split_qkv_input"])
def test_the_switches_of_absent_hooks_are_refused(flag: str) -> None:
    bridge = to_bridge(make(placement="pre"))
    clean = bridge(tokens())
    with pytest.raises(NotImplementedError, match=f"{flag}: none of this model's attention"):
        getattr(bridge, f"set_{flag}")(True)
    assert not getattr(bridge.cfg, flag)
    assert torch.equal(bridge(tokens()), clean)
    with pytest.raises(ValueError, match=f"{flag}: wanted the default False.*; got True"):
        make(placement="pre", **{flag: True})


def test_scores_that_pass_for_masks_are_refused_by_size() -> None:
    model = models.tiny_llama()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(1e5)
    with pytest.raises(UnsupportedModelError, match=r"told from masks: wanted scores up to 30000"):
        attention_sites(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["blocks.0.mlp.out.weight", "blocks.1.attn.k.weight"])
def test_scores_that_are_not_finite_are_named(where: str, bad: float) -> None:
    """A score that is NaN would pass for a masked one, and leave nothing to verify."""
    model = models.tiny_gpt2()
    with torch.no_grad():
        model.get_parameter(where)[0, 0] = bad
    wanted = r"layer 1: the scores of the self-check: wanted finite numbers; got (NaN|an infinite)"
    for measure in (hooks.spectral_gap, hooks.symmetry_gap, hooks.collapse_probe):
        with pytest.raises(UnsupportedModelError, match=wanted):
            measure(model, [[1, 2, 3, 4]])


def test_heads_results_are_z_times_their_output_matrix() -> None:
    """What the refusal of hook_result says to take instead."""
    bridge = to_bridge(make(placement="qkv"))
    _, cache = bridge.run_with_cache(tokens())
    for layer in range(bridge.cfg.n_layers):
        results = torch.einsum(
            "bphd,hdm->bphm", cache[f"blocks.{layer}.attn.hook_z"], bridge.W_O[layer]
        )
        out = cache[f"blocks.{layer}.hook_attn_out"]
        torch.testing.assert_close(results.sum(2), out)


def test_bad_input_says_what_is_wanted() -> None:
    model = make(placement="pre")
    with pytest.raises(ValueError, match="at most n_ctx = 32 tokens; got 33"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match="wanted either them or inputs_embeds"):
        model()
    native = TransformerBridge.boot_native(
        TransformerBridgeConfig(d_model=8, d_head=4, n_layers=1, n_ctx=8, d_vocab=5, seed=0)
    )
    with pytest.raises(TypeError, match="wanted one made by to_bridge"):
        to_plain(native)
