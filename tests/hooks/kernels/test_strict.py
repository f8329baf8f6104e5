"""The computed strict rate against draws, against quadrature, and by its laws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.kernel import every_row
from hooks import kernels
from hooks.kernels import LAW_CODES
from hooks.kernels.strict import strict_rates
from tests.oracles.strict import StrictRow, drawn_rate

SIGMAS = (0.2, 0.45)
CLOSE = StrictRow((20, 17, 16.9, 16.8, 16.5))
FIVE = StrictRow((12, 8, 8, 8, 7.5))
MIXED = StrictRow((8, 4, 3, -3, -4, -5))
BELOW = StrictRow((-2, -6, -7, -8))
LONG = StrictRow((12, *np.linspace(7, -5, 100)))
BIASED = StrictRow((18, 17, 16.9, 3), (3, -0.6, 1, 9))
ROWS = {
    "close": CLOSE,
    "equals": FIVE,
    "mixed signs": MIXED,
    "all below zero": BELOW,
    "long": LONG,
    "keys alone": replace(CLOSE, on="k"),
    "gaussian": replace(FIVE, law="gaussian"),
    "lognormal": replace(MIXED, law="lognormal"),
    "long, lognormal": replace(LONG, law="lognormal"),
    "bias": BIASED,
    "bias, gaussian": replace(BIASED, law="gaussian"),
    "bias, keys alone": replace(BIASED, law="lognormal", on="k"),
    "bias, query alone": replace(BIASED, s=(18, 17, 3), bias=(0, -2.2, 12), on="q"),
    "soft cap": replace(CLOSE, soft_cap=15.0),
    "sink": replace(MIXED, sink=2.0),
    "less sparse": replace(FIVE, sparse=0.7),
    "two": StrictRow((10, 6)),
    "scores whose exponentials overflow": StrictRow((5e4, 4e4, 3.9e4, *range(1000, 9000, 500))),
    "crowd below": StrictRow((20, 19, *(60 * [13]))),
}


def computed(row: StrictRow, sigmas: tuple[float, ...] = SIGMAS, star: int = 0) -> np.ndarray:
    """Estimate, lower and upper bound at each sigma, ``[3, sigma]``."""
    rule = every_row(np.array(sigmas))._replace(
        law=LAW_CODES[row.law],
        on_q="q" in row.on,
        on_k="k" in row.on,
        sparse=row.sparse,
        room=1 / row.sparse - 1,
        soft_cap=row.soft_cap,
        biased=bool(row.bias),
    )
    use = kernels.scratch(len(row.s), len(sigmas))
    use.s[:], use.bias[:], use.rates[:] = row.s, row.bias or 0.0, 1.0
    out = tuple(np.zeros(len(sigmas)) for _ in range(3))
    strict_rates(rule, use, len(row.s), star, row.sink, out)
    return np.array(out)


@pytest.mark.parametrize("name", ROWS)
def test_the_computed_rate_is_that_of_draws(name: str) -> None:
    """The estimate to 0.001; the bounds hold."""
    estimate, low, high = computed(ROWS[name])
    for i, sigma in enumerate(SIGMAS):
        rate, error = drawn_rate(ROWS[name], sigma, 400_000)
        assert abs(estimate[i] - rate) < 1e-3 + 4 * error
        assert low[i] - 4 * error < rate < high[i] + 4 * error
    assert estimate[1] > 0


@pytest.mark.parametrize("sigma", [0.25, 0.3, 0.4, 0.5])
def test_two_tokens_leave_nothing_to_estimate(sigma: float) -> None:
    """Then P = E_q P(f_2 s_2 - f_1 s_1 >= ln(19) / f_q), here on a grid of all three."""
    row, a, n = StrictRow((10, 6)), math.sqrt(3) * sigma, 800
    f = 1 - a + 2 * a * (np.arange(n) + 0.5) / n
    gap = np.sort((6 * f[:, None] - 10 * f).ravel())
    wanted = 1 - np.searchsorted(gap, math.log(19) / f).mean() / gap.size
    estimate, low, high = computed(row, (sigma,))[:, 0]
    assert estimate == pytest.approx(wanted, abs=5e-5)
    # Nothing but the grids' error and the width of a cell lies between the bounds.
    assert low == pytest.approx(estimate, abs=5e-4)
    assert high == pytest.approx(estimate, abs=1e-3)


@st.composite
def rows(draw: st.DrawFn) -> StrictRow:
    top = draw(st.floats(4, 60))
    gaps = draw(st.lists(st.floats(3, 40), min_size=1, max_size=12))
    return StrictRow((top, *(top - gap for gap in gaps)))


@given(rows(), st.floats(0.05, 0.57), st.integers(0, 99))
@settings(max_examples=60)
def test_laws_of_the_strict_rate(row: StrictRow, sigma: float, seed: int) -> None:
    estimate, low, high = computed(row, (sigma,))[:, 0]
    assert 0 <= low <= estimate <= high <= 1
    # The order of the tokens is no matter.
    order = np.random.default_rng(seed).permutation(len(row.s))
    moved = StrictRow(tuple(np.array(row.s)[order]))
    star = int(np.flatnonzero(order == 0)[0])
    np.testing.assert_allclose(computed(moved, (sigma,), star)[0, 0], estimate, atol=1e-5)
    # Nor is a constant added to all scores after the noise, or a token far below.
    shifted = replace(row, bias=(7.5,) * len(row.s))
    assert computed(shifted, (sigma,))[0, 0] == pytest.approx(estimate, abs=4e-3)
    far = replace(row, s=(*row.s, -300.0))
    assert computed(far, (sigma,))[0, 0] == pytest.approx(estimate, abs=1e-5)
    # A sink, or a higher threshold, leaves room for less.
    assert computed(replace(row, sink=row.s[0] - 2), (sigma,))[0, 0] <= estimate + 2e-3
    assert computed(replace(row, sparse=0.99), (sigma,))[0, 0] <= estimate + 2e-3


@given(rows(), st.lists(st.floats(-4, 4), min_size=13, max_size=13), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_two_ways_under_uniform_noise(
    row: StrictRow, bias: list[float], biased: bool, sinks: bool
) -> None:
    """A soft cap far above all scores changes nothing, but rows under one are added up on a grid.

    The attended token keeps its lead: biases move it little.
    """
    if biased:
        row = replace(row, bias=(4.0, *bias[1 : len(row.s)]))
    if sinks:
        row = replace(row, sink=row.s[0] - 4)
    closed, grid = computed(row), computed(replace(row, soft_cap=1e7))
    np.testing.assert_allclose(closed[0], grid[0], atol=4e-3)
    assert (closed[1] <= grid[0] + 3e-3).all()
    assert (closed[2] >= grid[0] - 3e-3).all()


def test_a_winner_above_all_others_is_no_part_of_their_sum() -> None:
    """Its exp(l - w) would be exp(26); nothing else comes within ln 19 of it."""
    row = StrictRow((4, 3, 2, 1e-3), (0, 0, 0, 30))
    np.testing.assert_allclose(computed(row, (0.2,))[:, 0], 1, atol=1e-6)


@pytest.mark.slow
@given(rows(), st.sampled_from(["uniform", "gaussian", "lognormal"]), st.floats(0.1, 0.5))
@settings(max_examples=150)
def test_any_row_against_draws(row: StrictRow, law: str, sigma: float) -> None:
    row = replace(row, law=law)
    estimate, low, high = computed(row, (sigma,))[:, 0]
    rate, error = drawn_rate(row, sigma, 200_000)
    assert abs(estimate - rate) < 3e-3 + 4 * error
    assert low - 2e-3 - 4 * error < rate < high + 2e-3 + 4 * error
