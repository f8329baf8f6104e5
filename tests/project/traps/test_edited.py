"""3. An edit of q, k or v does nothing, or something else."""

from __future__ import annotations

import pytest

from tests.support.builders import build
from tests.support.traps import (
    apart,
    first_head_times_4,
    names,
    run,
    twice,
)

QK_NORM = (
    "AfmoeForCausalLM ApertusForCausalLM Exaone4ForCausalLM Gemma3ForCausalLM "
    "Gemma3nForConditionalGeneration Gemma4ForCausalLM HunYuanDenseV1ForCausalLM "
    "LagunaForCausalLM Lfm2ForCausalLM MuseGlimmerForConditionalGeneration NanoChatForCausalLM "
    "Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3VLForConditionalGeneration "
    "T5Gemma2ForConditionalGeneration"
)


@pytest.mark.parametrize("name", QK_NORM.split())
def test_scaling_hook_q_does_nothing_before_a_norm(name: str) -> None:
    built = build(name)
    clean = run(built).out
    queries, keys = names(built, ".hook_q"), names(built, ".hook_k")
    assert apart(run(built, edits=dict.fromkeys(queries, twice)).out, clean) < 1e-4
    assert apart(run(built, edits=dict.fromkeys(queries, first_head_times_4)).out, clean) < 1e-4
    assert apart(run(built, edits=dict.fromkeys(keys, twice)).out, clean) < 1e-4


def test_hunyuan_and_llama_4_norm_behind_the_rotary_embedding() -> None:
    built = build("HunYuanDenseV1ForCausalLM")
    pattern = "blocks.0.attn.hook_pattern"
    clean = run(built, [pattern]).one(pattern)
    changes = {
        hook: apart(run(built, [pattern], {f"blocks.0.attn.{hook}": twice}).one(pattern), clean)
        for hook in ("hook_q", "hook_rot_q", "hook_q_normed")
    }
    assert changes["hook_q"] < 1e-5
    assert changes["hook_rot_q"] < 1e-5
    assert changes["hook_q_normed"] > 0.1
    built = build("Llama4ForCausalLM")  # rotary layers 0 and 2; layers 1 and 3 have no norm
    for layer in range(4):
        attn = f"blocks.{layer}.attn"
        before = run(built, [f"{attn}.hook_pattern"])
        after = run(built, [f"{attn}.hook_pattern"], {f"{attn}.hook_q": twice})
        change = apart(after.one(f"{attn}.hook_pattern"), before.one(f"{attn}.hook_pattern"))
        assert (change < 1e-5) is (layer % 2 == 0)
        assert layer % 2 == 0 or change > 0.1


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Olmo2ForCausalLM", 0),
        ("OlmoeForCausalLM", 0),
        ("FlexOlmoForCausalLM", 0),
        ("MiniMaxM2ForCausalLM", 0),
        ("OlmoHybridForCausalLM", 1),
    ],
)
def test_noise_on_one_query_head_leaks_into_the_others(name: str, layer: int) -> None:
    built = build(name)
    query, pattern = f"blocks.{layer}.attn.hook_q", f"blocks.{layer}.attn.hook_pattern"
    clean = run(built, [pattern]).one(pattern)
    noisy = run(built, [pattern], {query: first_head_times_4}).one(pattern)
    assert bool(((noisy - clean).abs().amax((0, 2, 3)) > 0.1).all())  # every head
    assert apart(run(built, [pattern], {query: twice}).one(pattern), clean) < 1e-5
    llama = build("LlamaForCausalLM")
    pattern, query = "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_q"
    noisy = run(llama, [pattern], {query: first_head_times_4}).one(pattern)
    assert apart(noisy[:, 1:], run(llama, [pattern]).one(pattern)[:, 1:]) == 0


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("Gemma4ForCausalLM", "blocks.0.attn"),
        ("Gemma3nForConditionalGeneration", "blocks.0.self_attn"),
    ],
)
def test_scaling_hook_v_does_nothing_before_a_norm(name: str, attn: str) -> None:
    built = build(name)
    z = f"{attn}.hook_z"
    clean = run(built, [z]).one(z)
    assert apart(run(built, [z], {f"{attn}.hook_v": twice}).one(z), clean) < 1e-4
    assert apart(run(built, [z], {f"{attn}.v_norm.hook_out": twice}).one(z), clean) > 0.5
