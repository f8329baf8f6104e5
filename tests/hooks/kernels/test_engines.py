"""The torch engine against the compiled code, on hand-made rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hooks.kernels.engines import Slots
from tests.support.engines import HandMade, assert_same
from tests.support.layers import CAPPED, LAYERS, ROWS, layers, rows


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_hand_made_rows(name: str, fixed: bool) -> None:
    layer = LAYERS[name]
    theirs = layer.reduced("compiled")
    assert theirs.rows.sum() >= 3
    assert theirs.sums["strict"].sum() > 0.09
    assert_same(layer.reduced("torch", fixed=fixed), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_read_as_they_are(dtype: torch.dtype) -> None:
    """In half precision equal scores are ties, up to that dtype's rounding."""
    layer = HandMade(ROWS.clamp(-6e4, 6e4).to(dtype))
    assert_same(layer.reduced("torch"), layer.reduced("compiled"))


@pytest.mark.parametrize("name", ["rows", "bias", "cap"])
@pytest.mark.parametrize("law", ["gaussian", "lognormal"])
def test_other_laws(name: str, law: str) -> None:
    layer, how = LAYERS.get(name, CAPPED), {"law": law, "strict": "sampled", "on": "k"}
    how["sigmas"] = (0.05, 0.2)
    assert_same(layer.reduced("torch", **how), layer.reduced("compiled", **how), strict=None)


@pytest.mark.parametrize("on", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("name", ["rows", "bias", "cap"])
def test_noise_on_some_vectors(name: str, on: str) -> None:
    layer, how = LAYERS.get(name, CAPPED), {"on": on, "strict": "sampled"}
    assert_same(layer.reduced("torch", **how), layer.reduced("compiled", **how), strict=None)


def test_what_is_not_computed_is_refused_by_name() -> None:
    for options in (
        {"law": "lognormal"},
        {"on": "q"},
        {"draws": 2},
        {"method": "sample", "draws": 2},
    ):
        with pytest.raises(ValueError, match=r"engine: wanted 'compiled' or 'auto' for .*'torch'"):
            LAYERS["rows"].reduced("torch", **options)
    with pytest.raises(ValueError, match="under a soft cap"):
        CAPPED.reduced("torch")


@pytest.mark.parametrize("sigma", [0.17, 0.3, 0.4, 0.5])
@pytest.mark.parametrize(
    "name", ["a narrow crowd", "one rival and a crowd", "a wide one", "many alike"]
)
def test_thousands_of_competitors_against_a_fine_grid(name: str, sigma: float) -> None:
    """Also where the compiled code's own grid is too coarse: a narrow crowd far below one rival."""
    row = {
        "a narrow crowd": (30.0, 26.0, *np.linspace(8, 7.9, 300)),
        "one rival and a crowd": (30.0, 26.0, *np.linspace(16, 4, 300)),
        "a wide one": (24.0, *np.random.default_rng(0).normal(12, 1, 2500)),
        "many alike": (22.0, *[10.0] * 1500),
    }[name]
    found = HandMade(rows(row)).reduced("torch", sigmas=(sigma,), strict="sampled")
    wanted = on_a_fine_grid(np.array(row, np.float32).astype(float), sigma)
    assert found.rows.sum() == 1
    assert found.sums["loose"].sum() == pytest.approx(wanted, abs=2e-7)


def on_a_fine_grid(row: np.ndarray, sigma: float) -> float:
    """1 - E prod_t P(X_t <= X_*), Simpson's rule between 40,000 values of X_*."""
    a = math.sqrt(3) * sigma
    x = row[0] * np.linspace(1 - a, 1 + a, 80_001)
    stays = np.ones_like(x)
    for s in row[1:]:
        stays *= np.clip((x / s - 1 + a) / (2 * a), 0, 1)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float(1 - (stays * weights).sum() / weights.sum())


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = ROWS.clone()
    scores[1, 2, 0, 1] = math.nan
    with pytest.raises(ValueError, match="finite numbers; got NaN or inf in 1 rows of prompt 1"):
        HandMade(scores).reduced("torch")


@given(layers(), st.sampled_from([0.6, 0.95]), st.booleans(), st.integers(1, 2))
@settings(max_examples=40)
def test_random_rows(layer: HandMade, sparse: float, fixed: bool, blocks: int) -> None:
    how: dict[str, Any] = {"sparse": sparse, "sigmas": (0.05, 0.2, 0.5)}
    mine = layer.reduced("torch", fixed=fixed, blocks=min(blocks, layer.scores.shape[2]), **how)
    assert_same(mine, layer.reduced("compiled", **how))


# -- places ----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_places_hold_all_once_they_are_enough(wanted: list[bool]) -> None:
    mask = torch.tensor(wanted)
    slots = Slots(fixed=True)
    for _ in range(2):
        at, taken = slots.pick("rows", mask)
        fits = slots.enough(mask.device, slots.needed(mask.device).tolist())
        assert fits == (int(taken.sum()) == int(mask.sum()))
        if fits:
            break
    assert fits
    assert at[taken].tolist() == mask.nonzero()[:, 0].tolist()
