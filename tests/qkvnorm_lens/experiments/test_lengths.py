"""The experiment lengths: its table against other computations; its words read only that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hooks
from qkvnorm_lens.experiments.beyond.lengths import EXPERIMENT, figure, measure, words
from qkvnorm_lens.experiments.core.read import Amount, reading
from qkvnorm_lens.experiments.core.subjects import find_subjects
from tests.hooks.measures.test_interference_by_construction import PROMPT, model
from tests.support.watching import shape_checks_off

PRE, QKV = find_subjects(["addition-pre", "addition-qkv"])


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_it() -> Iterator[None]:
    with shape_checks_off():
        yield


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    frames = [measure.measure(s, Amount(sums=12, windows=1), 3) for s in (PRE, QKV)]
    return pd.concat(frames, ignore_index=True)


def test_the_table_is_that_of_interference(table: pd.DataFrame) -> None:
    loaded, ids = PRE.load(), reading(PRE, Amount(sums=12, windows=1)).ids
    for frozen, how in measure.FROZEN.items():
        report = hooks.interference(loaded, ids, on="k", draws=0, progress=False, **how)
        mine = measure.of(table[table["model"] == PRE.name], frozen, layers=True)
        wanted = report.to_frame("layer")
        for column in ("rows", "moved", "to_first"):
            np.testing.assert_array_equal(mine[column].astype(float), wanted[column])
    whole = measure.of(table[table["model"] == PRE.name], "all")
    assert len(whole) == 1
    rows = measure.of(table, "all", layers=True)["rows"]
    assert float(whole["rows"].iloc[0]) == rows.sum() > 0


def test_what_lengths_are_made_of_by_hand(table: pd.DataFrame) -> None:
    loaded, ids = PRE.load(), reading(PRE, Amount(sums=12, windows=1)).ids
    one = measure.of(table[table["model"] == PRE.name], "all", layers=True)
    name = "blocks.1.hook_in"
    inputs = [loaded.run_with_cache(torch.tensor([row]), names_filter=name)[1][name] for row in ids]
    others = torch.cat([x[0, 1:] for x in inputs]).double() ** 2
    first = torch.cat([x[0, :1] for x in inputs]).double() ** 2
    top = others.sum(0).argsort(descending=True)[: measure.OUTLIERS]
    row = one[one["layer"] == 1].iloc[0]
    assert row["dimensions"].split() == [str(i) for i in top.tolist()]
    shares = others[:, top].sum(1) / others.sum(1)
    assert row["share"] == pytest.approx(float(shares.median()), rel=1e-4)
    size = others.sum(1).sqrt()
    wanted = float(first.sum(1).sqrt().mean() / size.median())
    assert row["first_length"] == pytest.approx(wanted, rel=1e-4)
    assert row["longest_length"] == pytest.approx(float(size.max() / size.median()), rel=1e-4)


def test_a_constructed_model_is_told_as_it_is_made() -> None:
    built: Any = model(100.0)
    (row,) = measure.lengths(built, PROMPT.tolist(), {0: "LayerNorm"}).to_dict("records")
    assert {*row["dimensions"].split()} >= {"0", "1"}
    assert row["first_share"] == pytest.approx(1, abs=1e-3)
    assert row["share"] == pytest.approx(3 / 4, abs=0.01)  # one of a token's own two is the third
    assert row["first_length"] == pytest.approx(math.sqrt((100**2 + 1) / 2), rel=1e-3)
    assert row["longest_length"] == pytest.approx(1)
    assert row["winner"] == "-"  # all rows stay, once the first token is spared


def test_words_and_figure_read_the_table_alone(table: pd.DataFrame) -> None:
    said = words.text(table)
    assert "Not measured: addition-qkv" in said
    assert "addition-pre, layer by layer" in said
    claims = words.claims(table)
    assert [c.same for c in claims] == ["-"]
    figure.figure(table)
    none = table[table["model"] == QKV.name]
    assert words.claims(none) == []
    figure.figure(none)
    assert EXPERIMENT.name == "lengths"
