"""hooks.spread: laws of the spread, held against plain numpy on models of several kinds."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

import hooks
from hooks import SpreadReport, UnsupportedModelError
from hooks.measures.spread.report import weighted_quantile
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.watching import Found, shape_checks_off, tiny_gemma2, watch

ids = models.tokens(3, 17)
ALL = ("stream", "q", "k", "v")


def ours(placement: str = "pre", **options: Any) -> QKVNormTransformer:
    """A small model of ours with enlarged queries and keys, so that attention is uneven."""
    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 32, "d_vocab": 97}
    cfg = QKVNormConfig(placement=placement, d_mlp=20, seed=3, **{**sizes, **options})
    model = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.arange(len(parameter)))
    return model


KINDS: dict[str, Any] = {
    **models.TINY,
    "gemma2": tiny_gemma2,
    "ours-pre": lambda: to_bridge(ours("pre")),
    "ours-qkv": lambda: to_bridge(ours("qkv")),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]().double()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.tiny_gpt2()


# -- an independent computation ---------------------------------------------------------------


def by_definition(norm: np.ndarray, weight: np.ndarray, share: float) -> dict[str, float]:
    """Median, band and quantiles of one head, token by token."""

    def quantile(x: np.ndarray, p: float) -> float:
        so_far = 0.0
        for value, mass in sorted(zip(x, weight, strict=True)):
            so_far += mass
            if so_far >= p * weight.sum() * (1 - 1e-9):
                return float(value)
        raise AssertionError

    median = quantile(norm, 0.5)
    return {
        "median": median,
        "band": quantile(abs(norm / median - 1), share),
        "low": quantile(norm / median, (1 - share) / 2),
        "high": quantile(norm / median, (1 + share) / 2),
    }


@pytest.mark.parametrize("of", ALL)
def test_equals_a_plain_computation(model: Any, of: str) -> None:
    report = hooks.spread(model, ids, of=of, progress=False)
    frame = report.to_frame(share=0.8)
    for sites in hooks.attention_sites(model):
        block = sites.prefix.rpartition(".")[0]
        # Rotary embedding keeps lengths: keys are looked at before it, where no norm follows.
        site = None
        if of != "stream":
            of_vector = sites.vector(of)
            site = of_vector.projection if of_vector.shield == "none" else of_vector.dot
        name = f"{block}.hook_in" if site is None else site.hook
        seen = watch(model, ids, [name, sites.pattern])
        pattern = seen[sites.pattern].numpy()
        vectors = seen[name][:, :, None] if site is None else site.by_position(seen[name])
        norms = np.sqrt((vectors.numpy() ** 2).sum(-1))  # [batch, pos, vector]
        for head in range(sites.n_heads):
            norm = norms[:, 1:, head // (sites.n_heads // norms.shape[2])].ravel()
            received = pattern[:, head].sum(1)
            weight = np.ones_like(norm) if of == "q" else received[:, 1:].ravel()
            wanted = by_definition(norm, weight, 0.8)
            got = frame[frame["label"] == f"{sites.label}H{head}"].iloc[0]
            for column, value in wanted.items():
                assert got[column] == pytest.approx(value, rel=1e-5, abs=1e-6), column
            assert got["weight"] == pytest.approx(weight.sum(), rel=1e-5)
            if of != "q":
                share = received[:, 0].sum() / received.sum()
                assert got["first_share"] == pytest.approx(share, rel=1e-5)


# -- the weighted quantile --------------------------------------------------------------------


@given(
    pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 6)), min_size=1, max_size=12),
    twentieths=st.integers(0, 20),
)
def test_integer_weights_repeat_their_numbers(
    pairs: list[tuple[int, int]], twentieths: int
) -> None:
    x, weight = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    got = weighted_quantile(x, weight, twentieths / 20)
    repeated = np.sort(np.repeat(x, weight.astype(int)))
    if not len(repeated):
        assert np.isnan(got)
        return
    at = ceil(Fraction(twentieths, 20) * len(repeated)) - 1
    assert got == repeated[max(at, 0)]


@given(st.floats(0.1, 10), st.floats(0.01, 100), st.floats(0.0, 1.0))
def test_a_quantile_knows_no_unit_of_weight_and_scales_with_x(
    c: float, unit: float, p: float
) -> None:
    x, weight = np.array([3.0, 1.0, 2.0, 5.0]), np.array([0.5, 2.0, 0.1, 1.0])
    at = weighted_quantile(x, weight, p)
    assert weighted_quantile(x, unit * weight, p) == at
    assert weighted_quantile(c * x, weight, p) == pytest.approx(c * at)


# -- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["stream", "k", "v"])
def test_weights_are_the_attention_that_the_queries_give(model: Any, of: str) -> None:
    report = hooks.spread(model, ids, of=of, progress=False)
    assert set(report.to_frame("token")["prompt"]) == {0, 1, 2}
    for weight, prompt in zip(report.weights, report.prompt, strict=True):
        for i in range(3):
            np.testing.assert_allclose(weight[:, prompt == i].sum(1), ids.shape[1], rtol=1e-5)
    whole = report.to_frame()
    everything = whole["weight"] / (1 - whole["first_share"])
    np.testing.assert_allclose(everything, ids.numel(), rtol=1e-5)


def test_equal_lengths_have_no_spread() -> None:
    """Embeddings of one length and no positions: the first layer's stream has one length."""
    plain = ours(positional_embedding_type="none")
    with torch.no_grad():
        weight = plain.get_parameter("tok_embed.weight")
        weight.mul_(3 / weight.norm(dim=1, keepdim=True))
    first, second = hooks.spread(to_bridge(plain), ids, progress=False).to_frame("layer").iloc
    assert first["median"] == pytest.approx(3, rel=1e-6)
    assert first["first_norm"] == pytest.approx(1, rel=1e-6)
    assert first["band"] < 1e-6
    assert second["band"] > 1e-3


def test_the_band_of_two_lengths_is_where_the_weight_is() -> None:
    """Two tokens of ten are twice as long; every token attends to itself alone."""
    plain = ours("none", positional_embedding_type="none", n_layers=1, window_size=1)
    with torch.no_grad():
        weight = plain.get_parameter("tok_embed.weight")
        weight.mul_(1 / weight.norm(dim=1, keepdim=True))
        weight[:10].mul_(2)
    prompt = torch.tensor([70, 50, 51, 4, 53, 54, 55, 56, 57, 1, 60])  # 70, the first, is apart
    report = hooks.spread(to_bridge(plain), prompt, progress=False)
    for share, band in ((0.5, 0), (0.8, 0), (0.81, 1), (1.0, 1)):
        frame = report.to_frame("model", share=share).iloc[0]
        assert frame["band"] == pytest.approx(band, abs=1e-6)
        assert frame["median"] == pytest.approx(1, rel=1e-6)
        assert frame["tokens"] == 2 * 10
        assert frame["high"] == pytest.approx(2 if share > 0.6 else 1, rel=1e-6)
        assert frame["low"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_the_spread_knows_no_unit_of_length(factor: float) -> None:
    """Everything that writes to the stream c times as large: Pre-Norm attends as before."""
    reports = []
    for c in (1.0, factor):
        plain = ours(eps=1e-12, positional_embedding_type="none").double()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                writes = ("tok_embed", "attn.o.", "fc_out")
                if any(part in name for part in writes):
                    parameter.mul_(c)
        reports.append(hooks.spread(to_bridge(plain), ids, progress=False).to_frame())
    one, other = reports
    np.testing.assert_allclose(other["median"], factor * one["median"], rtol=1e-5)
    for column in ("band", "low", "high", "first_norm", "first_share", "weight"):
        np.testing.assert_allclose(other[column], one[column], rtol=1e-4, atol=1e-6)


def test_heads_of_one_key_value_head_share_its_lengths() -> None:
    report = hooks.spread(models.tiny_llama(), ids, of="k", progress=False)
    tokens = report.to_frame("token").pivot_table(
        index=["layer", "prompt", "position"], columns="head", values="norm"
    )
    assert report.norms[0].shape[0] == 2
    assert tokens[0].equals(tokens[1].rename(0))
    assert tokens[2].equals(tokens[3].rename(2))
    assert not np.allclose(tokens[0], tokens[2])


def test_pooled_frames_are_the_heads_tokens_over_their_medians(model: Any) -> None:
    report = hooks.spread(model, ids, progress=False)
    tokens = report.to_frame("token")
    tokens = tokens[tokens["position"] > 0]
    for by, groups in (("layer", tokens.groupby("layer")), ("model", [(0, tokens)])):
        for (_, of), (_, got) in zip(groups, report.to_frame(by).iterrows(), strict=True):
            for column, p in (("low", 0.05), ("high", 0.95)):
                inside = of["weight"][of["relative"] <= got[column] * (1 + 1e-9)].sum()
                below = of["weight"][of["relative"] < got[column] * (1 - 1e-9)].sum()
                total = of["weight"].sum()
                assert below <= p * total * (1 + 1e-9)
                assert inside >= p * total * (1 - 1e-9)
            held = of["weight"][(of["relative"] - 1).abs() <= got["band"] * (1 + 1e-9)].sum()
            assert held >= 0.9 * of["weight"].sum() * (1 - 1e-9)


def test_batches_and_padding_do_not_matter(gpt2: Any) -> None:
    prompts = [ids[0, :9].tolist(), ids[1].tolist(), ids[2, :9].tolist()]
    one = hooks.spread(gpt2, prompts, batch_size=1, progress=False)
    other = hooks.spread(gpt2, prompts, batch_size=8, progress=False)
    padded = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, (prompt, at) in enumerate(zip(prompts, (0, 3, 11), strict=True)):
        padded[i, at : at + len(prompt)] = torch.tensor(prompt)
        mask[i, at : at + len(prompt)] = 1
    third = hooks.spread(gpt2, padded, attention_mask=mask, progress=False)
    for later in (other, third):
        pd.testing.assert_frame_equal(one.to_frame(), later.to_frame(), rtol=1e-4)
        assert [p.tolist() for p in one.position] == [p.tolist() for p in later.position]


def test_the_first_token_is_apart(gpt2: Any) -> None:
    """Only the first token's length changes what is said of it."""
    apart = hooks.spread(gpt2, ids, progress=False)
    within = hooks.spread(gpt2, ids, without_first=False, progress=False)
    assert apart.to_frame()["weight"].sum() < within.to_frame()["weight"].sum()
    np.testing.assert_allclose(within.to_frame()["weight"], ids.numel(), rtol=1e-5)
    tokens = apart.to_frame("token")
    first = tokens[tokens["position"] == 0]
    share = first["weight"].sum() / tokens["weight"].sum()
    assert apart.to_frame("model")["first_share"].iloc[0] == pytest.approx(share)


def test_tapped_layers_say_the_same() -> None:
    """sdpa makes no pattern: it is made from what the fused attention was given."""
    cfg = ours().cfg
    plain = ours()
    fused = QKVNormTransformer(
        QKVNormConfig.from_json({**cfg.to_json(), "attn_implementation": "sdpa"})
    ).eval()
    fused.load_state_dict(plain.state_dict())
    one, other = to_bridge(plain), to_bridge(fused)
    assert [s.tapped for s in hooks.attention_sites(other)] == [True] * 2
    for of in ALL:
        a, b = (hooks.spread(m, ids, of=of, progress=False).to_frame() for m in (one, other))
        pd.testing.assert_frame_equal(a, b, rtol=1e-4)


# -- the report -----------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(model: Any, tmp_path: Path) -> None:
    report = hooks.spread(model, ids, of="k", layers=[1], without_first=False, progress=False)
    again = SpreadReport.load(report.save(tmp_path / "deep" / "spread.safetensors"))
    assert again.settings == report.settings
    assert again.tokens == report.tokens
    assert again.summary() == report.summary()
    for by in ("token", "head", "layer", "model"):
        pd.testing.assert_frame_equal(again.to_frame(by), report.to_frame(by), check_exact=True)
    assert set(report.to_frame()["layer"]) == {1}


def test_another_file_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="wanted a spread report"):
        SpreadReport.load(wrong)


def test_the_summary_has_the_frames_numbers(gpt2: Any) -> None:
    report = hooks.spread(gpt2, ids, progress=False)
    text, whole = str(report), report.to_frame("model").iloc[0]
    assert f"within ±{100 * whole['band']:.3g}%" in text
    widest = report.to_frame().set_index("label")["band"]
    assert f"({widest.idxmin()}) to" in text
    assert f"({widest.idxmax()})" in text
    assert "each query once" in str(hooks.spread(gpt2, ids, of="q", progress=False))


def test_two_tokens_that_see_themselves_only_have_no_spread() -> None:
    """A window of one: the first token and the second each attend to themselves."""
    bridge = to_bridge(ours(window_size=1))
    frame = hooks.spread(bridge, ids[:1, :2], progress=False).to_frame()
    assert (frame["tokens"] == 1).all()
    assert (frame["band"] == 0).all()
    assert frame["first_share"].to_numpy() == pytest.approx(0.5)


# -- what is left alone, and what is refused --------------------------------------------------


def test_a_text_is_no_boolean(gpt2: Any) -> None:
    refused = pytest.raises(TypeError, match="without_first: wanted True or False; got 'no'")
    with shape_checks_off(), refused:
        hooks.spread(gpt2, ids, without_first="no", progress=False)


@pytest.mark.parametrize("of", ALL)
def test_the_model_is_left_as_it_was_found(of: str) -> None:
    bridge = models.tiny_llama()
    bridge(ids)  # the first pass sets a bridge up
    bridge.train()
    with shape_checks_off():
        before = Found(bridge)
        hooks.spread(bridge, ids, of=of, progress=False)
        before.assert_same(Found(bridge))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "z"}, "of: wanted one of"),
        ({"layers": [7]}, "layers: wanted one of the attention layers"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1"),
    ],
)
def test_wrong_options_are_refused(gpt2: Any, options: dict[str, Any], message: str) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match=message):
        hooks.spread(gpt2, ids, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"by": "prompt"}, "by: wanted"), ({"share": 0.0}, "share: wanted a share in")],
)
def test_wrong_frames_are_refused(gpt2: Any, options: dict[str, Any], message: str) -> None:
    report = hooks.spread(gpt2, ids, progress=False)
    with shape_checks_off(), pytest.raises(ValueError, match=message):
        report.to_frame(**options)


def test_a_length_that_is_no_number_is_refused(gpt2: Any) -> None:
    def spoil(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(torch.arange(stream.shape[1])[:, None] == 3, torch.inf, stream)

    hooks.attention_sites(gpt2)
    with (
        gpt2.hooks(fwd_hooks=[("blocks.1.hook_in", spoil)]),
        pytest.raises(UnsupportedModelError, match=r"layer 1: spread of stream: wanted finite"),
    ):
        hooks.spread(gpt2, ids, progress=False)


def test_cross_attention_reads_another_stream() -> None:
    t5 = builders.build("T5ForConditionalGeneration").model
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        hooks.spread(t5, ids, decoder_tokens=ids, progress=False)
    frame = hooks.spread(t5, ids, of="v", decoder_tokens=ids, progress=False).to_frame("layer")
    assert {label[0] for label in frame["label"]} == {"E", "D", "X"}
    assert frame["band"].notna().all()
