"""The constructed heads: predictions held against blocks, and blocks against independent sums."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qkvnorm_lens.experiments.core.running import read_table, run_experiment
from qkvnorm_lens.experiments.paper.theorems import (
    EXPERIMENT as THEOREMS,
    checks as parts,
    constructions as heads,
    figure as theorems_figure,
    measure as theorems,
    words as theorems_words,
)
from tests.support.watching import shape_checks_off

DRAWS = theorems.SCALES["smoke"].draws
PLACEMENTS = ("none", "pre", "qkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theorems")
    with shape_checks_off():
        return run_experiment(THEOREMS, [], out, size="smoke", progress=False).folder


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return read_table(folder)


def of(table: pd.DataFrame, panel: str) -> pd.DataFrame:
    mine = table[table["panel"] == panel]
    assert len(mine)
    return mine


@pytest.mark.parametrize("panel", ["turning", "growing", "matching", "offset", "freedom", "limits"])
def test_measured_equals_predicted(table: pd.DataFrame, panel: str) -> None:
    """Exact statements: every point, up to float64's rounding."""
    mine = of(table, panel)
    assert mine["predicted"].notna().all()
    np.testing.assert_allclose(mine["value"], mine["predicted"], rtol=1e-9, atol=1e-9)


def test_every_placement_and_theorem_is_there(table: pd.DataFrame) -> None:
    assert set(table["theorem"]) == set(range(1, 9))
    for panel in ("turning", "growing", "matching", "limits", "boundary", "probability"):
        assert set(of(table, panel)["placement"]) == {*PLACEMENTS}, panel


def test_only_pre_norm_interferes(table: pd.DataFrame) -> None:
    """Theorems 1-3: independent subspaces, and orthogonal spheres under Pre-Norm."""
    for panel, still in (("turning", "orthogonal subspaces"), ("growing", "")):
        mine = of(table, panel)
        moves = (mine["placement"] == "pre") & (mine["series"] != still)
        assert (mine[~moves]["value"] - 1).abs().max() < 1e-12
        assert (mine[moves].groupby("series")["value"].agg(np.ptp) > 0.3).all()
    attention = of(table, "matching").query("series == 'attention on the match'")
    least = attention.groupby("placement")["value"].min()
    assert least["pre"] < 0.01
    assert min(least["none"], least["qkv"]) > 0.99


def test_subspaces_are_what_they_are_called() -> None:
    independent, orthogonal = heads.independent_basis(3), heads.orthogonal_basis(3)
    gram = independent.T @ independent
    assert torch.linalg.matrix_rank(independent) == 9
    assert (gram[:3, 3:6].diagonal() == heads.OVERLAP).all()
    torch.testing.assert_close(orthogonal.T @ orthogonal, torch.eye(9, dtype=torch.float64))
    free = heads.orthogonal_basis(2, mean_free=True)
    torch.testing.assert_close(free.T @ free, torch.eye(6, dtype=torch.float64))
    assert free.sum(0).abs().max() < 1e-14


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_blocks_do_what_the_definition_says(placement: str) -> None:
    """Scores, pattern and output against softmax sums written out, token by token."""
    block = heads.new_block(placement, d_model=5, d_head=2)
    w = {site: heads.rand(2, 5, seed=i) for i, site in enumerate("qkv")}
    w_o, x = heads.rand(5, 2, seed=4), heads.rand(1, 4, 5, seed=5)
    heads.set_weights(block, **w, o=w_o)
    seen = heads.attend(block, x)

    def rms(z: torch.Tensor) -> torch.Tensor:
        return z * math.sqrt(len(z)) / z.norm()

    def vector(site: str, token: torch.Tensor) -> torch.Tensor:
        y = w[site] @ (rms(token) if placement == "pre" else token)
        return rms(y) if placement == "qkv" else y

    rows = x[0]
    scores = torch.stack([vector("q", rows[3]) @ vector("k", rows[t]) for t in range(3)])
    a = torch.exp(scores) / torch.exp(scores).sum()
    out = sum(a[t] * (w_o @ vector("v", rows[t])) for t in range(3))
    torch.testing.assert_close(seen.row[0, 0], scores)
    torch.testing.assert_close(seen.attention[0, 0], a)
    torch.testing.assert_close(seen.out[0, 3], out)


def test_edits_reach_the_scores_and_leave_nothing_behind() -> None:
    block, x = heads.readers("qkv", heads.independent_basis()), heads.rand(1, 4, 6, seed=1)
    clean = heads.attend(block, x)
    doubled = heads.attend(block, x, k=lambda value: 2 * value)
    torch.testing.assert_close(doubled.row, 2 * clean.row)
    with pytest.raises(ZeroDivisionError):
        heads.attend(block, x, v=lambda value: value / (1 // 0))
    assert torch.equal(heads.attend(block, x).out, clean.out)


def test_collapse_boundary(table: pd.DataFrame) -> None:
    """Theorem 7: k_t = rho (1 + k_*) - 1; random points lie on their side; query noise never."""
    mine = of(table, "boundary")
    curves = mine[mine["predicted"].notna()]
    np.testing.assert_allclose(curves["value"], curves["predicted"], atol=1e-12)
    assert (mine[mine["series"] == "query noise"]["value"] == 0).all()
    points = mine[mine["series"].isin(["moved", "stays"])]
    beyond = 1 + points["value"] > parts.POINTS_RHO * (1 + points["x"])
    assert (beyond == (points["series"] == "moved")).all()
    assert 0.1 < beyond.mean() < 0.9


def test_sampled_collapse_agrees_with_the_closed_form(table: pd.DataFrame) -> None:
    """Theorem 7 under uniform noise: within sampling error; query noise alone moves nothing."""
    mine = of(table, "probability")
    p = mine["predicted"]
    error = np.sqrt(p * (1 - p) / DRAWS)
    assert ((mine["value"] - p).abs() <= 4.5 * error + 2 / DRAWS * (p > 0)).all()
    keys = mine[mine["series"] == "key noise"]
    assert keys["value"].max() > 0.4
    one = keys[keys["x"] <= 0.04]["value"]  # sqrt(3) sigma < (rho - 1) / (rho + 1): never
    assert 0.03 * math.sqrt(3) < (1 - parts.CANDIDATES[1]) / (1 + parts.CANDIDATES[1])
    assert (one == 0).all()


def test_isotropic_key_noise_is_first_order(table: pd.DataFrame) -> None:
    """Theorem 8: what the prediction leaves out falls with the square of the noise."""
    mine = of(table, "isotropic").assign(off=lambda t: (t["value"] - t["predicted"]).abs())
    still = mine[mine["series"].isin(["the same for all keys", "q = 0"])]
    assert still["value"].max() < 1e-14
    for (placement, series), curve in mine.groupby(["placement", "series"]):
        if series in ("each key its own", "independent of m"):
            order = curve["off"] / curve["x"] ** 2
            assert order.max() < 2 * order.min(), (placement, series)
    own = mine[mine["series"] == "each key its own"]
    least = own[own["x"] == own["x"].min()]
    assert (least["off"] < 0.01 * least["predicted"]).all()
    assert mine[mine["series"] == "independent of m"]["predicted"].max() < 1e-14


def test_limits_reach_their_ends() -> None:
    """Theorems 5, 6: the curve's ends are the limits, which are not the same number."""
    table = parts.limits(5)
    for placement in PLACEMENTS:
        mine = table[table["placement"] == placement]
        for site in "qkv":
            curve = mine[mine["series"] == site]
            iso, sparse = (
                float(mine[mine["series"] == f"{site}, {end}"]["predicted"].iloc[0])
                for end in ("isotropic", "sparse")
            )
            assert abs(iso - sparse) > 0.05
            assert curve["value"].iloc[0] == pytest.approx(iso, rel=0.2)
            assert curve["value"].iloc[-1] == pytest.approx(sparse, abs=1e-9)


def test_bisect() -> None:
    low, high = torch.zeros(3), torch.full((3,), 2.0)
    at = torch.tensor([0.5, 1.0, 1.75])
    found = heads.bisect(lambda x: x > at, low, high)
    torch.testing.assert_close(found, at)
    with pytest.raises(ValueError, match="false at low"):
        heads.bisect(lambda x: x >= 0, low, high)
    with pytest.raises(ValueError, match="false at low"):
        heads.bisect(lambda x: x > 3, low, high)


def test_words_and_claims_come_from_the_table(folder: Path, table: pd.DataFrame) -> None:
    assert theorems_words.text(table).rstrip() == (folder / "text.md").read_text().rstrip()
    assert {c.same for c in theorems_words.claims(table)} == {"yes"}
    wrong = table.copy()  # a block that interferes, keys that query noise moves
    wrong.loc[wrong["series"] == "query noise", "value"] = 1.0
    wrong.loc[wrong["placement"] == "qkv", "value"] += 0.5
    assert [c.same for c in theorems_words.claims(wrong)].count("no") >= 4
    assert len(theorems_figure(table).axes) == 9
