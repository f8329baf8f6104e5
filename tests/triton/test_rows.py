"""The Triton engine under its interpreter against the compiled code, on hand-made rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hooks.kernels.engines import triton_loose as loose, triton_nearest as nearest
from tests.support.engines import HandMade, assert_same
from tests.support.layers import BIASED, CAPPED, NONE, ROWS, layers, rows

SOME = rows(
    (10.0, 6.0),
    (-5.0, -9.0, -9.5),
    (12.0, 7.0, 6.5, 6.0, 3.0, -2.0, 0.0),
    (9.0, 9.0, 8.0),  # a tie
    (0.0, -4.0, -5.0),
    (3.0,),  # one visible key
    (NONE, NONE),
    (10.0, NONE, 6.0, -3.5e4, -1e9, 5.0),
    (16.0, *np.linspace(12, -12, 60).tolist()),
    (15.0, 10.5, 10.0, 9.0, *np.random.default_rng(0).normal(0, 2, 40).tolist()),
)
SINKS = (2.0, NONE, NONE, 8.0)
FEW: dict[str, Any] = {"sigmas": (0.05, 0.2, 0.5)}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        HandMade(SOME),
        HandMade(SOME, sink=SINKS),
        HandMade(SOME.nan_to_num(neginf=-1e9), torch.softmax(SOME, -1).nan_to_num(0.1)),
        BIASED,
        HandMade(SOME.double()),
    ],
    ids=["rows", "sinks", "pattern", "bias", "double"],
)
def test_hand_made_rows(layer: HandMade, fixed: bool) -> None:
    theirs = layer.reduced("compiled", **FEW)
    assert theirs.rows.sum() >= 3
    assert theirs.sums["strict"].sum() > 0.09
    assert_same(layer.reduced("triton", fixed=fixed, **FEW), theirs)


def test_thousands_of_competitors() -> None:
    """More than a list holds, and rows whose list is too short to tell."""
    layer = HandMade(ROWS.float())
    how: dict[str, Any] = {"sigmas": (0.1, 0.4)}
    assert (ROWS > 0).sum(-1).max() > nearest.ROOM
    assert_same(layer.reduced("triton", **how), layer.reduced("compiled", **how))


def test_rows_whose_list_is_too_short_are_computed_from_all_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short: list[int] = []
    rates = loose.rates

    def watched(*args: Any) -> torch.Tensor:
        found = rates(*args)
        short.append(int((found < 0).sum()))
        return found

    monkeypatch.setattr("hooks.kernels.engines.triton_pass.rates", watched)
    # More equal ones than a list has room for.
    layer = HandMade(rows((30.0, 12.0, *[8.0] * 700)))
    how: dict[str, Any] = {"sigmas": (0.1, 0.4), "strict": "sampled"}
    mine = layer.reduced("triton", fixed=True, **how)
    assert sum(short) > 0
    assert mine.sums["loose"].sum() > 0.1
    assert_same(mine, layer.reduced("compiled", **how), strict=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_read_as_they_are(dtype: torch.dtype) -> None:
    layer = HandMade(SOME.clamp(-6e4, 6e4).to(dtype))
    assert_same(layer.reduced("triton", **FEW), layer.reduced("compiled", **FEW))


@pytest.mark.parametrize("on", ["k", "q", "v"])
def test_noise_on_some_vectors(on: str) -> None:
    how = FEW | {"on": on, "strict": "computed" if on == "k" else "sampled"}
    mine, theirs = (HandMade(SOME).reduced(engine, **how) for engine in ("triton", "compiled"))
    assert_same(mine, theirs, strict=1e-6 if on == "k" else None)


def test_what_has_no_kernels_is_left_to_torch() -> None:
    for layer, how in (
        (HandMade(SOME), {"law": "gaussian", "sigmas": (0.1, 0.2), "strict": "sampled"}),
        (CAPPED, FEW | {"strict": "sampled"}),
    ):
        mine, theirs = (layer.reduced(engine, **how) for engine in ("triton", "compiled"))
        assert mine.rows.sum() > 0
        assert_same(mine, theirs, strict=None)


@pytest.mark.parametrize("keep", [1, 40, 300])
def test_a_table_that_is_full(keep: int) -> None:
    torch.manual_seed(0)
    scores = 6 * torch.randn(1, 4, 16, 40) + 12
    scores[..., 0] = scores.amax(-1) + 3
    layer, how = HandMade(scores), FEW | {"keep": keep, "strict": "sampled"}
    mine = layer.reduced("triton", blocks=2, **how)
    assert_same(mine, layer.reduced("compiled", **how), strict=None)
    assert len(mine.parts.table().a) == keep


def test_scores_that_are_no_numbers_are_refused() -> None:
    for wrong in (math.nan, math.inf):
        scores = SOME.clone()
        scores[1, 2, 0, 1] = wrong
        with pytest.raises(ValueError, match="finite numbers; got NaN or inf in 1 rows of prompt"):
            HandMade(scores).reduced("triton", **FEW, strict="sampled")


@given(layers(widest=40), st.sampled_from([0.6, 0.95]), st.booleans(), st.integers(1, 2))
@settings(max_examples=5, deadline=None)
def test_random_rows(layer: HandMade, sparse: float, fixed: bool, blocks: int) -> None:
    how: dict[str, Any] = {"sparse": sparse, "sigmas": (0.3,)}
    mine = layer.reduced("triton", fixed=fixed, blocks=min(blocks, layer.scores.shape[2]), **how)
    assert_same(mine, layer.reduced("compiled", **how))
