"""Models that are no plain decoder: encoders and decoders, images, sound, sinks, hidden norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooks import CollapseReport, NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from tests.support import builders
from tests.support.watching import keeps_cache, shape_checks_off

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)

SEEN = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(1))
READ = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(2))


def built(name: str, heads: str | None = None, **options: Any) -> Any:
    return builders.build(name, heads, **options).model


def logits(model: Any, noise: NormNoise | None, read: torch.Tensor = READ) -> torch.Tensor:
    entries = [] if noise is None else noise.hooks(model)
    with torch.no_grad(), model.hooks(fwd_hooks=entries):
        out: torch.Tensor = model(SEEN, decoder_input_ids=read)
    return out


# -- encoder-decoders -------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["T5ForConditionalGeneration", "BartForConditionalGeneration"]
)
def seq2seq(request: pytest.FixtureRequest) -> Any:
    start = {"decoder_start_token_id": 2} if request.param.startswith("T5") else {}
    return built(request.param, **start)


def test_each_attention_has_a_name(seq2seq: Any) -> None:
    sites = attention_sites(seq2seq)
    assert [s.label for s in sites] == ["E0", "E1", "D0", "X0", "D1", "X1"]
    assert [s.layer for s in sites] == list(range(6))
    assert sites.layer(3).prefix == "decoder_blocks.0.cross_attn"
    assert [sites.layer(3).sequence(role) for role in "qkv"] == ["target", "source", "source"]
    assert "cross-attention" in sites.describe()
    assert list(sites.to_frame()["label"].unique()) == [s.label for s in sites]


def test_rows_and_keys_are_of_the_sequence_they_belong_to(seq2seq: Any, tmp_path: Path) -> None:
    report = collapse_probe(seq2seq, SEEN, decoder_tokens=READ, sparse=0.5, draws=0)
    n_source, n_target = SEEN.shape[1], READ.shape[1]
    expected = {"E": n_source, "D": n_target - 1, "X": n_target}  # D's first row has one key
    for i, label in enumerate(report.model["labels"]):
        assert (report.examined[i] == expected[label[0]]).all(), label
        assert (report.single_key[i] == (label[0] == "D")).all()
    rows = report.fragile(10_000)
    for row in rows.to_dict("records"):
        query, key = {
            "E": (report.tokens, report.tokens),
            "D": (report.decoder_tokens, report.decoder_tokens),
            "X": (report.decoder_tokens, report.tokens),
        }[row["label"][0]]
        assert row["query_token"] == query[row["prompt"]][row["query_pos"]]
        for end in ("key", "jump"):
            assert row[f"{end}_token"] == key[row["prompt"]][row[f"{end}_pos"]]
    assert set(rows["label"].str[0]) == {"E", "D", "X"}
    loaded = CollapseReport.load(report.save(tmp_path / "report.safetensors"))
    assert loaded.decoder_tokens == report.decoder_tokens
    pd.testing.assert_frame_equal(loaded.fragile(50), report.fragile(50))


def test_without_tokens_the_decoder_reads_the_prompt_after_its_start(seq2seq: Any) -> None:
    start = seq2seq.original_model.config.decoder_start_token_id
    shifted = torch.cat([torch.full((3, 1), start), SEEN[:, :-1]], dim=1)
    settings: dict[str, Any] = {"sparse": 0.5, "draws": 0, "sigmas": [0.3]}
    default = collapse_probe(seq2seq, SEEN, **settings)
    given = collapse_probe(seq2seq, SEEN, decoder_tokens=shifted, **settings)
    named = collapse_probe(seq2seq, {"input_ids": SEEN, "decoder_input_ids": shifted}, **settings)
    for other in (given, named):
        np.testing.assert_array_equal(default.rows, other.rows)
        np.testing.assert_allclose(default.loose, other.loose, atol=1e-6)
        assert default.decoder_tokens == other.decoder_tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_changes_no_factor(side: str) -> None:
    """T5's positions are relative: padded, masked and noised, it says what it says unpadded."""
    model = built("T5ForConditionalGeneration", decoder_start_token_id=2)
    blank, real = torch.full((3, 4), 5), torch.ones_like(SEEN)
    order = slice(None, None, 1 if side == "right" else -1)
    seen = torch.cat([SEEN, blank][order], dim=1)
    mask = torch.cat([real, torch.zeros_like(blank)][order], dim=1)
    noise = NormNoise(sigma=0.3, on="qkv", seed=4)
    outs = []
    for ids, masks in ((SEEN, {}), (seen, {"attention_mask": mask})):
        entries = noise.hooks(model, **masks)
        with torch.no_grad(), model.hooks(fwd_hooks=entries):
            outs.append(model(ids, decoder_input_ids=READ, **masks))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)
    assert (outs[0] - logits(model, None)).abs().max() > 0.01
    wrong = noise.hooks(model)  # positions counted from the padding: other factors
    with torch.no_grad(), model.hooks(fwd_hooks=wrong):
        other = model(seen, decoder_input_ids=READ, attention_mask=mask)
    assert bool((other - outs[0]).abs().max() > 0.01) == (side == "left")


def test_the_decoder_has_a_mask_of_its_own() -> None:
    model = built("BartForConditionalGeneration")
    noise = NormNoise(sigma=0.3, on="qkv", seed=4)
    mask = torch.ones_like(READ)
    mask[:, -3:] = 0
    padded = noise.hooks(model, decoder_attention_mask=mask)
    with torch.no_grad(), model.hooks(fwd_hooks=padded):
        out = model(SEEN, decoder_input_ids=READ, decoder_attention_mask=mask)
    alone = logits(model, noise, READ[:, :-3])
    torch.testing.assert_close(out[:, :-3], alone, atol=1e-4, rtol=1e-4)


def test_noise_keeps_to_its_stack(seq2seq: Any) -> None:
    """The encoder does not see the decoder's noise; the decoder sees the encoder's."""
    z = [f"encoder_blocks.{i}.attn.hook_z" for i in (0, 1)]
    clean, noisy = [], []
    for kept, noise in ((clean, None), (noisy, NormNoise(sigma=0.4, layers=(2, 3, 4, 5)))):
        entries = [] if noise is None else noise.hooks(seq2seq)
        keep = [(name, lambda t, hook, kept=kept: kept.append(t.clone())) for name in z]
        with torch.no_grad(), seq2seq.hooks(fwd_hooks=entries + keep):
            out = seq2seq(SEEN, decoder_input_ids=READ)
        kept.append(out)
    assert all(torch.equal(a, b) for a, b in zip(clean[:-1], noisy[:-1], strict=True))
    assert (clean[-1] - noisy[-1]).abs().max() > 0.01
    encoder_only = logits(seq2seq, NormNoise(sigma=0.4, layers=(0, 1)))
    assert (encoder_only - clean[-1]).abs().max() > 0.01


def test_generation_keeps_each_factor(seq2seq: Any) -> None:
    """A token keeps its factor from step to step: with a cache and without, the same text."""
    noise = NormNoise(sigma=1.5, on="qkv", law="lognormal", seed=1)

    def text(cached: bool) -> torch.Tensor:
        length = {"max_new_tokens": 6, "min_new_tokens": 6}
        out: torch.Tensor = seq2seq.original_model.generate(
            SEEN[:1], **length, do_sample=False, use_cache=cached
        )
        return out

    kept = keeps_cache(seq2seq)
    with noise.applied(seq2seq), torch.no_grad():
        noised = text(False)
        if kept:
            assert torch.equal(noised, text(True))
        else:
            with pytest.raises(UnsupportedModelError, match="generate with a cache: wanted"):
                text(True)
    assert not torch.equal(noised, text(False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_tokens": READ[:2]}, "decoder_tokens: wanted one for each of 3 prompts; got 2"),
        ({"decoder_tokens": READ + 1000}, "decoder's prompt 0: wanted token ids from 0 to 96"),
    ],
)
def test_decoder_tokens_that_do_not_fit(seq2seq: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse_probe(seq2seq, SEEN, **options)


def test_a_decoder_alone_takes_no_second_sequence() -> None:
    model = built("LlamaForCausalLM", "gqa")
    with pytest.raises(ValueError, match="decoder_tokens: wanted an encoder-decoder model"):
        collapse_probe(model, SEEN, decoder_tokens=READ)
    with pytest.raises(ValueError, match="decoder_attention_mask: wanted an encoder-decoder"):
        NormNoise(sigma=0.1).hooks(model, decoder_attention_mask=torch.ones_like(SEEN))
    with pytest.raises(
        ValueError, match=r"inputs: wanted 'input_ids' among them; got \['pixels'\]"
    ):
        collapse_probe(model, {"pixels": SEEN})


# -- images and sound -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ViTForImageClassification", "pixel_values"),
        ("HubertForCTC", "input_values"),
        ("ASTForAudioClassification", "input_values"),
    ],
)
def test_pictures_and_sound(name: str, key: str) -> None:
    made = builders.build(name)
    (signal,), _ = made.inputs(2, 15, 0)
    report = collapse_probe(made.model, signal, sparse=0.4, draws=0)
    assert report.rows.shape[2] == 2
    assert report.n_sparse > 0
    # The two are copies: each head counts the same in both.
    np.testing.assert_array_equal(report.rows[:, :, 0], report.rows[:, :, 1])
    named = collapse_probe(made.model, {key: signal}, sparse=0.4, draws=0)
    np.testing.assert_array_equal(named.rows, report.rows)
    row = report.fragile(1).iloc[0]
    assert row["query_token"] == str(row["query_pos"])
    assert report.summary()
    with pytest.raises(ValueError, match=f"{key}: wanted .* axes"):
        collapse_probe(made.model, torch.zeros(1, 1, 1, 1, 5))
    with pytest.raises(TypeError, match="wanted integer ids"):
        collapse_probe(built("LlamaForCausalLM"), signal)


# -- what no hook shows -----------------------------------------------------------------------


def test_a_hidden_norm_leaves_the_probe_and_the_noise_of_a_context() -> None:
    """Llama 4 norms its rotary layers behind every hook: hooks alone can't noise them."""
    model = built("Llama4ForCausalLM", "gqa")
    sites = attention_sites(model)
    hidden = [s.layer for s in sites if not s.q.dot.hooked]
    assert hidden == [0, 2]
    assert {sites.layer(i).q.shield for i in hidden} == {"removed"}
    report = collapse_probe(model, SEEN, sparse=0.4, draws=0)
    assert (report.rows.sum((1, 2, 3)) > 0).all()
    with pytest.raises(UnsupportedModelError, match="layer 0: noise on k: wanted a hook point"):
        NormNoise(sigma=0.1, on="k").hooks(model)
    assert NormNoise(sigma=0.1, on="k", layers=(1, 3)).hooks(model)
    assert NormNoise(sigma=0.1, on="v").hooks(model)
    clean = model(SEEN)
    with NormNoise(sigma=0.1, on="k", layers=(0,)).applied(model):
        assert (model(SEEN) - clean).abs().max() > 1e-3
    assert "noised by NormNoise.applied" in sites.describe()


def test_a_sink_is_a_score_of_its_own() -> None:
    """Its score is the model's parameter, whatever the rows hold."""
    model = built("GptOssForCausalLM", "gqa")
    for layer in attention_sites(model):
        attention = model.original_model.model.layers[layer.layer].self_attn
        attention = getattr(attention, "original_component", attention)
        assert layer.sink == pytest.approx(attention.sinks.tolist(), abs=1e-3)


def test_bridges_that_are_another_model_are_refused() -> None:
    for options in (
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        {"alibi": True},
    ):
        model = built("FalconForCausalLM", "mha", **options)
        with pytest.raises(UnsupportedModelError, match="the bridge computes the model"):
            attention_sites(model)


@pytest.mark.filterwarnings("ignore:.*does not support")
@pytest.mark.parametrize(
    ("name", "heads", "options"),
    [
        ("GptOssForCausalLM", "gqa", {}),
        ("BitNetForCausalLM", "gqa", {}),
        ("FalconH1ForCausalLM", "mha", {}),
        ("Qwen2MoeForCausalLM", "gqa", {"shared_expert_intermediate_size": 32}),
    ],
)
def test_what_compatibility_mode_changes_is_refused(
    name: str, heads: str, options: dict[str, Any]
) -> None:
    """As loaded it is measured; `tests/project/traps` shows that the other is another model."""
    model = built(name, heads, **options)
    assert attention_sites(model)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UnsupportedModelError, match=r"as loaded; got compatibility mode, which"):
        attention_sites(model)


def test_shared_experts_of_another_width_keep_their_model_in_compatibility_mode() -> None:
    model = built("Qwen2MoeForCausalLM", "gqa", shared_expert_intermediate_size=48)
    model.enable_compatibility_mode(disable_warnings=True)
    assert attention_sites(model)


def test_models_without_hooks_and_without_attention_are_told_apart() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        attention_sites(built("MambaForCausalLM"))
    (layer,) = attention_sites(built("NemotronHForCausalLM"))
    assert layer.bare
    assert layer.block == "blocks.2"


def test_a_projection_that_holds_gates_too_is_no_place_for_noise() -> None:
    model = built("Qwen3NextForCausalLM", "gqa")
    assert {s.averaging for s in attention_sites(model)} == {"gated"}
    assert NormNoise(sigma=0.1, on="q").hooks(model)
    with pytest.raises(UnsupportedModelError, match="it holds something else beside them"):
        NormNoise(sigma=0.1, on="q", at="projection").hooks(model)


# -- attention that is left out ---------------------------------------------------------------


def with_image() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of text and images, and a prompt in which 16 tokens stand for an image."""
    model = built("LlavaForConditionalGeneration", image_token_id=5)
    ids = torch.randint(10, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = 5
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "pixel_values": image}


def test_an_attention_that_does_not_run_is_named() -> None:
    """The vision tower: its attention has hooks, which text leaves silent and an image does not."""
    model, prompt = with_image()
    tower = tuple(f"vision_encoder.encoder_layers.{i}.attn" for i in (0, 1))
    assert all(f"{name}.hook_attn_scores" in model.hook_dict for name in tower)
    on_text = attention_sites(model)
    assert (on_text.silent, on_text.outside) == (tower, ())
    on_image = attention_sites(model, prompt)
    assert (on_image.silent, on_image.outside) == ((), tower)
    for sites in (on_text, on_image):
        assert [s.prefix for s in sites] == ["blocks.0.attn", "blocks.1.attn"]
    # Said in the same words, or reports of text and of images could not be merged.
    assert on_text.describe() == on_image.describe()
    assert "vision_encoder.encoder_layers.0.attn and 1 alike" in on_text.describe()
    assert "vision_encoder" in str(collapse_probe(model, SEEN, sparse=0.4, draws=0))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3NextForCausalLM"])
def test_where_every_attention_runs_none_is_named(name: str) -> None:
    """Layers of linear attention have no softmax, and so nothing to leave out."""
    model = built(name)
    sites = attention_sites(model)
    assert (sites.silent, sites.outside) == ((), ())
    assert "Left out" not in sites.describe()
    declared = {n.removesuffix(".hook_pattern") for n in model.hook_dict if n.endswith("_pattern")}
    assert {s.prefix for s in sites} == declared


def test_names_that_are_left_out_are_told_together() -> None:
    sites = attention_sites(built("LlamaForCausalLM"))
    names = ("tower.10.attn", "tower.9.attn", "tower.2.attn", "pool.attn")
    left = replace(sites, silent=names[:2], outside=names[2:])
    assert left.describe().endswith(": pool.attn, tower.2.attn and 2 alike.")


# -- what users hand over ---------------------------------------------------------------------


def test_a_decoder_keeps_a_start_token_that_is_the_pad_token(monkeypatch: Any) -> None:
    """T5's decoder starts with its pad token: a tensor is what a list of the same ids is."""
    monkeypatch.setattr("hooks.model.token_rows.own_pad_token", lambda model: 0)
    model = built("T5ForConditionalGeneration", decoder_start_token_id=0)
    read = torch.cat([torch.zeros(3, 1, dtype=torch.long), READ], dim=1)
    settings: dict[str, Any] = {"sparse": 0.5, "draws": 0, "sigmas": [0.3]}
    tensor, ids = (
        collapse_probe(model, SEEN, decoder_tokens=given, **settings)
        for given in (read, read.tolist())
    )
    assert tensor.decoder_tokens == ids.decoder_tokens
    assert {len(row) for row in tensor.decoder_tokens} == {read.shape[1]}
    np.testing.assert_array_equal(tensor.rows, ids.rows)


def test_a_decoders_padding_is_cut_like_an_encoders() -> None:
    model = built("BartForConditionalGeneration")
    mask = torch.ones_like(READ)
    mask[1, 5:] = 0
    settings: dict[str, Any] = {"sparse": 0.5, "draws": 0, "sigmas": [0.3]}
    padded = collapse_probe(
        model,
        {"input_ids": SEEN, "decoder_input_ids": READ, "decoder_attention_mask": mask},
        **settings,
    )
    cut = [READ[0], READ[1][:5], READ[2]]
    alone = collapse_probe(model, SEEN, decoder_tokens=cut, **settings)
    np.testing.assert_array_equal(padded.rows, alone.rows)
    assert padded.decoder_tokens == alone.decoder_tokens


def test_what_a_tokenizer_gives_with_padding() -> None:
    """token_type_ids have the tokens' positions and are cut with them."""
    model = built("BertForMaskedLM")
    mask = torch.ones_like(SEEN)
    mask[1, 9:] = 0
    given = {"input_ids": SEEN, "token_type_ids": SEEN * 0, "attention_mask": mask}
    settings: dict[str, Any] = {"sparse": 0.5, "draws": 0, "sigmas": [0.3]}
    report = collapse_probe(model, given, **settings)
    assert report.padding.tolist() == [0, SEEN.shape[1] - 9, 0]
    alone = collapse_probe(model, [SEEN[0], SEEN[1][:9], SEEN[2]], **settings)
    np.testing.assert_array_equal(report.rows, alone.rows)


def test_text_with_an_image_whose_patches_are_no_prompts() -> None:
    model = built(
        "Qwen2_5_VLForConditionalGeneration",
        image_token_id=5,
        vision_start_token_id=4,
        video_token_id=3,
    )
    ids = torch.randint(10, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 2:6] = 5
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with_image = collapse_probe(model, {"input_ids": ids, **image}, sparse=0.5, draws=0)
    assert with_image.n_sparse > 10
    without = collapse_probe(model, {"input_ids": ids}, sparse=0.5, draws=0)
    assert (with_image.level != without.level).any()
    two = {"input_ids": ids.expand(2, -1), **image}
    with pytest.raises(ValueError, match="wanted 'pixel_values' with an entry for each of 2"):
        collapse_probe(model, two)


@pytest.mark.parametrize("name", ["ours", "MistralForCausalLM"])
def test_generation_with_any_cache_keeps_each_factor(name: str) -> None:
    """Our own cache, and a window that is shorter than what was seen."""
    from qkvnorm_lens import load_checkpoint

    ours = name == "ours"
    model = load_checkpoint("addition-pre") if ours else built(name, sliding_window=4)
    start = model.to_tokens("[15+8=") if ours else SEEN[:1, :6]
    noise = NormNoise(sigma=1.5, on="qkv", law="lognormal", seed=3)

    def text(cached: bool) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            start,
            max_new_tokens=7,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=cached,
        )
        return out

    kept = keeps_cache(model)
    with noise.applied(model), torch.no_grad():
        noised = text(False)
        if kept:
            assert torch.equal(noised, text(True))
        else:
            with pytest.raises(UnsupportedModelError, match="generate with a cache: wanted"):
                text(True)
    assert not torch.equal(noised, text(False))


def test_saturated_attention_is_verified_by_its_scores() -> None:
    """Where no noise moves a weight, the scores show that it lands."""
    model = built("GPT2LMHeadModel")
    for block in model.original_model.transformer.h:
        for part in ("q", "k"):
            component = getattr(block.attn, part)
            component = getattr(component, "original_component", component)
            component.weight.data *= 30
            component.bias.data *= 30
    sites = attention_sites(model)
    assert sites.check["check"].str.startswith("scores under").any()
    report = collapse_probe(model, SEEN, draws=0)
    assert report.to_frame("model")["score_level"].iloc[0] > 1000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: collapse_probe("gpt2", SEEN),
            TypeError,
            "TransformerBridge .* got str",
        ),
        (lambda m: attention_sites(m.original_model), TypeError, "wanted a TransformerBridge"),
        (lambda m: collapse_probe(m, SEEN, layers=1), ValueError, "indices in a list.* got 1"),
        (lambda m: collapse_probe(m, SEEN, layers=[True]), ValueError, "indices in a list"),
        (lambda m: collapse_probe(m, SEEN, sigmas=0.1), TypeError, "wanted a list of numbers"),
        (lambda m: collapse_probe(m, SEEN, sigmas="0.1"), TypeError, "wanted a list of numbers"),
        (
            lambda m: collapse_probe(m, SEEN, draws=2.5),
            ValueError,
            "wanted an integer .* got 2.5",
        ),
        (
            lambda m: collapse_probe(m, SEEN, prepend_bos=True),
            ValueError,
            "prepend_bos: wanted",
        ),
        (lambda m: collapse_probe(m, b"abc"), TypeError, "wanted text or token ids; got bytes"),
        (
            lambda m: collapse_probe(
                m,
                {"input_ids": SEEN, "attention_mask": torch.ones_like(SEEN)},
                attention_mask=torch.ones_like(SEEN),
            ),
            ValueError,
            "attention_mask: wanted it once",
        ),
        (
            lambda m: NormNoise(sigma=0.1).hooks(m, attention_mask=torch.ones(12)),
            ValueError,
            r"of shape \[batch, pos\]; got shape \[12\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call: Any, error: Any, message: str) -> None:
    model = built("GPT2LMHeadModel")
    with shape_checks_off(), pytest.raises(error, match=message):
        call(model)


def test_layers_may_be_an_array() -> None:
    model = built("GPT2LMHeadModel")
    some: Any = np.array([0, 1])
    with shape_checks_off():
        assert collapse_probe(model, SEEN, layers=some, draws=0).settings.layers == (0, 1)
        assert NormNoise(sigma=0.1, layers=some).layers == (0, 1)


def test_a_mask_of_another_length_is_refused() -> None:
    model = built("GPT2LMHeadModel")
    noise = NormNoise(sigma=0.1)
    entries = noise.hooks(model, attention_mask=torch.ones(3, 5).long())
    with (
        model.hooks(fwd_hooks=entries),
        pytest.raises(ValueError, match="wanted an entry for each of 17 positions; got 5"),
    ):
        model(SEEN)


def test_other_weights_are_another_model() -> None:
    first = collapse_probe(builders.build("GPT2LMHeadModel", seed=0).model, SEEN, draws=0)
    other = builders.build("GPT2LMHeadModel", seed=7).model
    with pytest.raises(ValueError, match="wanted reports of one model; got fingerprint"):
        first.merge(collapse_probe(other, SEEN, draws=0, first_prompt=3))


def test_a_refusal_names_the_hooks_that_are_on_the_attention() -> None:
    def ablate(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return pattern * torch.tensor([0.0, 1, 1, 1])[:, None, None]

    model = built("GPT2LMHeadModel")
    with (
        model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", ablate)]),
        pytest.raises(UnsupportedModelError, match=r"hooks of yours are on blocks\.0\.attn"),
    ):
        collapse_probe(model, SEEN)
    # The other way round both act.
    noise = NormNoise(sigma=0.3)
    with noise.applied(model), torch.no_grad():
        noised = model(SEEN)
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", ablate)]):
            both = model(SEEN)
    assert (both - noised).abs().max() > 0.01
