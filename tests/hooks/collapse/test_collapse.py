"""What a collapse probe leaves out, what happens behind its back, and where it ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks.collapse import reduce
from tests.support import models
from tests.support.probes import ids, probe
from tests.support.watching import (
    attn,
    watch,
)


def test_rows_with_one_key_are_left_out_and_counted(model: Any) -> None:
    report = probe(model)
    assert (report.single_key == 1).all()  # row 0 of each prompt and head
    assert (report.examined == 23).all()
    assert 0 not in report.table.query
    # Row 0 has a maximum of 1: it would count as sparse.
    assert probe(model, ids[:, :2], sparse=1e-9).n_sparse == report.rows[..., 0].size


def test_ties_are_left_out_and_counted() -> None:
    """Without positions a repeated token is attended to twice alike."""
    model = models.tiny_gpt2()
    with torch.no_grad():
        model.pos_embed.original_component.weight.zero_()
    twice = torch.cat([ids[:, :8], ids[:, :8]], 1)
    report = probe(model, twice, layers=[0], sparse=0.3)
    names = [attn(0, "attn_scores"), attn(0, "pattern")]
    seen = watch(model, twice, names)
    w, top = seen[names[0]], seen[names[1]].amax(-1)
    tied = (w == w.amax(-1, keepdim=True)).sum(-1) > 1
    chosen = (top >= 0.3) & (torch.arange(16) > 0)
    wanted = (tied & chosen).sum(-1).T
    assert wanted.sum() > 20
    assert np.array_equal(report.ties[0], wanted)
    assert np.array_equal(report.rows[0].sum(-1), (chosen & ~tied).sum(-1).T)
    assert report.to_frame("model")["loose"].notna().all()


def test_work_behind_the_models_back_counts_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: every layer is copied and reduced while the model goes on."""
    plain = probe(model, draws=3)
    started: list[int] = []

    def copies(tensors: list[Tensor]) -> Any:
        started.append(len(tensors))
        held = [x.clone() for x in tensors]
        return lambda: held

    def add(self: reduce.LayerReducer, scores: Tensor, pattern: Any, s: Any) -> None:
        given = [x for x in (scores, pattern, s) if x is not None]
        arrive = copies(given)
        scores.zero_()  # what the model does with its own is no matter
        has = (pattern is not None, s is not None)
        eps = torch.finfo(scores.dtype).eps
        rows = (0, scores.shape[2], scores.shape[3])
        self.workers.later(lambda: self._reduce(arrive(), has, rows, eps))

    monkeypatch.setattr(reduce.LayerReducer, "add", add)
    later = probe(model, draws=3)
    assert len(started) == len(later.settings.layers)
    for name in ("rows", "loose", "strict", "centred", "able", "strict_draws"):
        assert np.array_equal(getattr(plain, name), getattr(later, name)), name


def test_an_error_behind_the_models_back_is_raised(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: reduce.LayerReducer, *given: Any) -> None:
        raise ZeroDivisionError("while it was reduced")

    monkeypatch.setattr(
        reduce.LayerReducer, "add", lambda self, *given: self.workers.later(lambda: broken(self))
    )
    with pytest.raises(ZeroDivisionError, match="while it was reduced"):
        probe(llama)


def test_the_table_is_bounded_and_the_rates_are_not_touched(llama: Any) -> None:
    """Room for the table is what a report may cost, however many layers and sigmas there are."""
    whole, small = probe(llama), probe(llama, keep=20)
    assert len(small.table.a) <= 20 < len(whole.table.a)
    for name in ("rows", "able", "loose", "centred", "strict"):
        assert np.array_equal(getattr(whole, name), getattr(small, name)), name
    rows = ["label", "prompt", "query_pos", "key_pos", "jump_pos", "half_width"]
    n = min(5, len(small.table))
    assert small.fragile(n)[rows].equals(whole.fragile(n)[rows])


def test_a_threshold_of_one_is_the_dtypes_own(unchecked: None) -> None:
    """Rows whose pattern shows 1 are sparse, before and after: the strict rate is no zero."""
    built = models.tiny_llama(qk_scale=60.0)
    report = probe(built, sparse=1, sigmas=[0.2, 0.5], draws=8)
    nearly = probe(built, sparse=0.9999999, sigmas=[0.2, 0.5], draws=8)
    assert report.n_sparse > 50
    rates, others = (r.to_frame("model")["strict"].to_numpy() for r in (report, nearly))
    assert (rates > 0).all()
    np.testing.assert_allclose(rates, others, atol=0.02)
    assert isinstance(report.settings.sparse, float)
