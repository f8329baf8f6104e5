"""What TransformerLens 4.3 does that one would not expect, each in its smallest form.

`docs/transformerlens-traps.md` lists them, section by section. A test here passes while the trap is
there: it asserts the present behaviour, wrong as it is. When one fails on another TransformerLens
or transformers, that trap is gone or changed: correct the page, then what `hooks` does about it.

Warnings are errors in this test suite, so where no `pytest.warns` stands, nothing was said.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.training import TrainConfig, train
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hooks
from tests.support.builders import NATIVE, Built, build, build_hf
from tests.support.families import D_HEAD, D_MODEL, N_CTX, N_HEADS, VOCAB
from tests.support.paths import ROOT
from tests.support.watching import RENAMED, keeps_cache

PAGE = ROOT / "docs" / "transformerlens-traps.md"
POS = 13
TEXT = torch.arange(3, 3 + POS)[None]
DISCARDED = "has already consumed the original values. The edit is discarded"


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Seen:
    """Output of a forward pass, and what fired at the watched hooks."""

    out: Tensor
    fired: dict[str, list[Tensor]]

    def one(self, name: str) -> Tensor:
        (tensor,) = self.fired[name]
        return tensor


Edit = Callable[[Tensor], Tensor]


def run(
    built: Built,
    watch: Iterable[str] = (),
    edits: dict[str, Edit] | None = None,
    batch: int = 1,
    **kwargs: Any,
) -> Seen:
    """One forward pass; edits come before what is watched."""
    args, inputs = built.inputs(batch=batch, pos=POS)
    fired: dict[str, list[Tensor]] = {}

    def editor(edit: Edit) -> Any:
        return lambda tensor, hook: edit(tensor)

    def watcher(name: str) -> Any:
        def keep(tensor: Tensor, hook: Any) -> None:
            fired.setdefault(name, []).append(tensor.clone())

        return keep

    fwd_hooks = [(name, editor(edit)) for name, edit in (edits or {}).items()]
    fwd_hooks += [(name, watcher(name)) for name in watch]
    out = built.model.run_with_hooks(*args, **inputs, **kwargs, fwd_hooks=fwd_hooks)
    return Seen(logits(out), fired)


def logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found: Tensor = next(out[name] for name in ("logits", "last_hidden_state") if name in out)
    return found


def names(built: Built, *ends: str) -> list[str]:
    return [n for n in built.model.hook_dict if n.endswith(ends)]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def logprobs_apart(one: Tensor, other: Tensor) -> float:
    return apart(one.log_softmax(-1), other.log_softmax(-1))


def twice(tensor: Tensor) -> Tensor:
    return 2 * tensor


def first_head_times_4(tensor: Tensor) -> Tensor:
    return torch.cat([4 * tensor[:, :, :1], tensor[:, :, 1:]], dim=2)


# --- 1. Another model is computed ------------------------------------------------------------


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


SMALL: dict[str, Any] = {
    "d_model": 16,
    "d_head": 4,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 16,
    "d_vocab": VOCAB,
    "d_mlp": 16,
    "act_fn": "gelu",
    "seed": 0,
}


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


# --- 2. A hook carries something else than its name says --------------------------------------

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


# --- 3. An edit of q, k or v does nothing, or something else ----------------------------------

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


# --- 4. A hook that is declared, or should be, and never fires --------------------------------

SILENT_ON_SDPA = (
    "ASTForAudioClassification BartForConditionalGeneration BertForMaskedLM "
    "BlenderbotForConditionalGeneration DeiTForImageClassification "
    "Florence2ForConditionalGeneration HubertForCTC JambaForCausalLM JetMoeForCausalLM "
    "LagunaForCausalLM M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration "
    "ModernBertDecoderForCausalLM MT5ForConditionalGeneration NanoChatForCausalLM OPTForCausalLM "
    "PegasusForConditionalGeneration RobertaForMaskedLM T5ForConditionalGeneration "
    "T5Gemma2ForConditionalGeneration ViTForImageClassification Wav2Vec2ForCTC"
)


@pytest.mark.parametrize("name", SILENT_ON_SDPA.split())
def test_scores_and_pattern_never_fire_on_sdpa(name: str) -> None:
    built = build(name, attn="sdpa")
    declared = names(built, ".hook_attn_scores", ".hook_pattern")
    assert declared
    assert not run(built, declared).fired


@pytest.mark.parametrize(
    ("name", "prefix", "hooks"),
    [
        ("LEDForConditionalGeneration", "", (".hook_attn_scores", ".hook_pattern")),
        (
            "LongT5ForConditionalGeneration",
            "encoder_blocks",
            (".hook_attn_scores", ".hook_pattern"),
        ),
        ("Llama4ForCausalLM", "", (".hook_rot_q", ".hook_rot_k")),
        ("MuseGlimmerForConditionalGeneration", "", (".hook_rot_q", ".hook_rot_k")),
        ("JetMoeForCausalLM", "", (".hook_rot_q", ".hook_rot_k")),
    ],
)
def test_declared_hooks_never_fire_on_eager(name: str, prefix: str, hooks: tuple[str, ...]) -> None:
    built = build(name)
    declared = [n for n in names(built, *hooks) if n.startswith(prefix)]
    assert declared
    assert not run(built, declared).fired


def test_jetmoe_has_no_hook_on_q_k_v_or_z() -> None:
    built = build("JetMoeForCausalLM")
    assert names(built, ".hook_pattern")
    ends = tuple(f".{n}" for n in ("hook_q", "hook_k", "hook_v", "hook_z"))
    assert not names(built, *ends)


@pytest.mark.parametrize(
    "name",
    [
        "DeepseekV4ForCausalLM",
        "NemotronHForCausalLM",
        "RecurrentGemmaForCausalLM",
        "Zamba2ForCausalLM",
    ],
)
def test_models_with_attention_have_no_attention_hook(name: str) -> None:
    hf = build_hf(name)
    assert any(type(module).__name__.endswith("Attention") for module in hf.modules())
    ends = tuple(f".hook_{n}" for n in ("q", "k", "v", "z", "attn_scores", "pattern"))
    assert not names(build(name), *ends)


def test_a_filter_that_matches_nothing_is_no_error() -> None:
    built = build("LlamaForCausalLM")
    clean = built.model(TEXT)

    def never(name: str) -> bool:
        return name.endswith("hook_queries")

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(tensor)

    assert torch.equal(built.model.run_with_hooks(TEXT, fwd_hooks=[(never, zero)]), clean)
    assert not built.model.run_with_cache(TEXT, names_filter=never)[1]
    with pytest.raises(KeyError, match="does not exist"):
        built.model.run_with_hooks(TEXT, fwd_hooks=[("hook_queries", zero)])


# --- 5. Hooks, modules and loops --------------------------------------------------------------


def test_alias_and_canonical_name_attach_a_hook_twice() -> None:
    built = build("LlamaForCausalLM")
    both = ["blocks.0.attn.hook_q", "blocks.0.attn.q.hook_out"]
    assert built.model.hook_dict[both[0]] is built.model.hook_dict[both[1]]
    clean = run(built, both[:1]).one(both[0])
    noisy = run(built, both[:1], dict.fromkeys(both, twice)).one(both[0])
    torch.testing.assert_close(noisy, 4 * clean)


def test_a_hook_is_told_another_name_in_compatibility_mode() -> None:
    model = build("GPT2LMHeadModel").model
    told: list[str] = []

    def note(tensor: Tensor, hook: Any) -> None:
        told.append(hook.name)

    model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.attn.hook_q", note)])
    model.enable_compatibility_mode(disable_warnings=True)
    model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.attn.hook_q", note)])
    assert told == ["blocks.0.attn.q.hook_out", "blocks.0.attn.hook_q"]


def test_the_wrapped_model_is_changed_in_place() -> None:
    hf = build_hf("GPT2LMHeadModel")
    before, weights = hf(TEXT).logits, set(hf.state_dict())
    bridge = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config)
    assert not weights & set(hf.state_dict())
    assert apart(hf(TEXT).logits, before) < 1e-4
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_v", lambda v, hook: 0 * v)]):
        assert apart(hf(TEXT).logits, before) > 1
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert apart(hf(TEXT).logits, before) > 0.1  # unembedding centred: another reference


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", NATIVE])
def test_the_unembedding_is_computed_where_nobody_wants_it(name: str) -> None:
    model = build(name).model
    calls: list[nn.Module] = []
    handle = model.unembed.original_component.register_forward_hook(lambda m, *_: calls.append(m))
    # HookedTransformer returned the residual stream here.
    assert model(TEXT, stop_at_layer=model.cfg.n_layers).shape == (1, POS, VOCAB)
    assert model(TEXT, return_type=None) is None
    assert len(calls) == 2
    assert model(TEXT, stop_at_layer=model.cfg.n_layers - 1).shape == (1, POS, D_MODEL)
    assert len(calls) == 2
    handle.remove()


@pytest.mark.usefixtures("capsys")
def test_training_makes_one_step_more_than_max_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**SMALL))
    forward, steps = bridge.forward, []

    def count(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(bridge, "forward", count)
    config = TrainConfig(num_epochs=2, batch_size=1, max_steps=3, device="cpu", print_every=None)
    rows: Any = [{"tokens": TEXT[0]}] * 9
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(123)
        train(bridge, config, rows)
        assert torch.initial_seed() == config.seed  # the caller's 123 is gone
    assert len(steps) == 2 * (3 + 1)  # in each epoch


# --- 6. Text ----------------------------------------------------------------------------------


def _in_memory_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<unk>": VOCAB - 2, "<s>": VOCAB - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def test_a_long_text_is_cut_to_the_context(tmp_path: Path) -> None:
    _in_memory_tokenizer().save_pretrained(tmp_path)
    hf = build_hf("GPT2LMHeadModel")
    bridge = build_bridge_from_module(
        hf,
        "GPT2LMHeadModel",
        hf_config=hf.config,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    text = " ".join(["w1"] * (N_CTX + 20))
    assert bridge.to_tokens(text).shape == (1, N_CTX)
    assert bridge.to_tokens(text, truncate=False).shape == (1, N_CTX + 21)  # and <s>
    assert bridge(text).shape[1] == N_CTX


# --- 7. Loud: refused, and only the reason is surprising --------------------------------------


def _phi_in_compatibility_mode() -> None:
    build("PhiForCausalLM", "gqa").model.enable_compatibility_mode(disable_warnings=True)


def _with_tokenizer_in_memory() -> None:
    hf = build_hf("GPT2LMHeadModel")
    build_bridge_from_module(
        hf, "GPT2LMHeadModel", hf_config=hf.config, tokenizer=_in_memory_tokenizer()
    )


def _pickled() -> None:
    pickle.dumps(build("GPT2LMHeadModel").model)


def _cache_get() -> None:
    _, cache = build("GPT2LMHeadModel").model.run_with_cache(TEXT)
    cache.get("blocks.0.attn.hook_q")


def _built(name: str, heads: str | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: build(name, heads, **options)


LOUD: Sequence[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "falcon_new_with_multi_query",
        _built("FalconForCausalLM", "gqa", multi_query=True),
        RuntimeError,
        "split_with_sizes expects split_sizes to sum exactly to 64",
    ),
    (
        "bigcode_without_multi_query",
        _built("GPTBigCodeForCausalLM", multi_query=False),
        AssertionError,
        "only supports multi_query=True",
    ),
    (
        "phi_with_qk_layernorm",
        _built("PhiForCausalLM", qk_layernorm=True),
        RuntimeError,
        "has 'q_layernorm' but adapter did not declare 'q_norm'",
    ),
    (
        "granite_hybrid_without_positions",
        lambda: build("GraniteMoeHybridForCausalLM", position_embedding_type=None).model(TEXT),
        RuntimeError,
        "Original component not set for model.rotary_emb",
    ),
    (
        "phi_gqa_in_compatibility_mode",
        _phi_in_compatibility_mode,
        RuntimeError,
        "must match the size of tensor b",
    ),
    ("tokenizer_in_memory", _with_tokenizer_in_memory, KeyError, "name_or_path"),
    ("pickled_bridge", _pickled, AttributeError, "Can't pickle local object"),
    ("cache_get", _cache_get, AttributeError, "get"),
]


@pytest.mark.parametrize(("what", "attempt", "error", "message"), LOUD, ids=[c[0] for c in LOUD])
def test_refused_loudly(
    what: str, attempt: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attempt()


# --- 8. transformers, not TransformerLens -----------------------------------------------------


@pytest.mark.parametrize("heads", ["mha", "mqa"])
def test_transformers_falcon_is_not_causal_with_output_attentions(heads: str) -> None:
    """Its mask is one of booleans on sdpa, which is then added to the scores."""
    hf = build_hf("FalconForCausalLM", heads, attn="sdpa")
    asked = hf(TEXT, output_attentions=True)
    assert apart(asked.logits, hf(TEXT).logits) > 10
    future = torch.ones(POS, POS).triu(1).bool()
    assert float(asked.attentions[0][..., future].max()) > 0.9


def test_transformers_falcon_adds_alibi_twice_with_output_attentions() -> None:
    hf = build_hf("FalconForCausalLM", "mha", alibi=True)
    once, doubled = hf(TEXT).logits, hf(TEXT, output_attentions=True).logits
    assert apart(once, doubled) > 0.5
    assert apart(build("FalconForCausalLM", "mha", alibi=True).model(TEXT), doubled) < 1e-4
    hf.config._attn_implementation = "eager"
    assert apart(hf(TEXT).logits, doubled) < 1e-4


# --- The page ---------------------------------------------------------------------------------


def test_the_page_names_every_test_and_no_other() -> None:
    ours = {n for n in globals() if n.startswith("test_") and n != _THIS}
    assert set(re.findall(r"`(test_\w+)`", PAGE.read_text())) == ours
    assert all(f"`{what}`" in PAGE.read_text() for what, *_ in LOUD)


_THIS = test_the_page_names_every_test_and_no_other.__name__
