"""2. A hook carries something else than its name says."""

from __future__ import annotations

import pytest
import torch

from tests.support.builders import NATIVE, build
from tests.support.families import D_HEAD, N_HEADS
from tests.support.traps import (
    POS,
    apart,
    logprobs_apart,
    names,
    run,
    twice,
)

DISCARDED = "has already consumed the original values. The edit is discarded"
SCORES_ARE_PATTERN = (
    "AfmoeForCausalLM ASTForAudioClassification BartForConditionalGeneration BertForMaskedLM "
    "BlenderbotForConditionalGeneration DeiTForImageClassification "
    "Florence2ForConditionalGeneration Gemma3nForConditionalGeneration Gemma4ForCausalLM "
    "Gemma4UnifiedForConditionalGeneration Glm4vForConditionalGeneration GPTJForCausalLM "
    "GPTNeoForCausalLM HubertForCTC JambaForCausalLM JetMoeForCausalLM LagunaForCausalLM "
    "Llama4ForCausalLM M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration "
    "ModernBertDecoderForCausalLM MuseGlimmerForConditionalGeneration NanoChatForCausalLM "
    "OlmoHybridForCausalLM OPTForCausalLM PegasusForConditionalGeneration PhiMoEForCausalLM "
    "Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration "
    "Qwen3VLMoeForConditionalGeneration RobertaForMaskedLM ViTForImageClassification "
    "Wav2Vec2ForCTC XGLMForCausalLM"
)


@pytest.mark.parametrize("name", [*SCORES_ARE_PATTERN.split(), NATIVE])
def test_scores_hook_carries_the_softmaxed_pattern(name: str) -> None:
    """And what a hook returns there is discarded; so it is at the pattern, native models aside."""
    built = build(name)
    scores, patterns = names(built, ".hook_attn_scores"), names(built, ".hook_pattern")
    seen = run(built, scores + patterns)
    assert scores
    for one, other in zip(scores, patterns, strict=True):
        assert torch.equal(seen.one(one), seen.one(other))
        assert float(seen.one(one).min()) >= 0
        torch.testing.assert_close(seen.one(one).sum(-1), torch.ones(seen.one(one).shape[:-1]))
    with pytest.warns(UserWarning, match=DISCARDED):
        assert torch.equal(run(built, edits=dict.fromkeys(scores, twice)).out, seen.out)
    if name == NATIVE:
        assert apart(run(built, edits=dict.fromkeys(patterns, twice)).out, seen.out) > 0.1
        return
    with pytest.warns(UserWarning, match=DISCARDED):
        assert torch.equal(run(built, edits=dict.fromkeys(patterns, twice)).out, seen.out)


T5_LIKE = ["T5ForConditionalGeneration", "MT5ForConditionalGeneration"]


@pytest.mark.parametrize("name", [*T5_LIKE, "LongT5ForConditionalGeneration"])
def test_t5_decoder_scores_are_not_masked(name: str) -> None:
    built = build(name)
    attn = "decoder_blocks.0.self_attn"
    seen = run(built, [f"{attn}.hook_attn_scores", f"{attn}.hook_pattern"])
    scores, pattern = seen.one(f"{attn}.hook_attn_scores"), seen.one(f"{attn}.hook_pattern")
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    assert float(scores[..., future].min()) > -100
    assert float(torch.softmax(scores, -1)[..., future].max()) > 0.9
    assert float(pattern[..., future].max()) == 0
    torch.testing.assert_close(torch.softmax(scores.masked_fill(future, -torch.inf), -1), pattern)
    edits = dict.fromkeys(names(built, ".hook_attn_scores", ".hook_pattern"), twice)
    with pytest.warns(UserWarning, match=DISCARDED):
        assert torch.equal(run(built, edits=edits).out, seen.out)


def test_switch_transformers_pattern_is_the_position_bias() -> None:
    built = build("SwitchTransformersForConditionalGeneration")
    attn = "encoder_blocks.0.attn"
    seen = run(built, [f"{attn}.hook_attn_scores", f"{attn}.hook_pattern"], batch=3)
    pattern = seen.one(f"{attn}.hook_pattern")
    assert torch.equal(seen.one(f"{attn}.hook_attn_scores"), pattern)
    assert pattern.shape == (1, N_HEADS, POS, POS)  # of a batch of 3
    assert float(pattern.min()) < -1
    # The next layers take the bias from the first: the edit lands, though the warning denies it.
    with pytest.warns(UserWarning, match="does not affect the model's output"):
        edited = run(built, edits={f"{attn}.hook_pattern": torch.zeros_like}, batch=3).out
    assert apart(edited, seen.out) > 0.1


def test_t5gemma2_decoder_shows_half_of_a_merged_attention() -> None:
    built = build("T5Gemma2ForConditionalGeneration")
    attn = "decoder_blocks.0.self_attn"
    seen = run(built, [f"{attn}.{n}" for n in ("hook_k", "hook_v", "hook_pattern")])
    for name in ("hook_k", "hook_v"):  # the decoder's own, then the encoder's
        assert [t.shape[1] for t in seen.fired[f"{attn}.{name}"]] == [POS - 2, POS]
    pattern = seen.one(f"{attn}.hook_pattern")
    assert pattern.shape[-1] == POS - 2
    assert float(pattern.sum(-1).max()) < 0.99  # the rest lies on the encoder's tokens


def test_gpt_oss_pattern_is_not_the_softmax_of_its_scores() -> None:
    built = build("GptOssForCausalLM")
    attn = "blocks.0.attn"
    seen = run(built, [f"{attn}.hook_attn_scores", f"{attn}.hook_pattern"])
    scores, pattern = seen.one(f"{attn}.hook_attn_scores"), seen.one(f"{attn}.hook_pattern")
    rows = pattern.sum(-1, keepdim=True)
    assert float(rows.min()) < 0.1
    torch.testing.assert_close(torch.softmax(scores, -1), pattern / rows)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_gated_queries_have_twice_the_heads_and_scale_the_gate(name: str) -> None:
    built = build(name)
    attn = "blocks.1.attn"
    watch = [f"{attn}.hook_q", f"{attn}.hook_pattern", f"{attn}.hook_z"]
    clean = run(built, watch)
    assert clean.one(watch[0]).shape[2] == 2 * N_HEADS
    noisy = run(built, watch, {watch[0]: twice})
    assert apart(noisy.one(watch[1]), clean.one(watch[1])) < 1e-5
    assert apart(noisy.one(watch[2]), clean.one(watch[2])) > 0.1


@pytest.mark.parametrize(
    ("name", "hook", "shape"),
    [
        ("LlamaForCausalLM", "blocks.0.attn.hook_q", (3, POS, N_HEADS, D_HEAD)),
        ("Qwen3ForCausalLM", "blocks.0.attn.hook_q", (3, POS, N_HEADS, D_HEAD)),
        ("Qwen3ForCausalLM", "blocks.0.attn.hook_q_normed", (3, N_HEADS, POS, D_HEAD)),
        ("DeepseekV3ForCausalLM", "blocks.0.attn.hook_q", (3, N_HEADS, POS, 2 * D_HEAD)),
        ("LEDForConditionalGeneration", "encoder_blocks.0.attn.hook_q", (16, 3, N_HEADS, D_HEAD)),
    ],
)
def test_the_axes_of_a_query_hook_depend_on_the_model(
    name: str, hook: str, shape: tuple[int, ...]
) -> None:
    """LED pads to whole windows: 16 positions for 13 tokens."""
    assert run(build(name), [hook], batch=3).one(hook).shape == shape


# As released, and with a value bias or not.
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen2ForCausalLM", "OPTForCausalLM"])
def test_compatibility_mode_takes_the_bias_out_of_v(name: str) -> None:
    built = build(name)
    value = "blocks.0.attn.hook_v"
    raw = run(built, [value])
    built.model.enable_compatibility_mode(disable_warnings=True)
    folded = run(built, [value])
    assert logprobs_apart(folded.out, raw.out) < 1e-4
    lengths = folded.one(value).norm(dim=-1) / raw.one(value).norm(dim=-1)
    assert float((lengths - 1).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_masked_scores_and_rows_depend_on_the_mode(name: str) -> None:
    built = build(name)
    watch = ["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"]
    mask = torch.ones(1, POS, dtype=torch.long)
    mask[:, :3] = 0  # padding on the left: query 1 sees no key
    raw = run(built, watch, attention_mask=mask)
    assert float(raw.one(watch[0]).min()) == torch.finfo(torch.float32).min
    torch.testing.assert_close(raw.one(watch[1])[0, 0, 1], torch.full((POS,), 1 / POS))
    built.model.enable_compatibility_mode(disable_warnings=True)
    folded = run(built, watch, attention_mask=mask)
    assert float(folded.one(watch[0]).min()) == -torch.inf
    assert float(folded.one(watch[1])[0, 0, 1].max()) == 0
