"""Rows kept for showing: the model's own attention, before and after noise it can be run under."""

from __future__ import annotations

import functools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import qkvnorm_lens
from hooks import CollapseReport, KeptRows, NormNoise, attention_sites, collapse_probe
from hooks.collapse.kept import no_rows
from hooks.collapse.showing import DRAWS, MARGINS
from hooks.model.encoding import encode
from hooks.sites.watch import observe
from qkvnorm_lens.page.report import html_report
from qkvnorm_lens.plots.html.rows import shown_rows
from tests.support import builders, models

ids = models.tokens()
SIGMAS = [0.1, 0.4]


@pytest.fixture(scope="module", params=models.TINY)
def model(request: pytest.FixtureRequest) -> Any:
    return models.TINY[request.param]()


def probe(model: Any, tokens: Any = ids, **options: Any) -> CollapseReport:
    return collapse_probe(
        model, tokens, progress=False, **({"draws": 0, "sigmas": SIGMAS} | options)
    )


def pattern(model: Any, tokens: torch.Tensor, layer: int) -> np.ndarray:
    """The layer's attention in the running hooks, [prompt, head, query, key]."""
    kept: list[torch.Tensor] = []
    name = attention_sites(model).layer(layer).pattern
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: kept.append(x.clone()))]):
        model(tokens)
    return kept[0].numpy()


def same(one: KeptRows, other: KeptRows) -> None:
    for f in fields(KeptRows):
        np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name), f.name)


@pytest.mark.parametrize(
    "options",
    [{}, {"on": "k", "shared": "token", "law": "gaussian", "seed": 3, "sigmas": [0.02, 0.1]}],
    ids=["qk", "k, one factor per token"],
)
def test_the_rows_are_what_the_model_does_under_that_noise(
    model: Any, options: dict[str, Any]
) -> None:
    report = probe(model, keep_rows=6, first_prompt=5, **options)
    assert len(report.kept) == 6
    shown = 0
    for i in range(6):
        layer = int(report.settings.layers[report.kept.layer[i]])
        at = tuple(int(getattr(report.kept, n)[i]) for n in ("prompt", "head", "query"))
        clean, noisy = report.kept.weights(i)
        np.testing.assert_allclose(pattern(model, ids, layer)[at][: len(clean)], clean, atol=2e-5)
        assert clean.argmax() == report.kept.key[i]
        if report.kept.draw[i] < 0:
            continue
        shown += 1
        noise = report.kept_noise(i)
        with noise.applied(model, first_prompt=report.first_prompt):
            row = pattern(model, ids, layer)[at]
        np.testing.assert_allclose(row[: len(noisy)], noisy, atol=2e-5)
        assert not row[len(noisy) :].any()
        assert row.argmax() == report.kept.lands[i] != report.kept.key[i]
    assert shown >= 4


def test_they_are_the_most_fragile_in_their_order(model: Any) -> None:
    report = probe(model, keep_rows=9)
    wanted, got = report.fragile(9), report.kept_rows()
    assert len(got) == 9
    for column in wanted.columns:
        assert got[column].tolist() == wanted[column].tolist(), column
    assert (got["before"] >= report.settings.sparse - 1e-6).all()
    moved = got[got["draw"] >= 0]
    assert (moved["gained"] >= moved["after"]).all()
    # Uniform noise below the certificate moves nothing.
    assert (moved["shown_sigma"] >= moved["sigma"] * 0.999).all()


@pytest.mark.parametrize("law", ["uniform", "lognormal"])
def test_no_draw_moves_the_row_at_less(llama: Any, law: str) -> None:
    """An independent search, with NormNoise's own factors on the clean scores."""
    report = probe(llama, law=law, keep_rows=2)
    for i in range(2):
        least = report.kept.sigma[i] / MARGINS[0]
        assert _moves(llama, report, i, 1.001 * least, int(report.kept.draw[i]))
        for sigma in np.linspace(0.02, 0.999 * least, 5):
            assert not any(_moves(llama, report, i, float(sigma), d) for d in range(DRAWS))


def _moves(model: Any, report: CollapseReport, i: int, sigma: float, draw: int) -> bool:
    kept = report.kept
    layer, head = int(report.settings.layers[kept.layer[i]]), int(kept.head[i])
    sites = _sites(model).layer(layer)
    prompt, query, star = (int(getattr(kept, n)[i]) for n in ("prompt", "query", "key"))
    scores = _scores(model, layer)[prompt, head, query, : len(kept.weights(i)[0])]
    f = NormNoise(sigma=sigma, on="k", law=report.settings.law, draw=draw).factors(
        layer=layer, role="k", n_heads=sites.n_kv_heads, prompts=[prompt], n_pos=len(scores)
    )
    factor = f[0, :, sites.kv_head_of[head]].double().numpy()
    return int((factor * scores).argmax()) != star


@functools.cache
def _sites(model: Any) -> Any:
    return attention_sites(model)


@functools.cache
def _scores(model: Any, layer: int) -> np.ndarray:
    kept: list[torch.Tensor] = []
    name = _sites(model).layer(layer).scores
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: kept.append(x.clone()))]):
        model(ids)
    return kept[0].double().numpy()


@settings(max_examples=3)
@given(cut=st.integers(1, 4), keep=st.integers(0, 40), room=st.sampled_from([12, 1 << 19]))
def test_parts_of_a_corpus_keep_what_the_whole_keeps(cut: int, keep: int, room: int) -> None:
    model, corpus = _small(), models.tokens(5, 20)
    options: dict[str, Any] = {"keep_rows": keep, "keep": room}
    whole = probe(model, corpus, batch_size=2, **options)
    parts = (
        probe(model, corpus[:cut], **options),
        probe(model, corpus[cut:], first_prompt=cut, **options),
    )
    same(parts[0].merge(parts[1]).kept, whole.kept)
    assert len(whole.kept) == min(keep, int(np.isfinite(whole.table.half_width).sum()))


_MODELS: list[Any] = []


def _small() -> Any:
    if not _MODELS:
        _MODELS.append(models.tiny_gpt2())
    return _MODELS[0]


def test_blocks_and_batches_change_nothing() -> None:
    model = _small()
    whole = probe(model, batch_size=3)
    for other in (probe(model, batch_size=1), probe(model, batch_size=2, query_block=5)):
        np.testing.assert_allclose(other.kept.clean, whole.kept.clean, atol=2e-6)
        np.testing.assert_array_equal(other.kept.query, whole.kept.query)


def test_a_report_comes_back_from_disk_with_them(llama: Any, tmp_path: Path) -> None:
    report = probe(llama)
    assert len(report.kept) == report.settings.keep_rows == 16
    loaded = CollapseReport.load(report.save(tmp_path / "r.safetensors"))
    same(loaded.kept, report.kept)
    assert loaded.settings == report.settings


def test_a_report_from_before_rows_were_kept_still_loads(llama: Any, tmp_path: Path) -> None:
    path = probe(llama).save(tmp_path / "new.safetensors")
    with safe_open(path, "np") as file:
        head = dict(file.metadata())
        arrays = {n: file.get_tensor(n) for n in file.keys() if not n.startswith("kept.")}  # noqa: SIM118
    assert '"keep_rows": 16' in head["settings"]
    head["settings"] = head["settings"].replace(', "keep_rows": 16', "")
    head["format"] = "qkvnorm-lens collapse report 3"
    del head["digest"]
    old = tmp_path / "old.safetensors"
    save_file(arrays, old, metadata=head)
    report = CollapseReport.load(old)
    assert len(report.kept) == 0
    assert report.settings.keep_rows == 0
    assert report.kept_rows().empty
    assert len(report.fragile(5)) == 5


def test_nothing_is_kept_where_none_was_wanted_or_can_move(llama: Any) -> None:
    for report in (probe(llama, keep_rows=0), probe(llama, on="v"), probe(llama, on="q")):
        same(report.kept, no_rows())
        assert report.kept_rows().empty
        with pytest.raises(IndexError, match="got 0"):
            report.kept_noise(0)


@pytest.mark.parametrize("wrong", [-1, 1.5, "3", None])
def test_a_wrong_number_is_refused(llama: Any, wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="keep_rows"):
        probe(llama, keep_rows=wrong)


def test_a_row_that_no_draw_moves_has_no_noise(llama: Any) -> None:
    report = probe(llama)
    sigma, draw = report.kept.sigma.copy(), report.kept.draw.copy()
    sigma[0], draw[0] = math.nan, -1
    still = replace(report, kept=replace(report.kept, sigma=sigma, draw=draw))
    assert still.kept_rows()["lands_token"].iloc[0] == ""
    assert still.kept.lands[0] == -1
    with pytest.raises(ValueError, match="none does"):
        still.kept_noise(0)


def test_an_addition_model_too() -> None:
    model = qkvnorm_lens.load_model("addition-pre")
    report = probe(model, "[12+34-N5=51", keep_rows=2)
    for i in range(len(report.kept)):
        with report.kept_noise(i).applied(model):
            at = [int(getattr(report.kept, n)[i]) for n in ("layer", "prompt", "head", "query")]
            tokens = model.to_tokens("[12+34-N5=51")
            row = pattern(model, tokens, at[0])[at[1], at[2], at[3]]
        np.testing.assert_allclose(row[: at[3] + 1], report.kept.weights(i)[1], atol=2e-5)


# -- models that are no plain decoder ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:transformer_lens", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("T5ForConditionalGeneration", None),
        ("GptOssForCausalLM", "gqa"),
        ("Gemma2ForCausalLM", "gqa"),
    ],
)
def test_other_kinds_of_attention(name: str, heads: str | None) -> None:
    """Cross-attention, a bias and two stacks; a sink's score; a soft cap."""
    options = {"decoder_start_token_id": 2} if name.startswith("T5") else {}
    model = builders.build(name, heads, **options).model
    read = {"decoder_tokens": models.tokens(2, 13, seed=2)} if options else {}
    seen = models.tokens(2, 17)
    report = probe(model, seen, sparse=0.4, keep_rows=8, **read)
    kept, prompts = report.kept, encode(model, seen, **read)
    assert (kept.draw >= 0).sum() >= 6
    for i in np.flatnonzero(kept.draw >= 0):
        sites = attention_sites(model).layer(report.settings.layers[kept.layer[i]])
        hooks = report.kept_noise(int(i)).hooks(model)
        views: list[np.ndarray] = []
        observe(
            model, [sites], prompts, lambda v, to=views: to.append(v.pattern.numpy()), hooks=hooks
        )
        row = views[0][tuple(int(getattr(kept, n)[i]) for n in ("prompt", "head", "query"))]
        _, noisy = kept.weights(int(i))
        np.testing.assert_allclose(row[: len(noisy)], noisy, atol=3e-5)
    page = html_report(report, views=False)
    for row in shown_rows(report, 3):
        assert row.label in page
    assert report.kept_rows()["lands_token"].map(len).gt(0).any()


@pytest.mark.filterwarnings("ignore::UserWarning:transformer_lens", "ignore::FutureWarning")
def test_pictures_have_positions_for_tokens() -> None:
    made = builders.build("ViTForImageClassification")
    (signal,), _ = made.inputs(2, 15, 0)
    report = probe(made.model, signal, sparse=0.3, keep_rows=4)
    assert len(report.kept) > 0
    assert report.kept_rows()["key_token"].str.isdigit().all()
    page = html_report(report, views=False)
    assert 'data-tab="text"' not in page
