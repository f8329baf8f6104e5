"""The interference experiment: its table is the report's, its words and figure read only that."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hooks
from qkvnorm_lens.experiments.beyond.interference import (
    EXPERIMENT as EXPERIMENT,
    figure as experiment_figure,
    measure as experiment,
    words as experiment_words,
)
from qkvnorm_lens.experiments.core import running
from qkvnorm_lens.experiments.core.read import Amount, reading
from qkvnorm_lens.experiments.core.subjects import find_subjects
from tests.support.watching import shape_checks_off

AMOUNT = Amount(sums=3, windows=1)
PRE, QKV = find_subjects(["addition-pre", "addition-qkv"])


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_it() -> Iterator[None]:
    with shape_checks_off():
        yield


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    frames = [experiment.measure(s, AMOUNT) for s in (PRE, QKV)]
    return pd.concat(frames, ignore_index=True)


def three_seeds(moved: list[float], predicted: list[float]) -> pd.DataFrame:
    """Tables of three models whose rates are known."""
    rows = []
    for seed, (real, noise) in enumerate(zip(moved, predicted, strict=True)):
        for first in experiment.SPARED.values():
            for by in experiment.BY:
                numbers = dict.fromkeys(experiment.NUMBERS, 0.5)
                numbers |= {"rows": 200.0, "sinks": 20.0, "kl": math.nan, "to_first": 0.0}
                numbers |= {"moved": real, "moved_content": real, "predicted_content": noise}
                facts = {"by": by, "first": first, "on": "k", "constant": 1.0}
                facts |= {"layer": 0, "head": 0, "label": "L0H0", "reason": "-"}
                names = {"model": f"m-{seed}", "group": "m", "placement": "pre", "seed": seed}
                rows.append({**names, **facts, **numbers})
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_the_table_holds_the_report(table: pd.DataFrame) -> None:
    read = reading(PRE, AMOUNT)
    report = hooks.interference(
        PRE.load(),
        read.ids,
        on=["qk"],
        output=True,
        targets=read.targets,
        draws=experiment.DRAWS,
        batch_size=64,
        progress=False,
    )
    for by in experiment.BY:
        wanted = report.to_frame(by)
        mine = experiment.of(table[table["model"] == "addition-pre"], by, on="qk")
        assert len(mine) == len(wanted) > 0
        for name in experiment.NUMBERS:
            values = wanted[name] if name in wanted else np.full(len(wanted), math.nan)
            np.testing.assert_allclose(mine[name], values, rtol=1e-12, err_msg=name)
    scored = sum(t != -100 for row in read.targets for t in row)
    assert report.positions.sum() == scored


def test_a_model_without_such_a_norm_is_named_and_not_dropped(table: pd.DataFrame) -> None:
    row = table[table["model"] == "addition-qkv"]
    assert len(row) == 1
    assert "none before q and k" in row["reason"].iloc[0]
    assert "Not measured: addition-qkv (layer 0" in experiment_words.text(table)
    alone = experiment_words.text(row)
    assert alone.startswith("Not measured: addition-qkv")
    assert experiment_words.claims(row) == []
    assert experiment_figure.figure(row).axes


def test_words_and_figure_read_nothing_but_the_table(table: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(table.to_csv(index=False))
    back = running.read_table(tmp_path)
    assert experiment_words.text(back) == experiment_words.text(table)
    assert experiment_words.claims(back) == experiment_words.claims(table)
    assert len(experiment_figure.figure(back).axes) == 3
    experiment_figure.figure(back).savefig(io.BytesIO(), format="png")


def test_the_constant_changes_nothing_without_biases(table: pd.DataFrame) -> None:
    mine = table[(table["model"] == "addition-pre") & (table["first"] == "frozen too")]
    heads = mine[mine["by"] == "head"].groupby(["layer", "head"])["moved"]
    assert heads.nunique().max() == 1
    assert len(mine["constant"].unique()) == 5
    assert "(0.25 to 4 times the median) changes no count" in experiment_words.text(table)


@pytest.mark.parametrize(
    ("moved", "predicted", "says"),
    [
        ([0.10, 0.11, 0.12], [0.01, 0.01, 0.01], "more than independent noise says"),
        ([0.01, 0.01, 0.02], [0.30, 0.31, 0.32], "less than it says"),
        ([0.10, 0.30, 0.20], [0.21, 0.20, 0.19], "the difference is not decided"),
    ],
)
def test_the_verdict_follows_the_interval_over_seeds(
    moved: list[float], predicted: list[float], says: str
) -> None:
    table = three_seeds(moved, predicted)
    gaps = np.subtract(moved, predicted)
    found = experiment_words.excess(experiment.of(table, "model"))
    assert found.value == pytest.approx(gaps.mean())
    assert found.half == pytest.approx(4.302653 * gaps.std(ddof=1) / math.sqrt(3), rel=1e-5)
    assert says in experiment_words.text(table)
    claims = experiment_words.claims(table)
    assert len(claims) == 2
    assert all(claim.same == "-" for claim in claims)
    assert f"{100 * np.mean(moved):.2f}" in claims[0].ours
    experiment_figure.figure(table).savefig(io.BytesIO(), format="png")


def test_parts_name_what_they_depend_on() -> None:
    parts = experiment.parts((PRE, QKV), "smoke")
    assert [p.key for p in parts] == ["addition-pre", "addition-qkv"]
    assert parts[0].settings["sums"] == 16
    assert EXPERIMENT.name == "interference"
    assert set(EXPERIMENT.minutes) == {"smoke", "quick", "full"}
