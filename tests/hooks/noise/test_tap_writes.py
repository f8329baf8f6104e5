"""Noise written where a model multiplies is the noise of its hooks, and of models without any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from hooks.model.encoding import encode
from hooks.sites.watch import LayerView, observe
from tests.support import builders
from tests.support.marks import slowly

SEEN = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0))
READ = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
HOOKED = ("GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration")
BARE = (
    "JetMoeForCausalLM",
    "NemotronHForCausalLM",
    "Zamba2ForCausalLM",
    "RecurrentGemmaForCausalLM",
)
BESIDE = ("DeepseekV4ForCausalLM", "T5Gemma2ForConditionalGeneration")


def built(name: str, **options: Any) -> Any:
    return builders.build(name, **options).model


def logits(model: Any, ids: Tensor = SEEN, **named: Tensor) -> Tensor:
    if model.original_model.config.is_encoder_decoder:
        named["decoder_input_ids"] = READ[: len(ids)]
    with torch.no_grad():
        out: Tensor = model(ids, **named)
    return out


def forget_hooks(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Every layer of the model is written at its products, though hooks show them."""
    found = attention_sites(model)
    bare = replace(found, layers=tuple(layer.without_hooks() for layer in found))
    patch.setattr("hooks.noise.norm_noise.attention_sites", lambda *_: bare)
    patch.setattr("hooks.collapse.probe.sites_and_key", lambda *_: (bare, ("", "")))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("on", [*slowly("q", "k", "v"), "qkv"])
def test_what_is_written_at_the_products_is_what_a_hook_scales(
    name: str, attn: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing changes to the last bit where every factor is one."""
    model = built(name, attn=attn)
    clean = logits(model)
    noise = NormNoise(sigma=0.3, on=on)
    with noise.applied(model):
        hooked = logits(model)
    forget_hooks(model, monkeypatch)
    with noise.applied(model):
        written = logits(model)
    torch.testing.assert_close(written, hooked, atol=2e-4, rtol=2e-4)
    assert (written - clean).abs().max() > 0.05
    with replace(noise, sigma=0.0).applied(model):
        assert torch.equal(logits(model), clean)
    assert torch.equal(logits(model), clean), "left as it was found"


@pytest.mark.parametrize("name", HOOKED)
def test_a_probe_at_the_products_counts_what_one_at_hooks_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(name)
    given: dict[str, Any] = {"sparse": 0.5, "draws": 4, "progress": False}
    if name.startswith("T5"):
        given["decoder_tokens"] = READ
    hooked = collapse_probe(model, SEEN, **given)
    forget_hooks(model, monkeypatch)
    bare = collapse_probe(model, SEEN, **given)
    assert (bare.rows == hooked.rows).all()
    assert abs(bare.loose - hooked.loose).max() < 1e-4


@pytest.mark.parametrize("name", BARE)
def test_eager_and_fused_attention_agree(name: str) -> None:
    results = []
    for attn in ("eager", "sdpa"):
        model = built(name, attn=attn)
        sites = attention_sites(model)
        assert all(layer.bare and layer.averaging == "plain" for layer in sites)
        report = collapse_probe(model, SEEN, sparse=0.5, draws=2, progress=False)
        with NormNoise(sigma=0.3).applied(model):
            results.append((logits(model), report))
    (eager, one), (fused, other) = results
    torch.testing.assert_close(fused, eager, atol=2e-4, rtol=2e-4)
    assert (one.rows == other.rows).all()
    assert one.n_sparse > 5
    assert abs(one.loose - other.loose).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "JetMoeForCausalLM",
        "Zamba2ForCausalLM",
        "RecurrentGemmaForCausalLM",
        "Llama4ForCausalLM",
        "Gemma3nForConditionalGeneration",
    ],
)
def test_each_token_keeps_its_factor_in_generation(name: str) -> None:
    """With a cache, whose keys are multiplied anew in each step; with a window of four too."""
    model = built(name)
    noise = NormNoise(sigma=1.0, law="lognormal", seed=1)

    def text(cached: bool) -> Tensor:
        out: Tensor = model.generate(
            SEEN[:1, :6],
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=cached,
        )
        return out

    with noise.applied(model), torch.no_grad():
        assert torch.equal(text(True), text(False))


@pytest.mark.parametrize("name", ["JetMoeForCausalLM", "LlamaForCausalLM"])
def test_padding_on_the_left_moves_no_factor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    if name.startswith("Llama"):
        forget_hooks(model, monkeypatch)
    mask = torch.ones_like(SEEN)
    mask[0, :3] = 0
    noise = NormNoise(sigma=0.3)
    with noise.applied(model, attention_mask=mask):
        padded = logits(model, SEEN, attention_mask=mask)
    with noise.applied(model):
        alone = logits(model, SEEN[:1, 3:])
    torch.testing.assert_close(padded[0, 3:], alone[0], atol=2e-4, rtol=2e-4)
    wrong = "attention_mask: wanted an entry for each of 13"
    with noise.applied(model, attention_mask=mask[:, 1:]), pytest.raises(ValueError, match=wrong):
        logits(model)


@pytest.mark.parametrize("name", ["Zamba2ForCausalLM", "JetMoeForCausalLM"])
def test_a_sweep_is_its_noises_one_by_one(name: str) -> None:
    model = built(name)
    report = hooks.sweep(model, SEEN, sigmas=[0.3], replicates=2, progress=False)
    for draw in range(2):
        with NormNoise(sigma=0.3, draw=draw).applied(model):
            given = logits(model)[:, :-1].log_softmax(-1)
        loss = -given.gather(-1, SEEN[:, 1:, None]).sum((1, 2))
        assert report.loss[0, draw] == pytest.approx(loss.tolist(), rel=1e-4)


def test_hooks_alone_can_not_write_and_say_what_can() -> None:
    model = built("JetMoeForCausalLM")
    with pytest.raises(
        UnsupportedModelError,
        match=r"layer 0: noise on q: wanted a hook point where it enters the attention; got none "
        r"of TransformerLens's; NormNoise\.applied needs none",
    ):
        NormNoise(sigma=0.1).hooks(model)
    for noise in (
        NormNoise(sigma=0.1, at="projection"),
        NormNoise(sigma=0.1, on="qk", rows="sparse"),
    ):
        context = noise.applied(model)
        with pytest.raises((UnsupportedModelError, ValueError), match="layer 0"):
            context.__enter__()
    with pytest.raises(UnsupportedModelError, match="CentredAttention: wanted hooks"):
        hooks.CentredAttention().hooks(model)


def test_heads_that_take_turns_share_their_keys() -> None:
    """JetMoE repeats its two key/value heads one after the other, not each of them twice."""
    model = built("JetMoeForCausalLM")
    layer = attention_sites(model).layer(0)
    assert layer.kv_head_of == (0, 1, 0, 1)
    assert layer.kv_leaders == [0, 1]


def views(model: Any, noise: NormNoise | None = None, **given: Tensor) -> list[LayerView]:
    seen: list[LayerView] = []
    layers = attention_sites(model).layers
    prompts = encode(model, SEEN[:1], **given)
    options: dict[str, Any] = {"vectors": ("q", "k", "v"), "beside": True}
    if noise is None:
        observe(model, layers, prompts, seen.append, **options)
    else:
        with noise.applied(model):
            observe(model, layers, prompts, seen.append, **options)
    return seen


def test_deepseek_v4_has_sinks_shared_vectors_and_keys_that_are_no_tokens() -> None:
    model = built("DeepseekV4ForCausalLM")
    layers = [b.self_attn for b in model.original_model.model.layers]
    sites = attention_sites(model)
    for layer, attention in zip(sites, layers, strict=True):
        attention = getattr(attention, "original_component", attention)
        assert layer.sink == pytest.approx(attention.sinks.tolist(), abs=1e-3)
        assert not layer.has_bias, "what the model takes from a whole row is no bias"
    clean = views(model)
    for view in clean:
        assert torch.equal(view.vectors["k"], view.vectors["v"])
        total = view.pattern.sum(-1)
        assert bool(((total > 0) & (total < 1)).all())
    extra = [view.scores.shape[-1] - view.scores.shape[-2] for view in clean]
    assert extra == [0, 3, 0, 3], "one for each four of 13 tokens in every other layer"
    noisy = views(model, NormNoise(sigma=0.3, on="k", layers=(1,)))[1]
    moved = (noisy.pattern - clean[1].pattern).abs()
    assert torch.equal(noisy.vectors["v"], clean[1].vectors["v"])
    assert moved.max() > 0.01
    report = collapse_probe(model, SEEN, sparse=0.4, progress=False)
    rows = report.fragile(500)
    beside = rows[rows.key_pos >= 13]
    assert len(beside) > 0
    assert set(beside.key_token) <= {f"(no token: {i})" for i in range(3)}
    with pytest.raises(UnsupportedModelError, match="keys of the attention: wanted one for each"):
        hooks.spectral_gap(model, SEEN)
    for measure in (hooks.spread, hooks.symmetry_gap):
        with pytest.raises(UnsupportedModelError, match="residual stream: wanted one"):
            measure(model, SEEN)  # type: ignore[operator]


def test_a_merged_attention_has_the_encoders_keys_behind_the_decoders() -> None:
    model = built("T5Gemma2ForConditionalGeneration")
    sites = attention_sites(model)
    assert [layer.label for layer in sites] == [
        *(f"E{i}" for i in range(4)),
        "D0",
        "D1",
        "D2",
        "D3",
    ]
    report = collapse_probe(model, SEEN, decoder_tokens=READ, sparse=0.4, progress=False)
    rows = report.fragile(2000)
    merged = rows[rows.label.str.startswith("D") & (rows.key_pos >= 11)]
    assert len(merged) > 3
    for row in merged.itertuples():
        assert row.key_token == str(int(SEEN[row.prompt, row.key_pos - 11]))
        assert row.query_token == str(int(READ[row.prompt, row.query_pos]))


@pytest.mark.parametrize("name", BESIDE)
def test_which_keys_are_tokens_must_be_known(name: str) -> None:
    """Under padding the keys beside the tokens' have no place of their own, nor in cached steps."""
    model = built(name)
    mask = torch.ones_like(SEEN)
    mask[0, :3] = 0
    words = "keys beside those of the tokens: wanted whole sequences without padding; got"
    noise = NormNoise(sigma=0.1, on="k")
    with noise.applied(model, attention_mask=mask), pytest.raises(ValueError, match=words):
        logits(model, SEEN, attention_mask=mask)
    if name.startswith("Deepseek"):
        with noise.applied(model), pytest.raises(ValueError, match="generate with a cache: wanted"):
            model.generate(SEEN[:1], max_new_tokens=3, verbose=False, stop_at_eos=False)


@pytest.mark.parametrize("name", ["LEDForConditionalGeneration", "LongT5ForConditionalGeneration"])
def test_attention_over_windows_is_left_out_by_name(name: str) -> None:
    model = built(name)
    sites = attention_sites(model)
    assert [n for n, _ in sites.left_out] == ["encoder_blocks.0.attn", "encoder_blocks.1.attn"]
    assert {layer.label[0] for layer in sites} == {"D", "X"}
    assert "over windows" in sites.describe()
    report = collapse_probe(model, SEEN, decoder_tokens=READ, sparse=0.4, progress=False)
    assert report.n_sparse > 10
    assert "encoder_blocks.0.attn and 1 alike" in str(report)


def test_a_pass_that_is_broken_off_inside_the_context_leaves_the_next_one_right() -> None:
    model = built("JetMoeForCausalLM")
    noise = NormNoise(sigma=0.3)
    with noise.applied(model):
        noisy = logits(model)

    def stop(tensor: Tensor, hook: Any) -> None:
        raise KeyError

    with noise.applied(model):
        with pytest.raises(KeyError), model.hooks(fwd_hooks=[("blocks.0.attn.kv.hook_out", stop)]):
            logits(model)
        assert torch.equal(logits(model), noisy)
        with pytest.raises(KeyError), model.hooks(fwd_hooks=[("blocks.0.attn.kv.hook_out", stop)]):
            logits(model)


def test_attentions_that_nothing_tells_apart_are_left_out_by_name() -> None:
    """A block without a hook in its attention that takes it twice in a pass."""
    model = built("RecurrentGemmaForCausalLM")
    block = model.original_model.model.layers[2]
    attention = getattr(block, "original_component", block).temporal_block
    once = attention.forward

    def twice(*given: Any, **named: Any) -> Any:
        named |= dict.fromkeys({"past_key_values", "cache"} & named.keys())  # 5.23's name, 5.24's
        once(*given, **named)
        return once(*given, **named)

    attention.forward = twice
    got = "got blocks.2 left out, as it takes several attentions"
    with pytest.raises(UnsupportedModelError, match=f"wanted an attention with a row .*; {got}"):
        attention_sites(model)
