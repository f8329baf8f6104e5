"""Pooled reports: all that a report says but the prompts' own sums, in constant size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hooks
from hooks import CollapseReport
from hooks.collapse import pooled
from hooks.collapse.kept import no_rows
from tests.support import models

SIGMAS = [0.03, 0.1, 0.2, 0.4]
BY = ("head", "layer", "model")


def probe(model: Any, tokens: Any, **options: Any) -> CollapseReport:
    """A prompt a pass: the same bits, whatever the parts."""
    return hooks.collapse_probe(
        model, tokens, sigmas=SIGMAS, batch_size=1, progress=False, **options
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama()


@pytest.fixture(scope="module")
def each(llama: Any) -> CollapseReport:
    lengths = np.random.default_rng(0).integers(2, 24, 60)
    rows = models.tokens(60, 24).tolist()
    return probe(llama, [row[:n] for row, n in zip(rows, lengths, strict=True)])


def assert_equal(a: CollapseReport, b: CollapseReport, rtol: float = 0) -> None:
    """All that two pooled reports hold."""
    assert a.settings == b.settings
    assert a.tokens == b.tokens
    for name in ("examined", "ties", "rows", "able", "padding", "read"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("loose", "strict", "centred", "level", "strict_low", "moments", "loose_draws"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=rtol)
    for name in ("table", "kept"):
        for column, mine in vars(getattr(a, name)).items():
            np.testing.assert_array_equal(mine, getattr(getattr(b, name), column), column)


@pytest.mark.parametrize("by", BY)
def test_a_pooled_report_says_the_same(each: CollapseReport, by: Any) -> None:
    whole = each.pooled()
    assert whole.rows.shape[2] == 1 < each.rows.shape[2]
    pd.testing.assert_frame_equal(whole.to_frame(by), each.to_frame(by), rtol=1e-9, atol=1e-9)
    assert whole.to_frame("model")["se_prompts"].iloc[-1] > 0
    pd.testing.assert_frame_equal(
        pd.DataFrame(np.atleast_1d(whole.sigma_at(by=by))),
        pd.DataFrame(np.atleast_1d(each.sigma_at(by=by))),
    )
    assert whole.summary() == each.summary()
    pd.testing.assert_frame_equal(whole.fragile(9), each.fragile(9))
    pd.testing.assert_frame_equal(whole.kept_rows(), each.kept_rows())


def test_tokens_stay_where_the_most_fragile_rows_are(
    each: CollapseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "SHOWN", 5)
    whole = each.pooled()
    shown = {p for content in (False, True) for p in each.fragile(5, content=content)["prompt"]}
    for prompt, (mine, words) in enumerate(zip(whole.tokens, each.tokens, strict=True)):
        assert mine == (words if prompt in shown else ())
    pd.testing.assert_frame_equal(whole.fragile(5, content=True), each.fragile(5, content=True))


def test_the_error_is_the_bootstraps(each: CollapseReport) -> None:
    """Of a rate, and of the sigma of a rate: prompts drawn again and again."""
    rng, n, times = np.random.default_rng(1), len(each.tokens), 4000
    x, c = each.loose.sum((1, 2, 4)), each.rows.sum((0, 1, 3))
    drawn = rng.multinomial(n, np.full(n, 1 / n), times)
    rates = drawn @ x.T / (drawn @ c)[:, None]
    whole, rate = each.pooled(), 0.05
    frame = whole.to_frame("model")
    own_error = 4 / np.sqrt(2 * times)  # of a standard deviation of so many draws
    # 60 prompts: the linear form and the bootstrap differ by some 1/n.
    np.testing.assert_allclose(frame["se_prompts"], rates.std(0), rtol=own_error + 0.05)
    grid = [np.interp(np.sqrt(rate), np.sqrt(r), SIGMAS) for r in rates]
    got = whole.sigma_error(rate)
    assert got == pytest.approx(np.std(grid), rel=own_error + 0.1)
    assert got == pytest.approx(each.sigma_error(rate), rel=1e-9)


def test_the_error_of_heads_and_layers(each: CollapseReport) -> None:
    by_head, by_layer = (each.pooled().sigma_error(0.05, by=by) for by in ("head", "layer"))
    assert by_head.shape == each.rows.shape[:2]
    assert by_layer.shape == each.rows.shape[:1]
    only = np.array([0, 1])[:, None, None, None]  # the second layer
    alone = replace(each, loose=each.loose * only, rows=each.rows * only)
    assert by_layer.iloc[1] == pytest.approx(alone.sigma_error(0.05), rel=1e-9)
    assert np.isnan(each.sigma_error(0.99))  # no sigma of the grid reaches it


def test_one_prompt_has_no_error(llama: Any) -> None:
    one = probe(llama, models.tokens(1, 24))
    assert np.isnan(one.sigma_error(0.05))
    assert one.pooled().to_frame()["se_prompts"].isna().all()


@pytest.mark.parametrize("at", [1, 23, 59])
def test_parts_merge_to_the_whole(llama: Any, each: CollapseReport, at: int) -> None:
    rows = [[int(t) for t in words] for words in _ids(each)]
    first = probe(llama, rows[:at])
    later = probe(llama, rows[at:], first_prompt=at)
    whole = each.pooled()
    for one, other in ((first.pooled(), later.pooled()), (first, later.pooled())):
        merged = one.merge(other)
        assert merged.moments[0, -1] == whole.moments[0, -1]
        assert_equal(merged, whole, rtol=1e-12)


def _ids(report: CollapseReport) -> list[list[int]]:
    """The ids of the fixture's prompts."""
    rows = models.tokens(60, 24).tolist()
    return [row[: len(words)] for row, words in zip(rows, report.tokens, strict=True)]


def test_merging_is_exact_and_keeps_its_size(each: CollapseReport) -> None:
    """The same part again and again, as other prompts: sums are multiples, errors shrink."""
    part = each.pooled()
    doubled = part.merge(replace(part, first_prompt=len(part.tokens)))
    np.testing.assert_array_equal(doubled.loose, 2 * part.loose)
    np.testing.assert_array_equal(doubled.moments, 2 * part.moments)
    assert doubled.loose.shape == part.loose.shape
    n, error = len(part.tokens), part.to_frame("model")["se_prompts"]
    again = doubled.to_frame("model")["se_prompts"]
    used = part.moments[0, -1]
    assert used <= n
    ratio = np.sqrt((used - 1) / (2 * used - 1))
    np.testing.assert_allclose(again, error * ratio, rtol=1e-9)
    with pytest.raises(ValueError, match="merge: wanted a report that starts at prompt 60"):
        part.merge(part)


def test_shards_lie_alongside(llama: Any, each: CollapseReport) -> None:
    """Two halves, each with the corpus's own numbers of prompts, in either order."""
    rows, parts = _ids(each), []
    for shard in range(2):
        own: CollapseReport | None = None
        for at in range(0, 60, 10):
            part = probe(llama, rows[at : at + 10], first_prompt=at).pooled()
            if at // 10 % 2 != shard:
                nothing = {n: np.zeros_like(getattr(part, n)) for n in _arrays()}
                empty = {n: x[:0] for n, x in vars(part.table).items() if np.ndim(x)}
                table = replace(part.table, **empty | {"start": np.zeros(1, np.int64)})
                part = replace(
                    part,
                    **nothing,
                    tokens=((),) * 10,
                    table=table,
                    kept=no_rows(),
                )
            own = part if own is None else own.merge(part)
        assert own is not None
        parts.append(own)
    one, other = parts
    assert_equal(one.alongside(other), other.alongside(one))
    assert_equal(one.alongside(other), each.pooled(), rtol=1e-12)


def _arrays() -> list[str]:
    return [*pooled.prompt_axes(CollapseReport), "moments", "read", "strict_low", "strict_high"]


def test_a_file_of_a_pooled_report(each: CollapseReport, tmp_path: Path) -> None:
    whole = each.pooled()
    again = CollapseReport.load(whole.save(tmp_path / "pooled.safetensors"))
    assert_equal(whole, again)
    assert again.summary() == whole.summary()
    for name, wrong in (("moments", np.full_like(whole.moments, -1)), ("read", whole.read - 999)):
        path = replace(whole, **{name: wrong}).save(tmp_path / name)
        with pytest.raises(hooks.ReportFileError, match=f"{name}.*wanted a number from 0"):
            CollapseReport.load(path)
