"""Closed forms of collapse against quadrature and draws that share no code with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from scipy import stats
from torch import Tensor

from hooks import collapse_probability, critical_half_width
from hooks.noise.laws import get_law
from tests.oracles import probability as reference
from tests.oracles.rows import GAPS, ROWS, SCORES, Row, biased_rows, f64, probability


def test_the_rows_are_worth_testing() -> None:
    """Nearly every kind of row moves sometimes and stays sometimes."""
    p = np.array([probability(row) for row in ROWS])
    assert np.mean((p > 0.01) & (p < 0.99)) > 0.8
    assert all(max(p[i] for i, r in enumerate(ROWS) if r.law == law) > 0.1 for law in _LAWS)


_LAWS = ("uniform", "gaussian", "lognormal")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_probability_equals_quadrature(row: Row) -> None:
    wanted = reference.collapse_probability(
        row.s_star, row.s, row.sigma, row.law, row.beta, **row.how
    )
    assert probability(row) == pytest.approx(wanted, abs=1e-6)


def test_probability_equals_a_million_draws() -> None:
    """All rows together are one family: a single one may be as far out as 99% of families allow."""
    allowed = stats.norm.isf(0.005 / len(ROWS))
    for i, row in enumerate(ROWS):
        rate, se = reference.drawn_rate(
            row.s_star, row.s, row.sigma, row.law, row.beta, **row.how, seed=i
        )
        assert abs(rate - probability(row)) < allowed * se, row


@pytest.mark.parametrize("n", [17, 40, 200])
def test_many_competitors(n: int) -> None:
    """Beyond sixteen competitors another rule is used: near each other, spread out, and equal."""
    rng = np.random.default_rng(n)
    for s in (
        np.full(n, 19.0),
        20 - rng.exponential(3.0, n),
        np.r_[np.full(n // 2, -2.0), np.linspace(12, 19, n - n // 2)],
    ):
        row = Row("crowd", 20.0, tuple(s.tolist()), 0.06)
        wanted = reference.unbiased_uniform(20.0, s, 0.06)
        assert probability(row) == pytest.approx(wanted, abs=1e-7)


@given(
    rho=st.floats(1.0, 3.0),
    sigma=st.floats(1e-3, 0.577),
    scale=st.floats(0.01, 100.0),
    negative=st.booleans(),
)
def test_closed_form_of_one_competitor_uniform(
    rho: float, sigma: float, scale: float, negative: bool
) -> None:
    """M.7 5: max(0, a(1 + rho) - (rho - 1))^2 / (8 rho a^2)."""
    a = math.sqrt(3) * sigma
    assume(a <= 1)
    s_star, s = (scale * rho, scale) if not negative else (-scale, -scale * rho)
    wanted = max(0.0, a * (1 + rho) - (rho - 1)) ** 2 / (8 * rho * a * a)
    got = probability(Row("", s_star, (s,), sigma))
    assert got == pytest.approx(wanted, abs=1e-9)
    assert probability(Row("", s_star, (s,), sigma, on="k")) == got  # q's noise cancels


@given(rho=st.floats(1.0, 3.0), sigma=st.floats(1e-3, 0.2), negative=st.booleans())
def test_closed_form_of_one_competitor_gaussian(rho: float, sigma: float, negative: bool) -> None:
    """M.7 5: Phi(-(rho - 1) / (sigma sqrt(1 + rho^2)))."""
    wanted = stats.norm.cdf(-(rho - 1) / (sigma * math.hypot(1, rho)))
    s_star, s = (7 * rho, 7.0) if not negative else (-7.0, -7 * rho)
    assert probability(Row("", s_star, (s,), sigma, "gaussian")) == pytest.approx(wanted, abs=1e-6)


@given(rho=st.floats(1.0, 9.0), sigma=st.floats(1e-3, 4.0))
def test_closed_form_of_one_competitor_lognormal(rho: float, sigma: float) -> None:
    """The ratio of two lognormal factors is lognormal: Phi(-ln(rho) / (s sqrt(2)))."""
    wanted = stats.norm.cdf(-math.log(rho) / math.sqrt(2 * math.log1p(sigma**2)))
    row = Row("", 3 * rho, (3.0,), sigma, "lognormal")
    assert probability(row) == pytest.approx(wanted, abs=1e-6)


# -- rows with a bias and noise on both: a family of random ones ------------------------------


@settings(max_examples=12)
@given(biased_rows(most=3))
def test_random_biased_rows_equal_quadrature(row: Row) -> None:
    wanted = reference.collapse_probability(
        row.s_star, row.s, row.sigma, row.law, row.beta, **row.how
    )
    assert probability(row) == pytest.approx(wanted, abs=1e-6)


@given(st.data())
def test_a_constant_bias_and_the_unit_change_nothing(data: st.DataObject) -> None:
    """A bias that is the same for every key is no bias; the unit of the scores cancels."""
    row = data.draw(biased_rows())
    plain = Row("", max(row.s_star, *row.s), row.s, row.sigma)
    level = Row("", plain.s_star, row.s, row.sigma, beta=(0.0,) * len(row.s))
    assert probability(plain) == pytest.approx(probability(level), abs=1e-9)
    unit = 3.7
    assert row.beta is not None
    grown = Row(
        "",
        row.s_star * unit,
        tuple(t * unit for t in row.s),
        row.sigma,
        beta=tuple(b * unit for b in row.beta),
        on=row.on,
    )
    assert probability(grown) == pytest.approx(probability(row), abs=1e-9)


def test_rows_do_not_mix() -> None:
    """A batch of rows, padded to one width, gives each row what it gets alone."""
    for biased in (False, True):
        rows = [r for r in ROWS if r.law == "uniform" and r.on == "qk" and bool(r.beta) == biased]
        width = max(len(r.s) for r in rows) + 2

        def padded(values: list[tuple[float, ...]], width: int = width) -> Tensor:
            # The padding would win if it were looked at.
            return f64([[*v, *([99.0] * (width - len(v)))] for v in values])

        got = collapse_probability(
            f64([r.s_star for r in rows]),
            padded([r.s for r in rows]),
            f64([r.sigma for r in rows]),
            get_law("uniform"),
            valid=torch.tensor([[i < len(r.s) for i in range(width)] for r in rows]),
            beta=padded([tuple(-b for b in r.beta or ()) for r in rows]).neg() if biased else None,
        )
        torch.testing.assert_close(got, f64([probability(r) for r in rows]), rtol=0, atol=1e-9)


def test_no_noise_and_no_competitor_give_zero() -> None:
    for row in ROWS:
        still = Row(row.name, row.s_star, row.s, 0.0, row.law, row.beta, row.on)
        assert probability(still) == 0
    none = collapse_probability(
        torch.ones(2), torch.zeros(2, 0), torch.full((2,), 0.5), get_law("uniform")
    )
    assert none.tolist() == [0, 0]


@pytest.mark.parametrize("law", _LAWS)
def test_query_noise_alone_moves_nothing_without_a_bias(law: str) -> None:
    row = Row("tie", 5.0, (5.0, 4.999, -3.0), 0.2, law, on="q")
    assert probability(row) == 0
    assert (
        critical_half_width(torch.tensor([5.0]), torch.tensor([[5.0, 4.999]]), noise_on_k=False)
        .isinf()
        .all()
    )


# -- critical noise ---------------------------------------------------------------------------


def half_width(row: Row) -> Tensor:
    return critical_half_width(
        f64([row.s_star]),
        f64([row.s]),
        None if row.beta is None else f64([row.beta]),
        noise_on_q="q" in row.on,
        noise_on_k="k" in row.on,
    )[0]


@given(SCORES, GAPS)
def test_closed_form_of_the_half_width(s: float, gap: float) -> None:
    """M.7 4, and never where only one of the scores is positive."""
    s_star = s + gap
    (a,) = half_width(Row("", s_star, (s,), 0.1)).tolist()
    if s_star > 0 >= s or s_star == 0:
        assert math.isinf(a)
    else:
        rho = s_star / s if s > 0 else s / s_star
        assert a == pytest.approx((rho - 1) / (rho + 1), rel=1e-9, abs=1e-12)


@given(biased_rows())
@example(Row("zero gap", 3.0, (3.0,), 0.1, beta=(0.5,)))
@example(Row("both zero", 0.0, (0.0,), 0.1, beta=(0.5,)))
@example(Row("all same", 0.0, (0.0,), 0.1, beta=(0.0,)))
def test_half_width_is_where_a_corner_first_wins(row: Row) -> None:
    """Brute force over the corners f_q, f_t, f_* in {1 - a, 1 + a}."""
    assert row.beta is not None
    for a, s, beta in zip(half_width(row).tolist(), row.s, row.beta, strict=True):
        wanted = reference.corner_half_width(row.s_star, s, beta, **row.how)
        if math.isinf(a):
            assert wanted > 1 - 1e-6
        else:
            assert wanted == pytest.approx(a, abs=1e-6)


@given(biased_rows(), st.booleans())
def test_critical_noise_is_where_collapse_starts(row: Row, biased: bool) -> None:
    if not biased:
        row = Row("", max(row.s_star, *row.s), row.s, row.sigma)
    a = float(half_width(row).min())
    assume(1e-3 < a < 0.98)

    def at(width: float) -> float:
        sigma = width / math.sqrt(3)
        return probability(Row("", row.s_star, row.s, sigma, "uniform", row.beta, row.on))

    assert at(a * (1 - 1e-6)) < 1e-12  # rounding apart
    assert at(a + 0.02 * (1 - a)) > 0


class Triangular:
    """Density falls linearly from 1 to both ends, 1 -+ sqrt(6) sigma: three corners."""

    name = "triangular"
    limit = 1 / math.sqrt(6)
    limit_included = False
    reason = "its half-width would reach 1"

    def base(self, u: torch.Tensor) -> torch.Tensor:
        return torch.where(u < 0.5, (2 * u).sqrt() - 1, 1 - (2 * (1 - u)).sqrt())

    def factor(self, u: torch.Tensor, sigma: float) -> torch.Tensor:
        return 1 + math.sqrt(6) * sigma * self.base(u)

    def cdf(self, f: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        x = ((f - 1) / (math.sqrt(6) * sigma)).clamp(-1, 1)
        return torch.where(x < 0, (1 + x) ** 2 / 2, 1 - (1 - x) ** 2 / 2)

    def knots(self, sigma: torch.Tensor) -> torch.Tensor:
        a = math.sqrt(6) * sigma
        return torch.stack([1 - a, torch.ones_like(a), 1 + a], dim=-1)

    def density(self, f: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        a = math.sqrt(6) * sigma
        return (1 - (f - 1).abs() / a).clamp_min(0) / a


@pytest.mark.parametrize("others", [[4.0], [5.5, 5, 5, 5], [5.0, -1, 2], [-3.0, -5.0]])
@pytest.mark.parametrize("bias", [None, 0.3])
def test_a_law_with_corners_of_its_own_is_exact_too(others: list[float], bias: Any) -> None:
    """Against a midpoint rule so fine that the corners don't matter."""
    law, sigma, w_star = Triangular(), 0.15, 6.0 if max(others) > 0 else -2.5
    s = torch.tensor([others], dtype=torch.float64)
    beta = None if bias is None else torch.full_like(s, bias)
    row = (torch.tensor([x], dtype=torch.float64) for x in (w_star, sigma))
    got = collapse_probability(next(row), s, next(row), law, beta=beta, noise_on_q=False)
    n, half = 400_000, math.sqrt(6) * sigma
    f = 1 + half * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    spread = torch.tensor(sigma, dtype=torch.float64)
    stays = law.density(f, spread) * 2 * half / n
    for each in others:
        below = law.cdf((f * w_star + (bias or 0)) / each, spread)
        stays *= below if each > 0 else 1 - below
    assert float(got) == pytest.approx(1 - float(stays.sum()), abs=1e-9)
    assert 0.001 < float(got) < 0.999
