"""1. Another model is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import hooks
from tests.support.builders import build, build_hf
from tests.support.families import D_HEAD, D_MODEL
from tests.support.traps import (
    POS,
    SMALL,
    TEXT,
    apart,
    logprobs_apart,
    run,
)
from tests.support.watching import RENAMED, keeps_cache


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_falcon_with_grouped_keys_has_other_logits(n_kv_heads: int) -> None:
    wanted = build_hf("FalconForCausalLM", "gqa", num_kv_heads=n_kv_heads)(TEXT).logits
    got = build("FalconForCausalLM", "gqa", num_kv_heads=n_kv_heads).model(TEXT)
    assert apart(got, wanted) > 0.5 * float(wanted.abs().max())
    wanted = build_hf("FalconForCausalLM", "gqa", num_kv_heads=1)(TEXT).logits
    got = build("FalconForCausalLM", "gqa", num_kv_heads=1).model(TEXT)
    assert apart(got, wanted) < 1e-4


def test_falcon_adds_its_alibi_twice() -> None:
    built = build("FalconForCausalLM", "mha", alibi=True)
    scores = "blocks.0.attn.hook_attn_scores"
    bias = run(built, [scores], {"blocks.0.attn.hook_q": torch.zeros_like}).one(scores)[0, :, -1]
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])  # of four heads
    once = slopes[:, None] * torch.arange(POS) / D_HEAD**0.5
    torch.testing.assert_close(bias, 2 * once)
    hf = build_hf("FalconForCausalLM", "mha", alibi=True)
    assert apart(built.model(TEXT), hf(TEXT).logits) > 0.5


def test_openai_gpt_with_a_mask_sees_later_tokens() -> None:
    """Its model hands a mask of padding alone to attention, which takes four axes for the whole."""
    built, ones = build("OpenAIGPTLMHeadModel"), torch.ones_like(TEXT)
    other = TEXT.clone()
    other[:, -1] += 1
    assert apart(built.model(TEXT)[:, :-1], built.model(other)[:, :-1]) == 0
    seen = [built.model(x, attention_mask=ones)[:, :-1] for x in (TEXT, other)]
    assert apart(*seen) > 0.1
    hf = build_hf("OpenAIGPTLMHeadModel")
    assert apart(hf(TEXT).logits, hf(TEXT, attention_mask=ones).logits) == 0
    with pytest.raises(hooks.UnsupportedModelError, match="a mask of ones: wanted"):
        hooks.collapse_probe(built.model, {"input_ids": TEXT, "attention_mask": ones}, draws=0)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM"]
)
def test_attn_scale_is_minus_one(name: str) -> None:
    assert build(name).model.cfg.attn_scale == -1.0


def test_left_padded_gpt2_counts_positions_from_the_mask() -> None:
    built, hf = build("GPT2LMHeadModel"), build_hf("GPT2LMHeadModel")
    mask = torch.ones_like(TEXT)
    mask[0, :3] = 0
    mine, theirs = built.model(TEXT, attention_mask=mask), hf(TEXT, attention_mask=mask).logits
    assert apart(mine[0, 3:], theirs[0, 3:]) > 0.5
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = hf(TEXT, attention_mask=mask, position_ids=positions).logits
    assert apart(mine[0, 3:], theirs[0, 3:]) < 1e-3


def test_left_padding_is_nan_under_autocast() -> None:
    """The mask's least float32 is -inf in bfloat16: a row of padding has no softmax."""
    built, mask = build("LlamaForCausalLM"), torch.ones_like(TEXT)
    mask[0, :2] = 0
    hf = build_hf("LlamaForCausalLM")
    inputs = {"input_ids": TEXT, "attention_mask": mask}
    with torch.autocast("cpu", torch.bfloat16):
        assert hf(**inputs).logits.isfinite().all()
        assert built.model(TEXT, attention_mask=mask)[0].isnan().all()
        with pytest.raises(hooks.UnsupportedModelError, match=r"left padding: .* not finite"):
            hooks.collapse_probe(built.model, inputs, draws=0)
        for fine in (mask.flip(1), torch.ones_like(mask)):
            hooks.collapse_probe(built.model, inputs | {"attention_mask": fine}, draws=0)
    assert built.model(TEXT, attention_mask=mask).isfinite().all()


def test_a_boolean_mask_of_four_axes_is_added_by_eager_attention() -> None:
    """1 where it is True; fused attention and the bridge's own hide what is False."""
    at = torch.arange(TEXT.shape[1])
    seen = (at[:, None] >= at) & ((at[:, None] >= 6) == (at >= 6))  # two documents
    as_bool = seen.expand(len(TEXT), 1, -1, -1)
    hidden = torch.where(as_bool, 0.0, torch.finfo(torch.float32).min)

    def off(model: Any, mask: Tensor) -> float:
        passes = [model(TEXT, attention_mask=x) for x in (mask, hidden)]
        a, b = (getattr(x, "logits", x) for x in passes)
        return apart(a, b)

    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        eager, fused = build_hf(name), build_hf(name, attn="sdpa")
        assert off(eager, as_bool) > 0.1 > 1e-3 > off(fused, as_bool)
        assert off(eager, as_bool) == pytest.approx(off(eager, as_bool.float()), abs=1e-3)
        assert off(build(name).model, as_bool) < 1e-3
    for attn in ("eager", "sdpa"):
        assert off(build("GPTNeoForCausalLM", attn=attn).model, as_bool) > 0.1
    assert off(build("BertForMaskedLM", attn="eager").model, as_bool) > 0.1


@pytest.mark.parametrize(
    ("name", "heads", "options"),
    [
        ("GptOssForCausalLM", "gqa", {}),  # the rest of each row goes to the sink
        # A norm stands between the value bias and the attention.
        ("Gemma4ForCausalLM", "mha", {"attention_bias": True, "global_head_dim": D_HEAD}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not support fold_ln")
@pytest.mark.parametrize("fold", [True, False])
def test_compatibility_mode_moves_value_biases_where_they_do_not_commute(
    name: str, heads: str, options: dict[str, Any], fold: bool
) -> None:
    built = build(name, heads, **options)
    before = run(built).out
    built.model.enable_compatibility_mode(disable_warnings=True, fold_value_biases=fold)
    assert (logprobs_apart(run(built).out, before) > 0.2) is fold
    if not fold:
        assert logprobs_apart(run(built).out, before) < 1e-4


@pytest.mark.filterwarnings("ignore:.*does not support")
def test_compatibility_mode_takes_a_norm_out_of_bitnet() -> None:
    """Exactly: what is left is the Hugging Face model without it."""
    hf, built = build_hf("BitNetForCausalLM", "gqa"), build("BitNetForCausalLM", "gqa")
    assert logprobs_apart(built.model(TEXT), hf(TEXT).logits) < 1e-4
    built.model.enable_compatibility_mode(disable_warnings=True)
    got = built.model(TEXT)
    assert logprobs_apart(got, hf(TEXT).logits) > 0.5
    for layer in hf.model.layers:
        layer.mlp.ffn_sub_norm = torch.nn.Identity()
    assert logprobs_apart(got, hf(TEXT).logits) < 1e-4


def test_compatibility_mode_transposes_falcon_h1() -> None:
    """As many key heads as heads; with fewer the shapes do not fit, and it raises an error."""
    built = build("FalconH1ForCausalLM", "mha")
    layer = built.model.blocks[0].original_component
    before, gain = layer.self_attn.q_proj.weight.clone(), layer.input_layernorm.weight.clone()
    logits = built.model(TEXT)
    built.model.enable_compatibility_mode(disable_warnings=True)
    torch.testing.assert_close(layer.self_attn.q_proj.weight, before.T * gain)
    assert logprobs_apart(built.model(TEXT), logits) > 1
    with pytest.raises(RuntimeError, match="must match the size"):
        build("FalconH1ForCausalLM", "gqa").model.enable_compatibility_mode()


@pytest.mark.parametrize(("width", "wrong"), [(D_MODEL, True), (D_MODEL + 16, False)])
@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "Glm4MoeForCausalLM"])
def test_compatibility_mode_scales_square_projections_of_shared_experts(
    name: str, width: int, wrong: bool
) -> None:
    qwen = name.startswith("Qwen")
    built = build(name, "gqa", **{"shared_expert_intermediate_size": width} if qwen else
                  {"moe_intermediate_size": width, "n_shared_experts": 1})  # fmt: skip
    before = built.model(TEXT)
    built.model.enable_compatibility_mode(disable_warnings=True)
    assert (logprobs_apart(built.model(TEXT), before) > 0.02) is wrong


@pytest.mark.parametrize(
    "ignored",
    [
        {"use_qk_norm": True},
        {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "local"]},
        {"use_attn_scale": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"parallel_attn_mlp": True},
        {"use_normalization_before_and_after": True},
        {"post_embedding_ln": True},
        {"tie_word_embeddings": True},
        {"num_experts": 4, "experts_per_token": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_native_models_ignore_fields_of_their_configuration(ignored: dict[str, Any]) -> None:
    plain, asked = (
        TransformerBridge.boot_native(TransformerBridgeConfig(**SMALL, **fields))
        for fields in ({}, ignored)
    )
    assert all(getattr(asked.cfg, name) == value for name, value in ignored.items())
    assert plain.state_dict().keys() == asked.state_dict().keys()
    assert torch.equal(plain(TEXT), asked(TEXT))


def test_native_models_drop_unknown_keys_of_a_dict() -> None:
    misspelt = {"n_key_value_head": 2, "use_qknorm": True}
    bridge = TransformerBridge.boot_native(SMALL | misspelt)
    assert bridge.cfg.n_key_value_heads is None
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        TransformerBridgeConfig(**SMALL, **misspelt)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "MptForCausalLM"])
def test_a_cache_is_lost_on_transformers_5_24(name: str) -> None:
    """The bridge alone, without noise; a bridge that keeps its cache there ends this trap."""
    assert keeps_cache(build(name).model) is not RENAMED
