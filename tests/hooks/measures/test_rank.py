"""hooks.rank_profile: laws of its measures, held against plain numpy on raw hidden states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import hooks
from hooks import RankReport, UnsupportedModelError
from hooks.measures.rank.numbers import (
    MEASURES,
    distance_to_mean,
    first_share,
    mean_cosine,
    measures,
    with_and_without_first,
)
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.watching import shape_checks_off, tiny_gemma2, tiny_mamba, watch

ids = models.tokens(3, 13)
seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(2, 9), st.integers(1, 9))


def matrix(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(matrix(seed, d, d))[0]


def ours(placement: str) -> Any:
    cfg = QKVNormConfig(
        placement=placement,
        d_model=16,
        d_head=8,
        n_heads=2,
        n_layers=3,
        n_ctx=32,
        d_vocab=97,
        d_mlp=20,
        seed=3,
    )
    return to_bridge(QKVNormTransformer(cfg).eval())


# -- measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (9, 8), (8, 8), (2, 5), (1, 4)])
@pytest.mark.parametrize("long", [1.0, 1e9])  # the first token, as models have it
def test_one_qr_leaves_both_spectra_as_numpy_has_them(shape: tuple[int, int], long: float) -> None:
    x = matrix(3, 2, *shape)
    x[0, -1] = x[0, 0]  # of less than full rank, with all tokens
    x[:, 0] *= long
    found = with_and_without_first(x, 2.0**-53)
    for prompt in range(2):
        for start in range(2):
            s = np.linalg.svd(x[prompt, start:].numpy(), compute_uv=False)
            got = dict(zip(MEASURES, found[prompt, start].tolist(), strict=True))
            if not len(s):
                assert got["norm"] == got["rank"] == 0
                continue
            size, room = math.sqrt((s**2).sum()), 1e-13 * s[0]
            assert got["norm"] == pytest.approx(size, rel=1e-12)
            assert got["least"] == pytest.approx(s[-1], rel=1e-12, abs=room)
            assert got["stable_rank"] == pytest.approx((size / s[0]) ** 2, rel=1e-12)
            assert got["rank"] == np.linalg.matrix_rank(x[prompt, start:].numpy())


@given(size=sizes, seed=seeds, scale=st.floats(1e-6, 1e6))
def test_mu_is_zero_exactly_where_all_tokens_are_equal(
    size: tuple[int, int], seed: int, scale: float
) -> None:
    row = scale * matrix(seed, 1, size[1])
    same = row.repeat(size[0], 1)
    assert float(distance_to_mean(same)) == 0
    assert measures(same)["relative_mu"] == 0
    other = same.clone()
    other[-1, 0] += scale
    n = size[0]
    assert measures(other)["mu"] == pytest.approx(scale * math.sqrt(1 - 1 / n), rel=1e-6)


@given(size=sizes, seed=seeds, far=st.floats(-100, 100))
def test_mu_does_not_see_a_common_shift(size: tuple[int, int], seed: int, far: float) -> None:
    x = matrix(seed, *size)
    shifted = x + far * matrix(seed + 1, 1, size[1])
    assert measures(shifted)["mu"] == pytest.approx(measures(x)["mu"], rel=1e-9)


@given(size=sizes, seed=seeds)
def test_nothing_sees_a_rotation_or_the_order_of_tokens(size: tuple[int, int], seed: int) -> None:
    x = matrix(seed, *size)
    turned = (x @ rotation(seed + 1, size[1])).flip(0)
    assert measures(turned) == pytest.approx(measures(x), rel=1e-6, abs=1e-12)


@given(size=sizes, seed=seeds, scale=st.sampled_from([1e-30, 1e-3, 2.0, 1e30]))
def test_only_lengths_see_a_scale(size: tuple[int, int], seed: int, scale: float) -> None:
    x = matrix(seed, *size)
    before, after = measures(x), measures(scale * x)
    for name in MEASURES:
        factor = scale if name in ("mu", "least", "norm") else 1
        assert after[name] == pytest.approx(factor * before[name], rel=1e-9)


@given(size=sizes, rank=st.integers(1, 9), seed=seeds)
def test_ranks_lie_between_one_and_the_rank(size: tuple[int, int], rank: int, seed: int) -> None:
    rank = min(rank, *size)
    x = matrix(seed, size[0], rank) @ matrix(seed + 1, rank, size[1])
    found = measures(x)
    assert found["rank"] <= rank
    assert 1 <= found["stable_rank"] <= rank * (1 + 1e-9)
    assert 1 <= found["effective_rank"] <= rank * (1 + 1e-9)
    assert found["stable_rank"] <= found["effective_rank"] ** 2 * (1 + 1e-9)  # sums of s over s_1
    assert 0 <= found["relative_mu"] <= 1
    assert 0 <= found["mean_cosine"] <= 1


HALF = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", HALF)
@given(size=st.tuples(st.integers(2, 40), st.integers(2, 40)), rank=st.integers(1, 40), seed=seeds)
def test_rounding_makes_no_rank(
    dtype: torch.dtype, size: tuple[int, int], rank: int, seed: int
) -> None:
    rank = min(rank, *size)
    x = matrix(seed, size[0], rank) @ matrix(seed + 1, rank, size[1])
    stored = x.to(dtype)
    assert 1 <= measures(stored, torch.finfo(dtype).eps / 2)["rank"] <= rank


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(4, 4096), (64, 2048), (300, 130)])
def test_wide_tokens_in_half_precision_keep_their_rank(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Singular values of random tokens lie near the largest, far above rounding."""
    found = measures(matrix(5, *shape).to(dtype), torch.finfo(dtype).eps / 2)
    assert found["rank"] == min(shape)
    assert 1 <= found["effective_rank"] <= found["rank"]


def test_a_rank_that_rounding_hides_is_no_number() -> None:
    assert math.isnan(measures(torch.eye(9, dtype=torch.float64), 0.34)["rank"])  # 1 < 0.34 * 3
    assert measures(torch.eye(9, dtype=torch.float64), 0.33)["rank"] == 9


def test_the_stable_rank_is_that_of_x_and_not_of_its_gram_matrix() -> None:
    x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert measures(x)["stable_rank"] == pytest.approx(5 / 4)
    assert measures(x @ x.T)["stable_rank"] == pytest.approx(17 / 16)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_known_matrices(n: int) -> None:
    one = measures(torch.eye(n, dtype=torch.float64))
    assert one["stable_rank"] == pytest.approx(n)
    assert one["effective_rank"] == pytest.approx(n)
    assert one["rank"] == n
    assert one["mean_cosine"] == 0
    assert one["relative_least"] == pytest.approx(1)
    assert one["mu"] == pytest.approx(math.sqrt(n - 1))
    opposite = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    found = measures(opposite)
    assert found["relative_mu"] == pytest.approx(1)  # the mean token is zero
    assert found["rank"] == 1
    assert found["mean_cosine"] == pytest.approx(1)
    p = torch.tensor([0.75, 0.25])
    diagonal = measures(torch.diag(torch.tensor([3.0, 1.0])))
    assert diagonal["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))


def test_the_least_singular_value_is_not_lost_in_a_gram_matrix() -> None:
    x = rotation(1, 6) @ torch.diag(10.0 ** -torch.arange(0.0, 12, 2).double()) @ rotation(2, 6)
    assert measures(x)["relative_least"] == pytest.approx(1e-10, rel=1e-4)


def test_where_there_is_no_number() -> None:
    nothing = measures(torch.zeros(3, 4))
    assert nothing["mu"] == nothing["norm"] == nothing["rank"] == nothing["least"] == 0
    assert math.isnan(nothing["relative_mu"])
    assert math.isnan(nothing["stable_rank"])
    assert math.isnan(mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]])))
    assert math.isnan(measures(matrix(0, 1, 4))["mean_cosine"])
    assert math.isnan(first_share(torch.zeros(2, 2)))


# -- the profile against plain numpy ----------------------------------------------------------


def by_numpy(x: np.ndarray) -> dict[str, float]:
    """Written from the definitions, singular values apart from nothing shared."""
    n = len(x)
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 0] / s.sum()
    mu = float(np.sqrt(sum(((row - x.mean(0)) ** 2).sum() for row in x)))
    cosines = [
        abs(x[i] @ x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        for i in range(n)
        for j in range(i)
    ]
    return {
        "mu": mu,
        "relative_mu": mu / np.linalg.norm(x),
        "stable_rank": float((s**2).sum() / s[0] ** 2),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
        "least": float(s[-1]),
        "relative_least": float(s[-1] / s[0]),
        "mean_cosine": float(np.mean(cosines)),
        "norm": float(np.linalg.norm(x)),
    }


def compare(report: RankReport, label: str, tensor: Tensor) -> None:
    """One site, all prompts, with and without the first token."""
    for without in (False, True):
        frame = report.to_frame("prompt", without_first=without)
        mine = frame[frame["label"] == label].sort_values("prompt")
        assert len(mine) == len(tensor)
        for (_, row), x in zip(mine.iterrows(), tensor.double().numpy(), strict=True):
            wanted = by_numpy(x[1:] if without else x)
            for name, value in wanted.items():
                # The least singular value is off by rounding of the largest (Weyl).
                size = {"least": wanted["norm"], "relative_least": 1.0}.get(name, 0.0)
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-7 * size), name
            share = float((x[0] ** 2).sum() / (x**2).sum())
            assert row["first_share"] == pytest.approx(share)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_stream_is_hugging_faces_hidden_states(kind: str) -> None:
    config = {"gpt2": models.tiny_gpt2_config, "llama": models.tiny_llama_config}[kind]()
    cls = {"gpt2": models.GPT2LMHeadModel, "llama": models.LlamaForCausalLM}[kind]
    with torch.no_grad():
        states = models.tiny_hf(cls, config)(ids, output_hidden_states=True).hidden_states
    report = hooks.rank_profile(models.TINY[kind](), ids, batch_size=2, progress=False)
    compare(report, "L0 in", states[0])
    compare(report, "L0 out", states[1])
    compare(report, "L1 in", states[1])
    compare(report, "L1 final_norm", states[2])  # transformers gives the last one behind its norm


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_our_models_sites_are_their_tensors(placement: str) -> None:
    model = ours(placement)
    report = hooks.rank_profile(model, ids, progress=False)
    names = {
        "L1 in": "blocks.1.hook_in",
        "L1 mid": "blocks.1.hook_resid_mid",
        "L1 mlp_norm": "blocks.1.ln2.hook_out",
        "L2 out": "blocks.2.hook_out",
        "L2 final_norm": "ln_final.hook_out",
    }
    if placement == "pre":
        names["L1 attn_norm"] = "blocks.1.ln1.hook_out"
    seen = watch(model, ids, list(names.values()))
    for label, name in names.items():
        compare(report, label, seen[name])
    found = {s.site for s in report.settings.sites}
    assert ("attn_norm" in found) == (placement == "pre")
    assert any("no norm before attn" in n for n in report.model["notes"]) != (placement == "pre")


def test_a_blocks_output_is_the_next_ones_input() -> None:
    report = hooks.rank_profile(tiny_gemma2(), ids, progress=False)
    frame = report.to_frame().set_index("label")
    for layer in range(1):
        out, after = (frame.loc[f"L{layer + i} {site}"] for i, site in ((0, "out"), (1, "in")))
        pd.testing.assert_series_equal(
            out[list(MEASURES)], after[list(MEASURES)], check_names=False
        )


SITES = {
    "GPTNeoXForCausalLM": ("in attn_norm mlp_norm out", "read the same stream"),
    "GPTJForCausalLM": ("in attn_norm out", "read one norm"),
    "BertForMaskedLM": ("in mid out", "follow the sums"),
    "Olmo2ForCausalLM": ("in mid out", "no norm before mlp"),
    "GraniteForCausalLM": ("in attn_norm mid mlp_norm out", ""),
    "MambaForCausalLM": ("in mixer_norm out", "no stream between attention and MLP"),
}


@pytest.mark.parametrize("name", SITES)
def test_sites_of_other_blocks_and_what_is_said_of_missing_ones(name: str) -> None:
    built = builders.build(name)
    args, _ = built.inputs(batch=2, pos=12)
    report = hooks.rank_profile(built.model, args[0], progress=False)
    first = [s.site for s in report.settings.sites if s.layer == 0]
    wanted, note = SITES[name]
    assert first == wanted.split()
    assert any(note in said for said in report.model["notes"]) or not note
    assert note in str(report)


def test_post_norms_stream_is_what_its_norms_give() -> None:
    """BERT's hook_resid_mid is the sum behind its MLP: it must not pass for the stream between."""
    built = builders.build("BertForMaskedLM")
    args, _ = built.inputs(batch=2, pos=12)
    report = hooks.rank_profile(built.model, args[0], progress=False)
    seen = watch(built.model, args[0], ["blocks.0.ln1.hook_out", "blocks.0.hook_resid_mid"])
    compare(report, "L0 mid", seen["blocks.0.ln1.hook_out"])
    assert not torch.equal(seen["blocks.0.ln1.hook_out"], seen["blocks.0.hook_resid_mid"])


def test_an_encoder_and_a_decoder_have_stacks_of_their_own() -> None:
    built = builders.build("T5ForConditionalGeneration")
    args, kwargs = built.inputs(batch=2, pos=12)
    given_ids = dict(zip(("input_ids",), args, strict=False)) | kwargs
    report = hooks.rank_profile(built.model, given_ids, progress=False)
    stacks = {s.stack for s in report.settings.sites}
    assert stacks == {"encoder_blocks", "decoder_blocks"}
    labels = [s.label for s in report.settings.sites]
    assert labels[:2] == ["E0 in", "E0 attn_norm"]
    assert {"D0 cross_norm", "D0 mid2", "D1 final_norm"} <= set(labels)


# -- what a user relies on --------------------------------------------------------------------


def test_padding_batches_and_layers_do_not_matter() -> None:
    model = models.tiny_llama()
    rows = [ids[0].tolist(), ids[1, :7].tolist(), ids[2].tolist()]
    whole = hooks.rank_profile(model, rows, progress=False)
    padded = torch.zeros(3, 15, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, 1 : 1 + len(row)] = torch.tensor(row)
        mask[i, 1 : 1 + len(row)] = 1
    other = hooks.rank_profile(
        model, padded, attention_mask=mask, batch_size=1, layers=[0], progress=False
    )
    assert {s.layer for s in other.settings.sites} == {0}
    n = len(other.settings.sites)
    assert whole.settings.sites[:n] == other.settings.sites
    np.testing.assert_allclose(other.numbers, whole.numbers[:, :n], rtol=1e-4)
    last = hooks.rank_profile(model, rows, layers=[1], progress=False)
    np.testing.assert_allclose(last.numbers, whole.numbers[:, n:], rtol=1e-12)


def test_a_report_comes_back_from_disk(tmp_path: Path) -> None:
    report = hooks.rank_profile(models.tiny_gpt2(), ids, layers=(1,), progress=False)
    back = RankReport.load(report.save(tmp_path / "a" / "rank.safetensors"))
    assert back.settings == report.settings
    assert str(back) == str(report)
    pd.testing.assert_frame_equal(
        back.to_frame("prompt", without_first=True), report.to_frame("prompt", without_first=True)
    )
    other = tmp_path / "other.safetensors"
    hooks.spread(models.tiny_gpt2(), ids, progress=False).save(other)
    with pytest.raises(ValueError, match="wanted the format"):
        RankReport.load(other)


def test_means_are_over_prompts() -> None:
    report = hooks.rank_profile(models.tiny_gpt2(), ids, progress=False)
    by_prompt = report.to_frame("prompt")
    mean = by_prompt.groupby("label", sort=False)["stable_rank"].mean()
    np.testing.assert_allclose(report.to_frame()["stable_rank"], mean, rtol=1e-12)


def test_two_tokens_are_one_without_the_first() -> None:
    report = hooks.rank_profile(models.tiny_gpt2(), ids[:1, :2], progress=False)
    alone = report.to_frame(without_first=True)
    assert (alone["mu"] == 0).all()
    assert (alone["rank"] == 1).all()
    assert alone["mean_cosine"].isna().all()
    assert report.to_frame()["mean_cosine"].notna().all()
    assert "nan" not in str(report)
    assert "no mean |cosine| (no two tokens" in str(report)


def test_a_model_in_half_precision_has_a_rank() -> None:
    model = models.tiny_llama().to(torch.bfloat16)
    frame = hooks.rank_profile(model, ids, progress=False).to_frame()
    assert (frame["rank"] >= 1).all()
    assert (frame["effective_rank"] <= frame["rank"] * (1 + 1e-9)).all()


def test_what_is_no_model_and_one_token_are_named() -> None:
    with shape_checks_off():
        with pytest.raises(TypeError, match=r"model: wanted a TransformerBridge .*; got Linear"):
            hooks.rank_profile(torch.nn.Linear(2, 2), "x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"at least 2 tokens .*nothing to compare.; got 1"):
            hooks.rank_profile(models.tiny_gpt2(), ids[:1, :1], progress=False)


def test_the_model_is_left_as_it_was() -> None:
    model = models.tiny_gpt2().train()
    model.blocks[1].eval()
    seen: list[int] = []
    model.add_hook("blocks.0.hook_in", lambda tensor, hook: seen.append(1))
    before = {n: len(p.fwd_hooks) for n, p in model.hook_dict.items()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    hooks.rank_profile(model, ids, progress=False)
    assert seen == [1]  # the user's hook ran and stays
    assert {n: len(p.fwd_hooks) for n, p in model.hook_dict.items()} == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_and_leaves_no_hook(bad: float) -> None:
    model = models.tiny_gpt2()

    def spoil(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[1, 3, 0] = bad
        return tensor

    with (
        model.hooks(fwd_hooks=[("blocks.0.ln2.hook_out", spoil)]),
        pytest.raises(UnsupportedModelError, match=r"L0 .*wanted finite numbers"),
    ):
        hooks.rank_profile(model, ids, progress=False)
    assert not any(p.has_hooks() for p in model.hook_dict.values())


def test_a_stream_that_does_not_go_on_is_refused() -> None:
    model = models.tiny_gpt2()
    change = ("blocks.1.hook_in", lambda tensor, hook: 2 * tensor)
    with (
        model.hooks(fwd_hooks=[change]),
        pytest.raises(UnsupportedModelError, match=r"layer 1: the stream at blocks\.1"),
    ):
        hooks.rank_profile(model, ids, progress=False)


def test_a_stream_of_other_axes_is_refused() -> None:
    built = builders.build("Gemma3nForConditionalGeneration")
    args, kwargs = built.inputs(batch=2, pos=12)
    given_ids = args[0] if args else kwargs["input_ids"]
    with pytest.raises(UnsupportedModelError, match=r"wanted a tensor \[2, pos, d_model\]"):
        hooks.rank_profile(built.model, given_ids, progress=False)


def test_models_without_a_stream_are_refused() -> None:
    model = tiny_mamba()

    known = {n: p for n, p in model.hook_dict.items() if not n.startswith("blocks")}

    class Without:
        cfg = model.cfg
        hook_dict = known
        hooks = model.hooks
        run_with_hooks = model.run_with_hooks
        __call__ = model.__call__

    with shape_checks_off(), pytest.raises(UnsupportedModelError, match="wanted a stack of blocks"):
        hooks.rank_profile(Without(), ids, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [2]}, r"layers: wanted some of \[0, 1\]; got 2"),
        ({"layers": [0, 0]}, "layers: wanted one or more indices in a list, each once"),
        ({"layers": []}, "layers: wanted one or more indices in a list"),
        ({"layers": [True]}, r"got \[True\]"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], said: str) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match=said):
        hooks.rank_profile(models.tiny_gpt2(), ids, progress=False, **options)


def test_frames_by_something_else_are_refused() -> None:
    report = hooks.rank_profile(models.tiny_gpt2(), ids, progress=False)
    with shape_checks_off():
        with pytest.raises(ValueError, match=r"by: wanted one of .*; got 'head'"):
            report.to_frame("head")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="without_first: wanted True or False"):
            report.to_frame(without_first=1)  # type: ignore[arg-type]
