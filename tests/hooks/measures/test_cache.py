"""hooks.cache_risk: rows that move are those of the model, nats are those of its own gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import hooks
from hooks import CacheRisk, UnsupportedModelError, cache_risk
from hooks.measures.cache import read_format, stored
from hooks.measures.cache.errors import ScoreRows
from hooks.measures.cache.fisher import draw_seeds
from hooks.model import evaluating, hooked
from hooks.sites import as_hooked
from tests.support import models
from tests.support.watching import tiny_gemma2, tiny_opt

FORMATS = ("fp8-e4m3", "quanto-int4 group=8", "quanto-int2 group=8")
KINDS: dict[str, Any] = {**models.TINY, "gemma2": tiny_gemma2, "opt": tiny_opt}
ids = models.tokens(3, 24)


def measured(model: Any, tokens: Any = ids, **options: Any) -> CacheRisk:
    return cache_risk(model, tokens, **{"formats": FORMATS, "progress": False, **options})


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def report(model: Any) -> CacheRisk:
    return measured(model)


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama()


def passed(sites: Any, role: Any, form: str) -> tuple[str, Any]:
    """A hook that puts one layer's keys or values through a cache."""
    site = sites.vector(role).dot

    def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
        apart = site.by_position(x).transpose(1, 2)
        back = stored(read_format(form), role, apart).transpose(1, 2)
        return as_hooked(site, back)

    return site.hook, put


# -- rows -------------------------------------------------------------------------------------


def test_moved_rows_are_those_of_the_model(model: Any, report: CacheRisk) -> None:
    """The model itself, with one layer's keys as they come out of the cache."""
    unit = 0
    for sites in hooks.attention_sites(model):
        seen: list[Any] = []
        hooks.observe(model, [sites], hooks.encode(model, ids), seen.append)
        for at, form in enumerate(FORMATS):
            again: list[Any] = []
            put = [passed(sites, "k", form)]
            hooks.observe(model, [sites], hooks.encode(model, ids), again.append, hooks=put)
            sparse = (seen[0].pattern.amax(-1) >= 0.95) & (seen[0].visible.sum(-1) > 1)
            moved = sparse & (seen[0].scores.argmax(-1) != again[0].scores.argmax(-1))
            for head in range(sites.n_kv_heads):
                mine = [h for h, kv in enumerate(sites.kv_head_of) if kv == head]
                assert report.rows[unit + head].sum() == sparse[:, mine].sum()
                assert report.moved[at, unit + head].sum() == moved[:, mine].sum()
        unit += sites.n_kv_heads
    assert report.moved.sum() > 0


def test_no_row_moves_that_cannot(report: CacheRisk) -> None:
    assert (report.moved <= report.able).all()
    assert (report.able <= report.rows).all()
    assert 0 < report.able.sum() < len(FORMATS) * report.rows.sum()


@given(st.integers(0, 999), st.floats(0.01, 3.0))
def test_rows_that_cannot_move_stay_in_any_order_of_their_errors(seed: int, size: float) -> None:
    """By construction, with errors as large as the margins; and an order exists for the others."""
    view, rows, k = _rows(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    error = size * torch.randn(k.shape, generator=generator)
    found = rows.effects(error)
    assert (found["moved"] <= found["able"]).all()
    e = torch.einsum("bqhd,bkhd->bhqk", view.vectors["q"], error) * view.sites.score_scale[0]
    able = moved = 0
    for row in zip(*torch.where(rows.sparse), strict=True):
        seen = view.visible[row]
        w, mine = view.scores[row][seen], e[row][seen]
        star = int(w.argmax())
        moved += int((w + mine).argmax() != star)
        worst = mine.clone()  # the least error on the attended key, the largest on its rival
        rival = int(w.masked_fill(torch.arange(len(w)) == star, -torch.inf).argmax())
        order = mine.sort().values
        worst[star], worst[rival] = order[0], order[-1]
        able += int(w[rival] + worst[rival] > w[star] + worst[star])
    assert found["able"].sum() == able
    assert found["moved"].sum() == moved


@given(st.integers(0, 999))
def test_a_constant_for_a_whole_row_is_no_error(seed: int) -> None:
    """The same vector added to all keys adds q . c to each score of a row."""
    _, rows, k = _rows(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    error = torch.randn(k.shape, generator=generator)
    shift = torch.randn(k.shape[-1], generator=generator)
    one, other = rows.effects(error), rows.effects(error + shift)
    np.testing.assert_allclose(one["score"], other["score"], rtol=1e-3, atol=1e-5)
    nothing = rows.effects(shift.expand(k.shape))
    assert (nothing["moved"] == 0).all()
    assert (nothing["score"] <= 1e-6 * (1 + other["score"])).all()


@lru_cache
def _sites() -> Any:
    first = next(iter(hooks.attention_sites(models.tiny_gpt2())))
    return replace(first, score_scale=(0.5,) * 4)


def _rows(seed: int) -> tuple[Any, ScoreRows, torch.Tensor]:
    """Causal rows of random queries and keys, in a view of their own."""
    sites = _sites()
    generator = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(2, 9, 4, 8, generator=generator) for _ in "qk")
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    scores = s.masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(s.dtype).min)
    vectors: dict[Any, Any] = {"q": q, "k": k}
    view = hooks.LayerView(0, sites, [0, 1], scores, scores.softmax(-1), vectors, None)
    return view, ScoreRows(view, 0.95, None), k


def test_full_precision_costs_nothing(llama: Any) -> None:
    report = measured(llama, formats=["full"])
    for name in ("risk_k", "risk_v", "norm_k", "direction_v", "score", "able", "moved"):
        assert (getattr(report, name) == 0).all()


# -- nats -------------------------------------------------------------------------------------


def test_the_risk_is_that_of_directional_derivatives() -> None:
    """One token's error at a time, as a finite difference of the model's own log-probabilities."""
    form, prompt = FORMATS[2], models.tokens(1, 7)
    model = models.tiny_gpt2().to(torch.float64)
    report = measured(model, prompt, formats=[form], samples=3, seed=5)
    unit = 0
    for sites in hooks.attention_sites(model):
        for role in ("k", "v"):
            wanted = np.zeros(sites.n_kv_heads)
            for head in range(sites.n_kv_heads):
                for at in range(7):
                    slopes = _slopes(model, prompt, sites, role, form, (at, head))
                    wanted[head] += np.square(slopes).mean() / 2
            found = getattr(report, f"risk_{role}")[0, unit : unit + sites.n_kv_heads, 0]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-12)
        unit += sites.n_kv_heads


def _slopes(
    model: Any, prompt: Any, sites: Any, role: Any, form: str, where: tuple[int, int]
) -> list[float]:
    """d/ds sum_t u_t . z_t along one vector's error, for three drawn u."""
    site, (at, head) = sites.vector(role).dot, where

    def logits(step: float) -> torch.Tensor:
        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            apart = site.by_position(x).clone()
            back = stored(read_format(form), role, apart.transpose(1, 2)).transpose(1, 2)
            apart[0, at, head] += step * (back - apart)[0, at, head]
            return as_hooked(site, apart)

        with evaluating(model), hooked(model, [(site.hook, put)]):
            return model(prompt)

    step = 1e-4
    log_p = logits(0.0).float().log_softmax(-1)
    change = (logits(step) - logits(-step)) / (2 * step)
    drawn = [draw_seeds(log_p, [(5, 0, sample)]) for sample in range(3)]
    return [float((u * change).sum()) for u in drawn]


P = [0.5, 0.25, 0.2, 0.049, 0.001, 0.0]


def test_seeds_have_the_fisher_information_of_the_logits() -> None:
    n, p = 40_000, torch.tensor(P)
    u = draw_seeds(p.log().expand(1, n, 6), [(0, 1)])[0]
    torch.testing.assert_close(u.sum(-1), torch.zeros(n), atol=1e-6, rtol=0)  # softmax ignores it
    fisher, found = torch.diag(p) - torch.outer(p, p), u.T @ u / n
    scatter = torch.einsum("ni,nj->nij", u, u).std(0) / n**0.5
    assert ((found - fisher).abs() <= 5 * scatter + 1e-6).all()
    assert (u[:, -1] == 0).all()  # a token that is impossible


def test_seeds_of_a_prompt_are_its_own(llama: Any) -> None:
    log_p = torch.randn(3, 7, 11).log_softmax(-1)
    both = draw_seeds(log_p, [(0, 1), (0, 2), (0, 1)])
    assert torch.equal(both[1:2], draw_seeds(log_p[1:2], [(0, 2)]))
    signs = [(u / p.sqrt() > 0) for u, p in zip(both, log_p.exp(), strict=True)]
    assert not torch.equal(signs[0], signs[1])


def test_seeds_tell_more_of_rare_tokens_than_drawn_tokens_do() -> None:
    """Squares with one mean: those along a rare token's logit scatter less."""
    p = torch.tensor(P).double()
    u = draw_seeds(p.log().expand(1, 40_000, 6), [(3,)])[0][:, 4]
    rare = p[4]
    drawn = torch.tensor([(1 - rare) ** 2, rare**2])  # the token's score, drawn or not
    mean = rare * drawn[0] + (1 - rare) * drawn[1]
    spread = rare * drawn[0] ** 2 + (1 - rare) * drawn[1] ** 2 - mean**2
    assert float((u**2).mean()) == pytest.approx(float(mean), rel=0.02)
    assert float((u**2).var()) < float(spread) / 100


def test_the_risk_predicts_the_kl_of_small_errors(llama: Any) -> None:
    """Layer by layer, keys and values apart: the model's own KL under an 8-bit cache."""
    prompts = models.tokens(6, 40, seed=1)
    frame = measured(llama, prompts, formats=["fp8-e4m3"], samples=32).to_frame("layer")
    with evaluating(llama):
        clean = llama(prompts).double().log_softmax(-1)
    for i, sites in enumerate(hooks.attention_sites(llama)):
        for role in ("k", "v"):
            with evaluating(llama), hooked(llama, [passed(sites, role, "fp8-e4m3")]):
                now = llama(prompts).double().log_softmax(-1)
            kl = float((clean.exp() * (clean - now)).sum(-1).mean())
            assert 0.5 < frame[f"risk_{role}"][i] / kl < 2


# -- one pass ---------------------------------------------------------------------------------


def test_parts_merge_into_the_whole_whatever_the_batch(model: Any, report: CacheRisk) -> None:
    parts = [measured(model, ids[:1]), measured(model, ids[1:], first_prompt=1, batch_size=1)]
    joined = parts[0].merge(parts[1])
    assert joined.settings == report.settings
    for name in ("risk_k", "risk_v", "score", "norm_k", "direction_v"):
        np.testing.assert_allclose(getattr(joined, name), getattr(report, name), rtol=2e-3)
    for name in ("rows", "moved", "able", "examined", "vectors", "positions"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(report, name))


def test_the_model_is_left_as_it_was(model: Any) -> None:
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    grads, training = torch.is_grad_enabled(), model.training
    before = hooks.model.fingerprint(model)
    measured(model)
    assert all(p.grad is None for p in model.parameters())
    assert asked == {n: p.requires_grad for n, p in model.named_parameters()}
    assert (grads, training) == (torch.is_grad_enabled(), model.training)
    assert before == hooks.model.fingerprint(model)


def test_frozen_weights_and_no_grad_change_nothing(llama: Any) -> None:
    wanted = measured(llama).risk_v
    with torch.no_grad():
        np.testing.assert_allclose(measured(llama).risk_v, wanted, rtol=1e-6)
    llama.requires_grad_(False)
    try:
        np.testing.assert_allclose(measured(llama).risk_v, wanted, rtol=1e-6)
    finally:
        llama.requires_grad_(True)


def test_without_samples_there_is_no_backward_pass(llama: Any) -> None:
    report, whole = measured(llama, samples=0), measured(llama)
    assert report.to_frame("model")["risk"].isna().all()
    np.testing.assert_array_equal(report.moved, whole.moved)
    with pytest.raises(ValueError, match="recipe: wanted a report with samples"):
        report.recipe()


def test_frames_add_up(report: CacheRisk) -> None:
    heads, layers, whole = (report.to_frame(by) for by in ("head", "layer", "model"))
    for at, name in enumerate(FORMATS):
        for column in ("rows", "sinks", "risk", "risk_k", "risk_v"):
            sums = [f[f["format"] == name][column].sum() for f in (heads, layers, whole)]
            assert sums == pytest.approx([sums[0]] * 3)
        row = whole.iloc[at]
        assert row["risk"] == pytest.approx(row["risk_k"] + row["risk_v"])
        assert row["bits_k"] == read_format(name).bits("k", report.model["d_key"][0])
    assert report.heads(FORMATS[1])["risk"].is_monotonic_decreasing


def test_a_file_gives_the_report(report: CacheRisk, tmp_path: Path) -> None:
    again = CacheRisk.load(report.save(tmp_path / "report.safetensors"))
    assert again.settings == report.settings
    assert str(again) == str(report)
    np.testing.assert_array_equal(again.risk_k, report.risk_k)


# -- refusals ---------------------------------------------------------------------------------


def test_default_formats_that_refuse_the_heads_are_named(llama: Any) -> None:
    """Heads of 8: no block of 32 channels; prompts as short as KIVI's window."""
    report = measured(llama, formats=None)
    assert set(report.model["left_out"]) == {"q8_0", "q5_0", "q4_0", "kivi-int4", "kivi-int2"}
    assert "Formats that refuse these heads: q8_0" in str(report)
    with pytest.raises(ValueError, match="formats: q4_0: wanted a multiple of 32"):
        measured(llama, formats=["q4_0"])
    with pytest.raises(ValueError, match="kivi-int4 group=8: wanted a prompt longer than its"):
        measured(llama, formats=["kivi-int4 group=8"])


def test_every_prompts_length_counts(llama: Any) -> None:
    """A format that stores only the longest one is refused, or left out, with the prompt's name."""
    mixed = [models.tokens(1, 40)[0].tolist(), models.tokens(1, 10)[0].tolist()]
    with pytest.raises(
        ValueError, match="prompt 1, of 10 tokens: wanted a prompt longer than its window of 32"
    ):
        measured(llama, mixed, formats=["kivi-int2 group=8 window=32"])
    with pytest.raises(ValueError, match="prompt 8, of 10 tokens"):  # as part of a corpus
        measured(llama, mixed, formats=["kivi-int2 group=8 window=32"], first_prompt=7)
    uneven = [row[:n] for row, n in zip(mixed[:1] * 2, (24, 23), strict=True)]
    report = measured(llama, uneven, formats=None)
    assert report.model["left_out"]["quanto-int4"].startswith("prompt 1, of 23 tokens: wanted a")
    assert "quanto-int4" not in measured(llama, uneven[:1], formats=None).model["left_out"]


def scaled(model: Any, part: str, inverse: str, by: float) -> Any:
    """The same function of the input, with one projection of layer 1 ``by`` times as large."""
    with torch.no_grad():
        for name, weight in model.original_model.named_parameters():
            if "layers.1" in name:
                weight.mul_(by if part in name else 1 / by if inverse in name else 1)
    return model


def test_what_overflows_is_never_chosen(tmp_path: Path) -> None:
    """Values of 3e5 are infinite in e5m2; e4m3 and integers bear them badly, but in numbers."""
    model = scaled(models.tiny_llama(), "v_proj", "o_proj", 3e5)
    forms = ("fp8-e5m2", *FORMATS)
    report = measured(model, formats=forms)
    frame = report.to_frame("layer").set_index(["format", "layer"])
    assert np.isinf(frame.loc["fp8-e5m2", 1]["risk"])
    assert "L1 overflows in fp8-e5m2" in str(report)
    for bits in (6.0, 8.0, 16.0):
        without = report.recipe(bits, formats=[*FORMATS, "full"])
        assert report.recipe(bits).risk <= without.risk < np.inf
    assert report.recipe(16.0).risk == 0
    with pytest.raises(ValueError, match="formats: wanted one that does not overflow in layer 1"):
        report.recipe(8.0, formats=["fp8-e5m2"])
    with pytest.raises(ValueError, match="formats: wanted one that does not overflow in layer 1"):
        report.recipe(8.0, formats=["fp8-e5m2"], together=True)
    again = CacheRisk.load(report.save(tmp_path / "r.safetensors"))
    np.testing.assert_array_equal(again.direction_v, report.direction_v)


def test_rows_with_an_infinite_key_move() -> None:
    model = scaled(models.tiny_llama(), "k_proj", "q_proj", 3e6)
    frame = measured(model, formats=["fp8-e5m2"], samples=0, sparse=0.2).to_frame("layer")
    assert frame["rows"][1] > 0
    assert frame["moved"][1] == frame["able"][1] == 1
    assert np.isinf(frame["score"][1])
    assert frame["direction_k"][1] > 0.9


def test_layers_with_other_keys_have_their_own_means() -> None:
    """A decoder's own attention reads 9 tokens, its cross-attention 30."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = models.bridge(T5ForConditionalGeneration, config)
    how: Any = {"decoder_tokens": models.tokens(1, 9), "formats": FORMATS[:1], "samples": 0}
    chosen = [2, 3, 4, 5]
    columns = [f"{what}_{role}" for what in ("norm", "direction") for role in "kv"]
    whole = measured(model, models.tokens(1, 30), layers=chosen, **how)
    assert list(whole.to_frame("layer")["label"]) == ["D0", "X0", "D1", "X1"]
    for layer in chosen:
        one = measured(model, models.tokens(1, 30), layers=[layer], **how)
        mine = whole.to_frame("layer").set_index("layer").loc[layer][columns].astype(float)
        alone = one.to_frame("layer").set_index("layer").loc[layer][columns].astype(float)
        np.testing.assert_allclose(mine, alone, rtol=1e-12)
    made = measured(
        model, models.tokens(1, 30), layers=chosen, **how | {"samples": 1}
    ).recipe(16.0)  # fmt: skip
    for ask in (made.cache, lambda: made.export("vllm")):
        with pytest.raises(ValueError, match=r"recipe: wanted a model of one stack.* an encoder"):
            ask()


def test_attention_to_later_tokens_has_no_cache() -> None:
    from qkvnorm_lens.models.bridge import to_bridge
    from qkvnorm_lens.models.config import QKVNormConfig
    from qkvnorm_lens.models.model import QKVNormTransformer

    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 1, "n_ctx": 32, "d_vocab": 97}
    cfg = QKVNormConfig(placement="pre", d_mlp=20, attention_dir="bidirectional", **sizes)
    model = to_bridge(QKVNormTransformer(cfg).eval())
    with pytest.raises(UnsupportedModelError, match="keys that a cache can hold"):
        measured(model)
