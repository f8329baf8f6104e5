"""Interference without injected noise: against hand-made norms, and models built to show it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooks import InterferenceReport
from hooks.noise.laws import LAWS
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import models
from tests.support.interference import FACTORS, KINDS, ids, measure, same
from tests.support.watching import (
    Found,
)

# -- a head built so that one can name the rows -------------------------------------------------

C, A, B = 1, 2, 3  # filler; what the head looks for; more of it, in a token that is long


def built(**options: Any) -> Any:
    """One Pre-Norm head whose score is 50 u_t / s_t, where u is a token's second component.

        C: u = 0.1, s = 1/2 sqrt(1 + 0.01)          A: u = 3, s = 1/2 sqrt(1 + 9)
        B: u = 4, s = 1/2 sqrt(1 + 16 + 64)

    A has the largest u / s of the three, B the largest u. The first component is 1 in all of them,
    the query reads it, with its own norm taken back by the gain's place: queries differ by s_q.
    """
    cfg = QKVNormConfig(
        placement="pre",
        d_model=4,
        d_head=4,
        n_heads=1,
        n_layers=1,
        n_ctx=16,
        d_vocab=5,
        attn_only=True,
        score_scale="none",
        positional_embedding_type="none",
        eps=1e-12,
        **options,
    )
    plain = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "gain" not in name and "ln" not in name:
                p.zero_()
        table = [[1, 0, 0, 0], [1, 0.1, 0, 0], [1, 3, 0, 0], [1, 4, 8, 0], [1, 0.2, 0, 1]]
        plain.tok_embed.weight.copy_(torch.tensor(table))
        block = plain.layers[0].attn
        block.q.weight[0, 0] = 1.0
        block.k.weight[0, 1] = 50.0
        block.v.weight.copy_(torch.eye(4))
        block.o.weight.copy_(torch.eye(4))
        plain.head.weight.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    return to_bridge(plain)


@pytest.mark.parametrize(
    ("prompt", "rows", "moved", "to_first"),
    [
        ([C, A, C], (2, 0), (0, 0), (0, 0)),
        ([C, A, C, B], (3, 0), (1, 0), (0, 0)),  # the row of B itself sees B
        ([C, A, C, B, C], (4, 0), (2, 0), (0, 0)),
        ([A, C, B], (0, 2), (0, 1), (0, 0)),  # from a sink to content
        ([B, A, C], (2, 0), (2, 0), (2, 0)),  # from content to the first token
        ([C, B, C], (2, 0), (0, 0), (0, 0)),  # B alone has no rival
    ],
)
def test_the_rows_that_move_are_those_one_can_name(
    prompt: list[int], rows: Any, moved: Any, to_first: Any
) -> None:
    report = measure(built(), [prompt])
    assert tuple(report.rows[0, 0, 0]) == rows
    for on in range(2):
        assert tuple(report.loose[on, 0, 0, 0, 0]) == moved
        assert tuple(report.strict[on, 0, 0, 0, 0]) == moved  # 50 (4 - 3) between the first two
        assert tuple(report.to_first[on, 0, 0, 0, 0]) == to_first
    assert tuple(report.factored[0, 0, 0]) == moved


def test_scales_and_sparing_the_first_token() -> None:
    prompt = [B, A, C]
    s = np.array([math.sqrt(81 / 4), math.sqrt(10 / 4), math.sqrt(1.01 / 4)])
    report = measure(built(), [prompt], spare_first=True)
    assert report.constant[0, 0] == pytest.approx(np.median(s), rel=1e-6)
    spread = [x.std() / x.mean() for x in (s, s[1:])]
    np.testing.assert_allclose(report.scale_spread[0, 0], spread, rtol=1e-5)
    # B keeps its own length now, and loses to A as before.
    assert report.loose.sum() == 0
    assert report.rows.sum() == 2
    seen = [1.0, *(s[1:] / np.median(s))]
    squares = [(np.std(seen[: n + 1]) / np.mean(seen[: n + 1])) ** 2 for n in (1, 2)]
    assert report.sigma_squared.sum() == pytest.approx(sum(squares), rel=1e-5)


def test_what_independent_noise_would_do_agrees_with_drawing_it() -> None:
    prompt = [C, A, C, B, A]
    report = measure(built(), [prompt])
    values = {C: (0.1, 1.01), A: (3.0, 10.0), B: (4.0, 81.0)}
    u = np.array([values[t][0] for t in prompt])
    s = np.array([math.sqrt(values[t][1] / 4) for t in prompt])
    rng = torch.Generator().manual_seed(0)
    expected, variance, n = 0.0, 0.0, 200_000
    sparse = [1, 2, 3]  # row 4 sees A twice: a tie, and not sparse
    for q in sparse:
        seen = slice(0, q + 1)
        sigma = float(np.std(s[seen]) / np.mean(s[seen]))
        law = LAWS["uniform" if sigma < 1 / math.sqrt(3) else "lognormal"]
        drawn = law.factor(torch.rand(n, q + 1, generator=rng, dtype=torch.float64), sigma)
        clean = torch.tensor(u[seen] / s[seen])
        p = float(((drawn * clean).argmax(1) != int(clean.argmax())).double().mean())
        expected += p
        variance += p * (1 - p) / n
    assert report.rows.sum() == len(sparse)
    assert 0.2 < expected < 2.5
    assert abs(report.predicted.sum() - expected) < 5 * math.sqrt(variance) + 1e-6


# -- laws ---------------------------------------------------------------------------------------


def ours(**options: Any) -> Any:
    """A random Pre-Norm model of ours, its scores large enough for sparse rows."""
    cfg = QKVNormConfig(
        placement="pre",
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=2,
        n_ctx=32,
        d_vocab=models.VOCAB,
        score_scale="none",
        **options,
    )
    plain = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(plain.named_parameters()):
            generator = torch.Generator().manual_seed(i)
            centre, size = (1.0, 0.3) if p.ndim == 1 and "bias" not in name else (0.0, 0.45)
            p.copy_(centre + size * torch.randn(p.shape, generator=generator))
    return to_bridge(plain)


UNBIASED = {
    "llama": KINDS["llama"],
    "ours": ours,
    "ours, one gain": lambda: ours(norm=NormSpec(over="input", gains="shared")),
    "ours, LayerNorm": lambda: ours(norm=NormSpec(kind="layer", over="input")),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_without_biases_neither_the_constant_nor_q_can_matter(name: str) -> None:
    report = measure(UNBIASED[name](), constants=FACTORS)
    assert report.loose[0, 0].sum() >= 10
    for on in range(2):
        for constant in range(len(FACTORS)):
            np.testing.assert_array_equal(report.loose[on, constant], report.loose[0, 0])
    np.testing.assert_array_equal(report.factored, report.loose[0, 0])
    # A smaller constant makes sharper rows: the strict counts do depend on it.
    strict = report.strict[0].sum((1, 2, 3, 4))
    assert strict[0] > strict[-1]


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_with_biases_the_constant_matters(name: str) -> None:
    model = KINDS[name]()
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.original_component.bias.mul_(8)
    report = measure(model, constants=FACTORS, sparse=0.6)
    k, qk = report.loose.sum((2, 3, 4, 5)).tolist()
    assert max(qk) > min(qk)
    if name == "gpt2":
        # q . k0 is the same for all keys of a row, so that for k alone the constant is a scale.
        np.testing.assert_array_equal(report.loose[0], report.loose[0, :1].repeat(5, 0))
        assert min(k) >= 10
    else:  # ALiBi does not scale with the rest
        assert max(k) > min(k)
    # Factors on the finished keys are another intervention where the keys have a part of their own.
    assert (report.factored != report.loose[0, 2]).any()


def test_a_norm_behind_the_projection_takes_every_scale_away() -> None:
    report = measure(KINDS["qwen3"](), constants=FACTORS)
    assert report.rows.sum() >= 50
    assert report.scale_spread[..., 1].min() > 0.05
    assert report.loose.sum() == 0
    assert report.factored.sum() > 0  # ... which factors behind that norm would have moved


def test_equal_scales_move_nothing() -> None:
    model = ours(positional_embedding_type="none")
    with torch.no_grad():
        weight = model.original_model.tok_embed.weight
        weight.div_(weight.square().mean(-1, keepdim=True).sqrt())
    report = measure(model, layers=[0])
    assert report.rows.sum() >= 50
    for name in ("loose", "factored", "permuted"):
        assert getattr(report, name).sum() == 0, name
    assert report.predicted.sum() == pytest.approx(0, abs=1e-6)
    assert report.scale_spread.max() < 1e-4


# -- manners ---------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    report = measure(KINDS["gpt2"](), constants=[1.0, 2.0], output=True)
    same(report, InterferenceReport.load(report.save(tmp_path / "deep" / "report.safetensors")))
    other = tmp_path / "other"
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="wanted a report of interference"):
        InterferenceReport.load(other)


def test_parts_of_a_corpus_merge_to_the_whole() -> None:
    model = KINDS["llama"]()
    whole = measure(model, batch_size=1, output=True)
    first = measure(model, ids[:1], batch_size=1, output=True)
    later = measure(model, ids[1:], batch_size=1, output=True, first_prompt=1)
    same(whole, first.merge(later))
    with pytest.raises(ValueError, match="starts at prompt 1"):
        first.merge(first)
    other = measure(model, ids[1:], first_prompt=1, sparse=0.9, output=True)
    with pytest.raises(ValueError, match="equal settings"):
        first.merge(other)


def test_prompts_of_several_lengths_are_measured_as_if_alone() -> None:
    model = KINDS["llama"]()
    prompts = [row[: 10 + 4 * (i % 2)].tolist() for i, row in enumerate(ids)]
    together = measure(model, prompts)
    for i, prompt in enumerate(prompts):
        alone = measure(model, [prompt], first_prompt=i)
        for name in ("rows", "factored", "permuted", "loose"):
            axis = 3 if name == "permuted" else 4 if name == "loose" else 2
            got = getattr(together, name).take([i], axis)
            np.testing.assert_array_equal(got, getattr(alone, name), err_msg=name)
        np.testing.assert_allclose(together.predicted[:, :, [i]], alone.predicted, atol=1e-4)


def test_the_model_is_left_as_found(unchecked: None) -> None:
    model = models.tiny_gpt2()
    model.train()
    model.blocks[0].ln1.eval()
    model.add_hook("blocks.0.hook_in", lambda tensor, hook: None)
    model(ids)  # transformers sets itself up at the first pass
    before = Found(model)
    measure(model, output=True)
    before.assert_same(Found(model))
    with pytest.raises(ValueError, match="frozen at 1e-42"):
        measure(model, constants=[1e-42])
    before.assert_same(Found(model))


@pytest.mark.parametrize("option", ["spare_first", "output"])
def test_a_text_is_no_boolean(unchecked: None, option: str) -> None:
    with pytest.raises(TypeError, match=f"{option}: wanted True or False; got 'no'"):
        measure(models.tiny_llama(), **{option: "no"})


def test_targets_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: wanted output=True"):
        measure(models.tiny_llama(), targets=ids)


def test_scores_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="norm frozen at 1e-42 times its median; got NaN or inf"):
        measure(models.tiny_llama(), constants=[1e-42])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"constants": []}, "constants: wanted positive numbers"),
        ({"constants": [1.0, 1.0]}, "each once"),
        ({"constants": [0.0]}, "constants: wanted positive"),
        ({"constants": [math.nan]}, "constants: wanted positive"),
        ({"on": ["v"]}, "on: wanted one of"),
        ({"on": []}, "on: wanted some of"),
        ({"sparse": 1.5}, "sparse: wanted"),
        ({"draws": -1}, "draws: wanted an integer >= 0; got -1"),
        ({"layers": [7]}, "layers: wanted one of"),
        ({"batch_size": 0}, "batch_size: wanted"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measure(models.tiny_llama(), **options)


def test_frames_and_words(unchecked: None) -> None:
    report = measure(KINDS["gpt2"](), constants=[1.0, 2.0])
    frame = report.to_frame()
    assert len(frame) == 2 * 2 * 2 * 4
    assert frame.loc[0, "label"] == "L0H0"
    pooled = report.to_frame("model")
    each = frame[(frame["on"] == "k") & (frame["constant"] == 1)]
    weighted = (each["moved"] * each["rows"]).sum() / each["rows"].sum()
    assert pooled.loc[0, "moved"] == pytest.approx(weighted)
    assert set(report.to_frame("layer")["label"]) == {"L0", "L1"}
    with pytest.raises(ValueError, match="by: wanted"):
        report.to_frame("token")  # type: ignore[arg-type]
    said = report.summary()
    assert f"{pooled.loc[0, 'moved']:.2%}" in said
    assert "its median" not in said
    assert repr(report) == said


def test_no_sparse_row_is_said_in_words() -> None:
    report = measure(models.tiny_llama(qk_scale=0.01))
    assert report.rows.sum() == 0
    assert "No row has a maximum >= 0.95" in report.summary()
    assert report.to_frame("model")["moved"].isna().all()
