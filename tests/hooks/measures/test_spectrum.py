"""hooks.spectral_gap: laws of singular values, held against numpy on the models' own attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import hooks
from hooks import SpectrumReport, UnsupportedModelError
from hooks.measures.spectrum.measure import uniform_of
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.watching import Found, shape_checks_off, tiny_gemma2, tiny_opt, watch

ids = models.tokens(3, 17)
HF = {
    "gpt2": (models.tiny_gpt2, GPT2LMHeadModel, models.tiny_gpt2_config),
    "llama": (models.tiny_llama, LlamaForCausalLM, models.tiny_llama_config),
}


def ours(placement: str = "pre", **options: Any) -> QKVNormTransformer:
    """A small model of ours with enlarged queries and keys, so that attention is uneven."""
    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 64, "d_vocab": 97}
    cfg = QKVNormConfig(placement=placement, d_mlp=20, seed=3, **{**sizes, **options})
    model = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn.q" in name or "attn.k" in name:
                parameter.mul_(4.0)
    return model


KINDS: dict[str, Any] = {
    **models.TINY,
    "gemma2": tiny_gemma2,
    "opt": tiny_opt,  # its scores are read where the softmax is taken
    "ours": lambda: to_bridge(ours()),
    "ours, no mask": lambda: to_bridge(ours(attention_dir="bidirectional")),
    "ours, window": lambda: to_bridge(ours(window_size=5)),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.tiny_gpt2()


# -- an independent computation ---------------------------------------------------------------


def by_numpy(pattern: np.ndarray, uniform: np.ndarray, k: int) -> dict[str, float]:
    """What a row of the frame says, of one matrix."""
    s, u, rest = (np.linalg.svd(x, compute_uv=False) for x in (pattern, uniform, pattern - uniform))
    n = len(pattern)
    return {
        **{f"s{i + 1}": s[i] for i in range(k)},
        "gap": s[0] - s[1],
        "ratio": s[1] / s[0],
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "uniform_s1": u[0],
        "uniform_s2": u[1],
        "uniform_gap": u[0] - u[1],
        "left_s1": rest[0],
        "left_s2": rest[1],
        "left_stable_rank": (rest**2).sum() / rest[0] ** 2,
        "edge": 2 / n**0.5,
        "edge_left": 2 * ((rest**2).sum() / n) ** 0.5,
    }


def causal(n: int, window: int = 10**6) -> np.ndarray:
    """The uniform matrix of a causal mask."""
    back = np.arange(n)[:, None] - np.arange(n)
    seen = ((back >= 0) & (back < window)).astype(float)
    return np.asarray(seen / seen.sum(1, keepdims=True))


@pytest.mark.parametrize("name", HF)
def test_equals_numpy_on_hugging_faces_attentions(name: str) -> None:
    build, cls, config = HF[name]
    hf = models.tiny_hf(cls, config())
    with torch.no_grad():
        attentions = hf(ids, output_attentions=True).attentions
    frame = hooks.spectral_gap(build(), ids, k=4, progress=False).to_frame("prompt")
    assert len(frame) == 2 * 4 * 3
    for _, row in frame.iterrows():
        matrix = attentions[row["layer"]][row["prompt"], row["head"]].double().numpy()
        wanted = by_numpy(matrix, causal(17), 4)
        for column, value in wanted.items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-5), column


@pytest.mark.parametrize("options", [{}, {"window_size": 5}, {"attention_dir": "bidirectional"}])
def test_equals_numpy_on_our_patterns(options: dict[str, Any]) -> None:
    bridge = to_bridge(ours(**options))
    seen = watch(bridge, ids, ["blocks.1.attn.hook_pattern"])["blocks.1.attn.hook_pattern"]
    uniform = causal(17, options.get("window_size", 17))
    if options.get("attention_dir"):
        uniform = np.full((17, 17), 1 / 17)
    frame = hooks.spectral_gap(bridge, ids, k=3, layers=[1], progress=False).to_frame("prompt")
    for _, row in frame.iterrows():
        matrix = seen[row["prompt"], row["head"]].double().numpy()
        for column, value in by_numpy(matrix, uniform, 3).items():
            assert row[column] == pytest.approx(value, rel=1e-6, abs=1e-7), column


# -- laws ---------------------------------------------------------------------------------------


def test_row_stochastic_matrices_have_a_singular_value_of_at_least_one(model: Any) -> None:
    """A 1 = 1: the constant vector keeps its length."""
    report = hooks.spectral_gap(model, ids, progress=False)
    rows = report.to_frame("prompt")
    for column in ("s1", "uniform_s1"):
        assert (rows[column] >= 1 - 1e-6).all()
    for singular, square in zip(report.singular, report.square, strict=True):
        assert (np.diff(singular) <= 1e-12).all()
        assert ((singular**2).sum(-1) <= square * (1 + 1e-9)).all()
    assert rows["stable_rank"].between(1 - 1e-9, 17).all()


def test_weyls_inequality_binds_pattern_uniform_and_what_is_left(model: Any) -> None:
    """|s_i(A) - s_i(U)| <= s_1(A - U)."""
    report = hooks.spectral_gap(model, ids, k=17, progress=False)
    for s, u, left in zip(report.singular, report.uniform, report.left, strict=True):
        assert (np.abs(s - u) <= left[..., :1] + 1e-9).all()


def test_all_singular_values_give_the_frobenius_norm(model: Any) -> None:
    report = hooks.spectral_gap(model, ids, k=17, progress=False)
    for values, squares in ((report.singular, report.square), (report.left, report.left_square)):
        for s, square in zip(values, squares, strict=True):
            np.testing.assert_allclose((s**2).sum(-1), square, rtol=1e-9)


def flat(**options: Any) -> Any:
    """Queries of zero: every score is the same."""
    plain = ours(**options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "attn.q.weight" in name:
                parameter.mul_(1e-9)  # the self-check wants an effect, the spectrum sees none
    return to_bridge(plain)


def test_unmasked_uniform_attention_has_one_singular_value() -> None:
    frame = hooks.spectral_gap(
        flat(attention_dir="bidirectional"), ids, k=17, progress=False
    ).to_frame("prompt")
    np.testing.assert_allclose(frame["s1"], 1, atol=1e-5)
    np.testing.assert_allclose(frame["uniform_s1"], 1, atol=1e-12)
    assert (frame[[f"s{i}" for i in range(2, 18)]].to_numpy() < 1e-4).all()
    assert (frame["uniform_s2"] < 1e-12).all()
    assert (frame["left_s1"] < 1e-4).all()
    np.testing.assert_allclose(frame["stable_rank"], 1, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window_size": 5}])
def test_uniform_attention_is_the_uniform_matrix_of_its_mask(options: dict[str, Any]) -> None:
    frame = hooks.spectral_gap(flat(**options), ids, progress=False).to_frame("prompt")
    np.testing.assert_allclose(frame["s1"], frame["uniform_s1"], rtol=1e-5)
    np.testing.assert_allclose(frame["gap"], frame["uniform_gap"], rtol=1e-3)


def test_the_uniform_causal_matrix_has_a_spectrum_of_its_own() -> None:
    """papers.md: 1.53 and 0.91 at T = 30, where the unmasked one has 1 and 0."""
    frame = hooks.spectral_gap(
        to_bridge(ours()), models.tokens(1, 30), layers=[0], progress=False
    ).to_frame("length")
    assert frame["uniform_s1"].iloc[0] == pytest.approx(1.53, abs=0.005)
    assert frame["uniform_s2"].iloc[0] == pytest.approx(0.91, abs=0.005)


def test_permuted_tokens_have_the_same_spectrum_without_mask_and_positions() -> None:
    bridge = to_bridge(ours(attention_dir="bidirectional", positional_embedding_type="none"))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    one, other = (
        hooks.spectral_gap(bridge, x, progress=False).to_frame() for x in (ids, ids[:, order])
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)
    masked = to_bridge(ours(positional_embedding_type="none"))
    one, other = (
        hooks.spectral_gap(masked, x, progress=False).to_frame() for x in (ids, ids[:, order])
    )
    assert (one["s1"] - other["s1"]).abs().max() > 1e-3


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_uniform_shares_sum_to_one_where_a_key_is_seen(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    share = uniform_of(mask)
    assert torch.equal(share > 0, mask)
    torch.testing.assert_close(share.sum(-1), mask.any(-1).double())
    for row, seen in zip(share, mask, strict=True):
        assert len(row[seen].unique()) <= 1


# -- prompts, lengths, layers -------------------------------------------------------------------


def test_lengths_cut_each_prompt(gpt2: Any) -> None:
    prompts = [ids[0].tolist(), ids[1, :9].tolist(), ids[2].tolist()]
    report = hooks.spectral_gap(gpt2, prompts, lengths=(12, 5), progress=False)
    got = report.to_frame("prompt").set_index(["prompt", "length", "label"])
    assert set(got.index.droplevel("label")) == {(0, 5), (1, 5), (2, 5), (0, 12), (2, 12)}
    for prompt, n in ((0, 5), (1, 5), (2, 12)):
        alone = hooks.spectral_gap(gpt2, prompts[prompt][:n], progress=False).to_frame("prompt")
        for _, row in alone.iterrows():
            for column in ("s1", "gap", "uniform_s1", "left_s1", "stable_rank"):
                there = got.loc[(prompt, n, row["label"]), column]
                assert there == pytest.approx(row[column], rel=1e-4)
    by_length = report.to_frame("length")
    assert by_length["length"].tolist() == [5, 12, 5, 12]
    assert report.to_frame("prompt")["s6"].isna().sum() == 3 * 8


def test_a_causal_models_prefix_is_the_corner_of_its_matrix(gpt2: Any) -> None:
    """Cutting a prompt is cutting its causal attention matrix."""
    pattern = watch(gpt2, ids, ["blocks.0.attn.hook_pattern"])["blocks.0.attn.hook_pattern"]
    frame = hooks.spectral_gap(gpt2, ids, lengths=[7], layers=[0], progress=False)
    for _, row in frame.to_frame("prompt").iterrows():
        corner = pattern[row["prompt"], row["head"], :7, :7].double().numpy()
        assert row["s1"] == pytest.approx(np.linalg.norm(corner, 2), rel=1e-4)


def test_batches_and_padding_do_not_matter(gpt2: Any) -> None:
    prompts = [ids[0, :9].tolist(), ids[1].tolist(), ids[2, :9].tolist()]
    one = hooks.spectral_gap(gpt2, prompts, batch_size=1, progress=False)
    other = hooks.spectral_gap(gpt2, prompts, batch_size=8, progress=False)
    padded = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, (prompt, at) in enumerate(zip(prompts, (0, 3, 11), strict=True)):
        padded[i, at : at + len(prompt)] = torch.tensor(prompt)
        mask[i, at : at + len(prompt)] = 1
    third = hooks.spectral_gap(gpt2, padded, attention_mask=mask, progress=False)
    for later in (other, third):
        pd.testing.assert_frame_equal(
            one.to_frame("prompt"), later.to_frame("prompt"), rtol=1e-4, atol=1e-5
        )


def test_frames_are_means_of_the_matrices(gpt2: Any) -> None:
    report = hooks.spectral_gap(gpt2, ids, lengths=[5, 17], progress=False)
    rows = report.to_frame("prompt")
    for by, names in (("head", ["layer", "head"]), ("length", ["layer", "length"])):
        got = report.to_frame(by).set_index(names)  # type: ignore[arg-type]
        for at, of in rows.groupby(names):
            assert got.loc[at, "s1"] == pytest.approx(of["s1"].mean())
            assert got.loc[at, "left_s1"] == pytest.approx(of["left_s1"].mean())
    layers = report.to_frame("layer")
    assert layers["label"].tolist() == ["L0", "L1"]
    assert layers["gap"].tolist() == pytest.approx(rows.groupby("layer")["gap"].mean().tolist())


# -- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, (5, 17)])
def test_saved_and_loaded_it_is_the_same(model: Any, lengths: Any, tmp_path: Path) -> None:
    report = hooks.spectral_gap(model, ids, k=3, layers=[1], lengths=lengths, progress=False)
    again = SpectrumReport.load(report.save(tmp_path / "deep" / "spectrum.safetensors"))
    assert again.settings == report.settings
    assert again.tokens == report.tokens
    assert again.summary() == report.summary()
    for by in ("prompt", "head", "layer", "length"):
        pd.testing.assert_frame_equal(again.to_frame(by), report.to_frame(by), check_exact=True)
    assert set(report.to_frame()["layer"]) == {1}


def test_another_file_is_refused(gpt2: Any, tmp_path: Path) -> None:
    other = hooks.spread(gpt2, ids, progress=False).save(tmp_path / "spread.safetensors")
    with pytest.raises(ValueError, match="wanted the format"):
        SpectrumReport.load(other)


def test_the_summary_has_the_frames_numbers(gpt2: Any) -> None:
    report = hooks.spectral_gap(gpt2, ids, progress=False)
    text, rows = str(report), report.to_frame("prompt")
    assert f"gap of {rows['gap'].mean():.3g} (by layer" in text
    assert f"stable rank is {rows['stable_rank'].mean():.3g}." in text
    assert f"{rows['uniform_s1'].mean():.3g} and {rows['uniform_s2'].mean():.3g}" in text


# -- what is left alone, and what is refused --------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    bridge = models.tiny_llama()
    bridge(ids)  # the first pass sets a bridge up
    bridge.train()
    with shape_checks_off():
        before = Found(bridge)
        hooks.spectral_gap(bridge, ids, lengths=[5, 9], progress=False)
        before.assert_same(Found(bridge))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k: wanted an integer from 2"),
        ({"k": 2.5}, "k: wanted an integer from 2"),
        ({"layers": [7]}, "layers: wanted one of the attention layers"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1"),
        ({"lengths": []}, "lengths: wanted one or more integers"),
        ({"lengths": "16"}, "lengths: wanted one or more integers"),
        ({"lengths": 16}, "lengths: wanted one or more integers"),
        ({"lengths": [1]}, "lengths: wanted an integer >= 2"),
        ({"lengths": [4, 4]}, "lengths: wanted each once"),
        ({"lengths": [4, 18]}, "lengths: wanted at most 17, the longest prompt's; got 18"),
    ],
)
def test_wrong_options_are_refused(gpt2: Any, options: dict[str, Any], message: str) -> None:
    with shape_checks_off(), pytest.raises((ValueError, TypeError), match=message):
        hooks.spectral_gap(gpt2, ids, progress=False, **options)


def test_wrong_frames_are_refused(gpt2: Any) -> None:
    report = hooks.spectral_gap(gpt2, ids, progress=False)
    with shape_checks_off(), pytest.raises(ValueError, match="by: wanted one of"):
        report.to_frame("token")  # type: ignore[arg-type]


def test_a_weight_that_is_no_number_is_refused(gpt2: Any) -> None:
    def spoil(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(torch.arange(stream.shape[1])[:, None] == 3, torch.nan, stream)

    hooks.attention_sites(gpt2)
    with (
        gpt2.hooks(fwd_hooks=[("blocks.1.hook_in", spoil)]),
        pytest.raises(UnsupportedModelError, match=r"layer 1: spectral_gap: wanted finite"),
    ):
        hooks.spectral_gap(gpt2, ids, progress=False)


def test_cross_attention_is_refused_and_can_be_left_out() -> None:
    t5 = builders.build("T5ForConditionalGeneration").model
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        hooks.spectral_gap(t5, ids, decoder_tokens=ids, progress=False)
    own = [s.layer for s in hooks.attention_sites(t5) if not s.label.startswith("X")]
    report = hooks.spectral_gap(t5, ids, layers=own, decoder_tokens=ids[:, :9], progress=False)
    frame = report.to_frame("layer")
    assert {label[0] for label in frame["label"]} == {"E", "D"}
    encoder = frame[frame["label"].str.startswith("E")]
    np.testing.assert_allclose(encoder["uniform_s1"], 1)
    assert (encoder["uniform_s2"] < 1e-9).all()
    with pytest.raises(ValueError, match="lengths: wanted prompts of tokens alone"):
        hooks.spectral_gap(t5, ids, layers=own, lengths=[5], decoder_tokens=ids, progress=False)


def test_the_summary_says_where_the_model_averages_with_a_minus_u(tmp_path: Path) -> None:
    said = "Values are averaged with A - U"
    plain = to_bridge(ours())
    assert said not in hooks.spectral_gap(plain, ids, progress=False).summary()
    report = hooks.spectral_gap(to_bridge(ours(centred=True)), ids, progress=False)
    assert f"{said}, not with A" in report.summary()
    assert SpectrumReport.load(report.save(tmp_path / "r")).summary() == report.summary()
    with hooks.CentredAttention(layers=(1,)).applied(plain):
        fixed = hooks.spectral_gap(plain, ids, progress=False)
        first = hooks.spectral_gap(plain, ids, layers=[0], progress=False)
    assert f"{said} in L1, not with A" in fixed.summary()
    assert said not in first.summary()
    assert said not in hooks.spectral_gap(plain, ids, progress=False).summary()
