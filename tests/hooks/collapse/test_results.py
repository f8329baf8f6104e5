"""CollapseReport: frames, thresholds, fragile rows, words, files."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooks import CollapseReport, attention_sites, collapse_probe, rank_profile
from hooks.collapse import reduce
from hooks.collapse.table import COMPLETE, TableParts
from tests.support import models
from tests.support.watching import attn, shape_checks_off, watch

ids = models.tokens()
SIGMAS = [0.05, 0.1, 0.2, 0.3, 0.5]
ALL = {  # plain, with a bias, with a shield
    "llama": models.tiny_llama,
    "bloom": models.tiny_bloom,
    "qwen3": models.tiny_qwen3,
}


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]()


@pytest.fixture(scope="module")
def report(model: Any) -> CollapseReport:
    return probe(model)


def probe(model: Any, tokens: Any = ids, **options: Any) -> CollapseReport:
    return collapse_probe(
        model, tokens, progress=False, **({"draws": 3, "sigmas": SIGMAS} | options)
    )


# -- frames -----------------------------------------------------------------------------------


def test_rates_pool_rows_they_do_not_average_heads(report: CollapseReport) -> None:
    heads = report.to_frame()
    assert list(heads.columns[:3]) == ["sigma", "layer", "head"]
    assert len(heads) == len(SIGMAS) * 2 * 4
    for by, keys in (("layer", ["sigma", "layer"]), ("model", ["sigma"])):
        pooled = report.to_frame(by)
        for column in ("loose", "strict", "loose_centred", "score_level"):
            weighted = heads.assign(x=heads[column].fillna(0) * heads["rows"]).groupby(keys)
            wanted = weighted["x"].sum() / weighted["rows"].sum()
            np.testing.assert_allclose(pooled[column], wanted.to_numpy(), rtol=1e-12, atol=1e-15)
        content = heads.assign(n=heads["rows"] - heads["sinks"])
        content["x"] = content["loose_content"].fillna(0) * content["n"]
        sums = content.groupby(keys)[["x", "n"]].sum()
        np.testing.assert_allclose(pooled["loose_content"], (sums["x"] / sums["n"]).to_numpy())
        for column in ("rows", "sinks"):
            wanted = heads.groupby(keys)[column].sum().to_numpy()
            assert pooled[column].tolist() == wanted.tolist()
    averaged = heads.groupby("sigma")["loose"].mean().to_numpy()
    assert np.abs(averaged - report.to_frame("model")["loose"]).max() > 1e-6
    assert (heads["rows"] >= heads["sinks"]).all()
    assert heads["sinks"].sum() > 0


def test_rates_rise_with_sigma_and_strict_is_no_more_than_loose(model: Any) -> None:
    exact, sampled = probe(model), probe(model, method="sample", draws=8)
    for frame in (exact.to_frame(), sampled.to_frame()):
        rates = frame.pivot_table(index="sigma", columns=["layer", "head"], values="loose")
        if frame is not sampled:
            assert (rates.diff().dropna() >= -1e-4).all(axis=None)
        assert rates.iloc[-1].min() > 0
    frame = sampled.to_frame()
    assert (frame["strict"] <= frame["loose"] + 1e-12).all()
    assert frame["strict"].max() > 0
    # The strict rate is the same sample under both methods.
    both = probe(model, draws=8)
    np.testing.assert_array_equal(both.strict_draws, sampled.strict_draws)
    # The computed one lies between its bounds, and where draws put it.
    frame = probe(model, draws=300).to_frame("model")
    assert (frame["strict_low"] <= frame["strict"]).all()
    assert (frame["strict"] <= frame["strict_high"]).all()
    away = (frame["strict"] - frame["strict_drawn"]).abs()
    assert (away <= 4 * frame["se_strict"] + 1e-3).all()
    assert (frame["strict"] <= frame["loose"] + 1e-12).all()


def test_errors_over_draws_are_those_of_the_draws(llama: Any) -> None:
    n = 12
    report = probe(llama, method="sample", draws=n)
    frame = report.to_frame("layer")
    rates = report.loose_draws.sum((-1, -2)) / report.rows.sum((1, 2, 3))  # [sigma, draw, layer]
    np.testing.assert_allclose(frame["loose"], rates.mean(1).ravel())
    np.testing.assert_allclose(frame["se"], (rates.std(1, ddof=1) / math.sqrt(n)).ravel())
    assert (frame["se"].iloc[-2:] > 0).all()
    assert frame["se_prompts"].notna().all()
    assert (probe(llama).to_frame()["se"] == 0).all()
    assert probe(llama, ids[:1]).to_frame()["se_prompts"].isna().all()


def test_the_bootstrap_is_over_prompts(llama: Any) -> None:
    """Copies of one prompt leave nothing open; prompts that differ do."""
    same = probe(llama, ids[:1].expand(4, -1)).to_frame("model")
    np.testing.assert_allclose(same["se_prompts"], 0, atol=1e-12)
    tokens = models.tokens(12, 24)
    report = probe(llama, tokens, draws=0)
    got = report.to_frame("model")["se_prompts"].iloc[-1]
    # The delta method for a ratio of sums, an independent approximation of the same.
    sums = report.loose[-1].sum((0, 1, 3))
    rows = report.rows.sum((0, 1, 3))
    residual = sums - sums.sum() / rows.sum() * rows
    assert got == pytest.approx(math.sqrt((residual**2).sum()) / rows.sum(), rel=0.2)


def test_a_strict_rate_that_is_not_known_is_none(llama: Any) -> None:
    """Below 0.5 several tokens can be sparse at once: only draws tell."""
    report = probe(llama, sparse=0.5, draws=0)
    frame = report.to_frame("model")
    assert frame["loose"].iloc[-1] > 0.1
    for name in ("strict", "strict_low", "strict_high", "strict_drawn", "se_strict"):
        assert frame[name].isna().all()
    with pytest.raises(ValueError, match="strict: wanted a report with strict rates; got one"):
        report.sigma_at(strict=True)
    skipped = probe(llama, draws=0, strict=False).to_frame("model")
    assert skipped["strict"].isna().all()
    np.testing.assert_array_equal(skipped["loose"], probe(llama).to_frame("model")["loose"])
    drawn = probe(llama, sparse=0.5, draws=4).to_frame("model")
    np.testing.assert_allclose(drawn["strict"], drawn["strict_drawn"], rtol=1e-12)


def test_the_sigma_of_a_strict_rate(llama: Any) -> None:
    """On the grid it is the grid's; between two sigmas it lies between them."""
    report = probe(llama, sigmas=np.linspace(0.02, 0.5, 25).tolist())
    curve = report.to_frame("model").set_index("sigma")["strict"]
    sigma = float(curve.index[12])
    assert report.sigma_at(float(curve.iloc[12]), strict=True) == pytest.approx(sigma)
    rate = float(curve.iloc[12:14].mean())
    assert sigma < report.sigma_at(rate, strict=True) < curve.index[13]
    finer = probe(llama, sigmas=np.linspace(0.01, 0.5, 99).tolist())
    wanted = finer.sigma_at(rate, strict=True)
    assert report.sigma_at(rate, strict=True) == pytest.approx(wanted, rel=2e-3)
    assert report.sigma_at(0.99, strict=True) == math.inf
    assert report.sigma_at(0.01, strict=True) >= report.sigma_at(0.01)
    by_head = report.sigma_at(0.01, by="head", strict=True)
    assert by_head.shape == report.rows.shape[:2]


def test_an_unknown_pooling_is_refused(llama: Any) -> None:
    report = probe(llama)
    with shape_checks_off():
        for call in (report.to_frame, lambda by: report.sigma_at(by=by)):
            with pytest.raises(ValueError, match=r"by: wanted one of .*got 'neuron'"):
                call("neuron")


# -- thresholds -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_the_rate_at_sigma_at_is_the_rate(model: Any, report: CollapseReport, rate: float) -> None:
    """Solved off the grid: a new probe at that very sigma measures the rate."""
    sigma = report.sigma_at(rate)
    assert isinstance(sigma, float)
    assert 0 < sigma < 0.577
    again = probe(model, sigmas=[sigma], draws=0).to_frame("model")
    assert again["loose"][0] == pytest.approx(rate, abs=1e-5)
    content = report.sigma_at(rate, content=True)
    again = probe(model, sigmas=[content], draws=0).to_frame("model")
    assert again["loose_content"][0] == pytest.approx(rate, abs=1e-5)


def test_sigma_at_for_each_layer_and_head(model: Any, report: CollapseReport) -> None:
    layers, heads = report.sigma_at(0.05, by="layer"), report.sigma_at(0.05, by="head")
    assert isinstance(layers, pd.Series)
    assert isinstance(heads, pd.DataFrame)
    assert list(layers.index) == list(heads.index) == [0, 1]
    assert heads.shape == (2, 4)
    for layer, sigma in layers.items():
        frame = probe(model, sigmas=[sigma], draws=0).to_frame("layer").set_index("layer")
        assert frame.loc[layer, "loose"] == pytest.approx(0.05, abs=1e-5)
    for layer, head in ((0, 2), (1, 1)):
        sigma = float(heads.loc[layer, head])
        frame = probe(model, sigmas=[sigma], draws=0).to_frame().set_index(["layer", "head"])
        assert frame.loc[(layer, head), "loose"] == pytest.approx(0.05, abs=1e-5)


def test_sigma_at_rises_with_the_rate(report: CollapseReport) -> None:
    rates = [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.15]
    sigmas = [report.sigma_at(rate) for rate in rates]
    assert all(a < b for a, b in itertools.pairwise(sigmas))
    first = float(report.table.half_width.min()) / math.sqrt(3)
    assert first < sigmas[0]


def test_sigma_at_never_and_nowhere(llama: Any) -> None:
    few = probe(llama, ids[2:, :2])
    counts = few.rows.sum((-1, -2))
    assert (counts == 0).any()
    heads = few.sigma_at(0.01, by="head")
    assert isinstance(heads, pd.DataFrame)
    assert np.array_equal(np.isnan(heads.to_numpy()), counts == 0)
    assert probe(llama).sigma_at(0.95) == math.inf  # no head loses nearly all of its rows
    assert probe(llama, on="v").sigma_at(0.01) == math.inf
    for rate in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="rate: wanted a share between 0 and 1; got"):
            few.sigma_at(float(rate))


@pytest.mark.parametrize(("law", "rate"), [("gaussian", 0.05), ("lognormal", 0.2)])
def test_sigma_at_under_other_laws(llama: Any, law: str, rate: float) -> None:
    sigma = probe(llama, law=law, sigmas=[0.1]).sigma_at(rate)
    again = probe(llama, law=law, sigmas=[sigma], draws=0).to_frame("model")
    assert again["loose"][0] == pytest.approx(rate, abs=1e-5)


RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2)


@pytest.mark.parametrize("content", [False, True])
def test_a_full_table_still_answers_exactly_below_its_cutoff(model: Any, content: bool) -> None:
    """It lists the nearest of all rows; beyond them the grid's own rates answer, nearly."""
    whole = probe(model)
    assert whole.able.sum() == len(whole.table.a)
    few = probe(model, keep=len(whole.table.a) // 4)
    assert np.array_equal(whole.loose, few.loose)  # the rates themselves know all competitors
    assert 0.9 * len(whole.table.a) / 4 <= len(few.table.a) <= len(whole.table.a) // 4
    assert few.table.a.max() < few.table.cutoff <= np.sort(whole.table.a)[len(few.table.a)]
    below, beyond = 0, 0
    for rate in RATES:
        sigma = whole.sigma_at(rate, content=content)
        near = math.sqrt(3) * sigma <= few.table.cutoff
        assert few.sigma_at(rate, content=content) == pytest.approx(
            sigma, rel=1e-6 if near else 0.02
        )
        below, beyond = below + near, beyond + (not near)
    assert below
    assert beyond


def test_sigmas_closer_together_stand_in_for_a_table(model: Any) -> None:
    """What a table of one competitor lacks is a line between two sigmas: the fewer, the worse."""
    missed = []
    for n in (17, 33, 129):
        sigmas = np.geomspace(0.01, 0.5, n).tolist()
        few = probe(model, keep=1, sigmas=sigmas)
        true = [probe(model).sigma_at(rate) for rate in RATES]
        missed.append(max(abs(few.sigma_at(r) / x - 1) for r, x in zip(RATES, true, strict=True)))
    assert missed[0] > missed[1] > missed[2]
    assert missed[2] < 1e-3


def test_sigmas_too_far_apart_for_a_small_table_are_refused_with_bounds(model: Any) -> None:
    whole = probe(model)
    few = probe(model, keep=5, sigmas=[0.01, 0.5])
    refused = 0
    for rate in RATES:
        sigma = whole.sigma_at(rate)
        with contextlib.suppress(ValueError):
            assert few.sigma_at(rate) == pytest.approx(sigma, rel=0.5)
            continue
        with pytest.raises(ValueError, match="because the table keeps only the 5 nearest") as error:
            few.sigma_at(rate)
        low, high = map(float, re.findall(r"\d\.\d+", str(error.value).partition("got ")[2])[:2])
        assert low <= sigma * (1 + 1e-5)
        assert sigma <= high * (1 + 1e-5)
        assert high > 1.5 * low
        refused += 1
    assert refused


@pytest.mark.parametrize("law", ["gaussian", "lognormal"])
def test_a_small_table_under_other_laws(model: Any, law: str) -> None:
    whole, few = (probe(model, law=law, sigmas=None, **more) for more in ({}, {"keep": 20}))
    for by in ("model", "layer"):
        there, here = (np.ravel(x.sigma_at(by=by)) for x in (whole, few))
        np.testing.assert_allclose(here, there, rtol=0.05)


def test_rates_from_draws_do_not_stand_in_for_a_table(llama: Any) -> None:
    options: dict[str, Any] = {"method": "sample", "draws": 4, "sigmas": None}
    assert math.isfinite(probe(llama, **options).sigma_at(0.01))
    with pytest.raises(ValueError, match=r"wanted a table with more competitors .* rates from dr"):
        probe(llama, keep=5, **options).sigma_at(0.01)


def test_heads_of_a_small_table_are_ranked_as_those_of_a_large_one(model: Any) -> None:
    whole, few = probe(model), probe(model, keep=100)
    mine, theirs = (x.heads(min_rows=1).set_index("label") for x in (few, whole))
    for name in ("sigma_at", "sigma_at_content"):
        here, there = mine[name].to_numpy(), theirs[name].loc[mine.index].to_numpy()
        assert np.array_equal(np.isnan(here), np.isnan(there))
        known = np.isfinite(there) & (there < 0.55)  # beyond 0.5, the line goes on
        assert known.any()
        np.testing.assert_allclose(here[known], there[known], rtol=0.05)
        assert (here[there > 0.55] > 0.53).all()
    assert few.glance()[0]["head"].tolist() == few.heads()["label"].tolist()


def test_a_table_is_what_is_nearest_whatever_the_order(llama: Any) -> None:
    """Cut while it grows, or at the end: the competitors below one half-width, and all of them."""
    whole = probe(llama)
    for keep in (7, 50, 200):
        few = probe(llama, keep=keep, batch_size=1)
        nearest = np.sort(whole.table.a)
        assert np.array_equal(np.sort(few.table.a), nearest[nearest < few.table.cutoff])
        again = probe(llama, keep=keep, batch_size=8)
        for name in vars(few.table):
            assert np.array_equal(getattr(few.table, name), getattr(again.table, name)), name


# -- fragile rows -----------------------------------------------------------------------------


def test_fragile_rows_come_in_order(report: CollapseReport) -> None:
    frame = report.fragile(10)
    assert len(frame) == 10
    assert frame["half_width"].is_monotonic_increasing
    assert frame["half_width"].iloc[0] == pytest.approx(report.table.half_width.min())
    np.testing.assert_allclose(frame["sigma"] * math.sqrt(3), frame["half_width"])
    assert (frame["jump_pos"] != frame["key_pos"]).all()
    assert (frame[["key_pos", "jump_pos"]].max(axis=1) <= frame["query_pos"]).all()
    for row in frame.itertuples():
        tokens = report.tokens[row.prompt]
        assert row.query_token == tokens[row.query_pos] == str(int(ids[row.prompt, row.query_pos]))
        assert row.key_token == tokens[row.key_pos]
        assert row.jump_token == tokens[row.jump_pos]
    assert (frame["sink"] == (frame["key_pos"] == 0)).all()
    content = report.fragile(10_000, content=True)
    assert not content["sink"].any()
    everything = report.fragile(10_000)
    assert len(everything) == len(report.table) > len(content)
    assert len(report.fragile(0)) == 0
    with pytest.raises(ValueError, match="n: wanted an integer >= 0; got -1"):
        report.fragile(-1)


def test_half_width_is_where_the_row_starts_to_move(model: Any, report: CollapseReport) -> None:
    """Factors at the corners of the box, set by hand in a real forward pass."""
    sites = attention_sites(model)
    for row in report.fragile(6).itertuples():
        layer = sites.layer(row.layer)
        kv_head = row.head // (layer.n_heads // layer.n_kv_heads)

        def lands(a: float, row: Any = row, layer: Any = layer, kv_head: int = kv_head) -> set[int]:
            """Where the row looks under each of the eight corners."""
            out = set()
            for q, star, jump in itertools.product((1 - a, 1 + a), repeat=3):

                def scale_q(t: torch.Tensor, hook: Any, q: float = q) -> torch.Tensor:
                    t = t.clone()
                    layer.q.dot.by_position(t)[row.prompt, row.query_pos, row.head] *= q
                    return t

                def scale_k(
                    t: torch.Tensor, hook: Any, star: float = star, jump: float = jump
                ) -> torch.Tensor:
                    t = t.clone()
                    layer.k.dot.by_position(t)[row.prompt, row.key_pos, kv_head] *= star
                    layer.k.dot.by_position(t)[row.prompt, row.jump_pos, kv_head] *= jump
                    return t

                name = attn(row.layer, "attn_scores")
                forced = [(layer.q.dot.hook, scale_q), (layer.k.dot.hook, scale_k)]
                scores = watch(model, ids, [name], forced)[name]
                out.add(int(scores[row.prompt, row.head, row.query_pos].argmax()))
            return out

        assert lands(0.0) == {row.key_pos}
        assert lands(row.half_width * (1 - 1e-3)) == {row.key_pos}
        assert lands(row.half_width * (1 + 1e-3)) == {row.key_pos, row.jump_pos}


# -- words and files --------------------------------------------------------------------------


def test_a_report_without_sparse_rows_says_so() -> None:
    report = probe(models.tiny_llama(qk_scale=0.05))
    assert report.n_sparse == 0
    assert "No sparse row" in str(report)
    assert "not stability" in str(report)
    frame = report.to_frame()
    assert (frame["rows"] == 0).all()
    assert (
        frame[["loose", "strict", "loose_content", "loose_centred", "score_level"]]
        .isna()
        .all(axis=None)
    )
    assert math.isnan(report.sigma_at(0.01))
    assert report.sigma_at(0.01, by="head").isna().all(axis=None)
    assert len(report.fragile()) == 0


def test_the_summary_says_what_was_found(report: CollapseReport) -> None:
    text = str(report)
    assert repr(report) == report.summary() == text
    assert f"{report.n_sparse} of {report.examined.sum()} rows are sparse" in text
    assert "centred gauge" in text
    assert "sinks" in text
    sites = report.model["sites"]
    assert sites in text
    shielded = "is removed by a norm over each head" in text
    assert shielded == (report.model["architecture"] == "Qwen3ForCausalLM")
    assert ("position bias" in text) == (report.model["architecture"] == "BloomForCausalLM")


def test_few_sparse_rows_are_said_to_be_few(llama: Any) -> None:
    """The largest maximum of all as the threshold leaves one."""
    few = "Fewer than 20 sparse rows"
    _, cache = llama.run_with_cache(models.tokens(1, 12))
    patterns = [v[:, :, 1:] for k, v in cache.items() if k.endswith("attn.hook_pattern")]
    top = max(float(p.max()) for p in patterns)
    report = collapse_probe(llama, models.tokens(1, 12), sparse=top - 1e-6)
    assert 0 < report.n_sparse < 20
    assert few in report.summary()
    assert few not in probe(llama).summary()


def test_values_alone_are_said_never_to_collapse(llama: Any) -> None:
    assert "No row can collapse" in str(probe(llama, on="v"))
    assert "No row can collapse" in str(probe(llama, on="q"))


@pytest.mark.parametrize("method", ["exact", "sample"])
def test_save_and_load(model: Any, method: Any, tmp_path: Path) -> None:
    report = probe(model, method=method)
    path = report.save(tmp_path / "deep" / "report.safetensors")
    assert path.exists()
    loaded = CollapseReport.load(path)
    assert loaded.settings == report.settings
    assert dict(loaded.model) == dict(report.model)
    assert loaded.tokens == report.tokens
    for field in fields(CollapseReport):
        if field.name in ("first_prompt", "decoder_tokens", "starts"):
            assert getattr(report, field.name) == getattr(loaded, field.name)
        elif field.name not in ("settings", "model", "tokens", "table", "kept"):
            mine, theirs = getattr(report, field.name), getattr(loaded, field.name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    for field in fields(report.table):
        np.testing.assert_array_equal(
            getattr(report.table, field.name), getattr(loaded.table, field.name)
        )
    for by in ("head", "layer", "model"):
        pd.testing.assert_frame_equal(report.to_frame(by), loaded.to_frame(by))
    pd.testing.assert_frame_equal(report.fragile(), loaded.fragile())
    assert loaded.sigma_at(0.02) == report.sigma_at(0.02)
    assert str(loaded) == str(report)


def test_an_empty_report_survives_the_disk(tmp_path: Path) -> None:
    report = probe(models.tiny_bloom(qk_scale=0.05))
    assert report.n_sparse == 0
    loaded = CollapseReport.load(report.save(tmp_path / "empty"))
    pd.testing.assert_frame_equal(report.to_frame(), loaded.to_frame())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("/home/somebody/models/mine", "mine"), ("runs/mine", "runs/mine"), ("org/mine", "org/mine")],
)
def test_reports_leave_out_where_a_model_lay(given: str, wanted: str) -> None:
    bridge = models.tiny_gpt2()
    bridge.cfg.model_name = given
    report = collapse_probe(bridge, models.tokens())
    profile = rank_profile(bridge, models.tokens())
    assert report.model["name"] == profile.model["name"] == wanted
    assert report.summary().startswith(f"{wanted}: ")


def test_a_directory_is_no_name_of_a_report(tmp_path: Path) -> None:
    report = collapse_probe(models.tiny_gpt2(), models.tokens())
    with pytest.raises(IsADirectoryError, match="wanted a file's name; got the directory"):
        report.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    junk = tmp_path / "junk"
    junk.write_bytes(b"not a report")
    with pytest.raises(ValueError, match=r"wanted a collapse report, .*; got"):
        CollapseReport.load(junk)
    other = tmp_path / "other"
    save_file({"x": np.zeros(2)}, other)
    with pytest.raises(ValueError, match="wanted the format 'qkvnorm-lens collapse report 4'"):
        CollapseReport.load(other)
    with pytest.raises(FileNotFoundError):
        CollapseReport.load(tmp_path / "absent")


@pytest.mark.parametrize("method", ["exact", "sample"])
@pytest.mark.parametrize("at", [1, 2])
def test_parts_of_a_corpus_merge_into_the_probe_of_all(model: Any, method: Any, at: int) -> None:
    whole = probe(model, method=method, batch_size=1)
    parts = [
        probe(model, ids[:at], method=method, batch_size=1),
        probe(model, ids[at:], method=method, batch_size=1, first_prompt=at),
    ]
    merged = parts[0].merge(parts[1])
    assert merged.tokens == whole.tokens
    assert merged.settings == whole.settings
    for field in fields(CollapseReport):
        mine, wanted = getattr(merged, field.name), getattr(whole, field.name)
        if isinstance(wanted, np.ndarray):
            assert mine.dtype == wanted.dtype, field.name
            np.testing.assert_allclose(mine, wanted, rtol=1e-12, atol=0, err_msg=field.name)
    for field in fields(whole.table):
        np.testing.assert_array_equal(
            getattr(merged.table, field.name), getattr(whole.table, field.name)
        )
    assert merged.sigma_at(0.02) == whole.sigma_at(0.02)
    pd.testing.assert_frame_equal(merged.fragile(), whole.fragile())


def test_reports_that_do_not_belong_together_are_not_merged(model: Any) -> None:
    first = probe(model, ids[:1])
    with pytest.raises(ValueError, match=r"wanted a report that starts at prompt 1 .*got .* at 0"):
        first.merge(probe(model, ids[1:]))
    with pytest.raises(ValueError, match="merge: wanted reports of equal settings"):
        first.merge(probe(model, ids[1:], first_prompt=1, sigmas=[0.1]))
    other = probe(models.tiny_gpt2(n_layers=2, seed=5), ids[1:], first_prompt=1)
    with pytest.raises(ValueError, match="merge: wanted reports of one model"):
        replace(first, model={**first.model, "name": "another"}).merge(other)


def test_a_summary_without_room_names_the_sigmas_it_lies_between(llama: Any) -> None:
    whole = probe(llama)
    low, high = 0.1, 0.2
    assert low < whole.sigma_at(0.01) < high
    few = probe(llama, keep=1, sigmas=[low, high])
    assert "1% of sparse rows collapse at sigma = 10% to 20% (keep= more" in str(few)
    assert "sigma = 0 to 20%" in str(probe(llama, keep=1, sigmas=[high]))
    assert "sigma = more than 1%" in str(probe(llama, keep=1, sigmas=[0.01]))


def test_a_piece_is_cut_as_far_as_it_was_looked_for() -> None:
    """A piece scanned before another thread lowered the cutoff still holds what lies beyond it."""

    def piece(a: list[float]) -> Any:
        room = reduce.empty_piece(8, 8, False)
        room.row[0] = (0, 5, 1, 2, len(a))
        room.s_star[0], room.used[:] = 9.0, (1, len(a))
        room.s[: len(a)], room.a[: len(a)] = 8.0, a
        return room

    parts = TableParts(1, biased=False)
    for a in ([0.1, 0.2, 0.3], [0.5, 0.6]):
        parts.take(piece(a), COMPLETE, 0, 1, np.arange(1))
    table = parts.table()
    np.testing.assert_allclose(table.a, [0.1])
    assert float(table.cutoff) == pytest.approx(0.2)
