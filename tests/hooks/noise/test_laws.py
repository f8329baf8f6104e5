"""What makes a law a law: mean 1, RMS sigma, and distribution, density and sampling that agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from hooks.noise.laws import LAWS, Law, check_sigma, get_law

laws = pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
_largest = {"uniform": 0.577, "gaussian": 0.2, "lognormal": 1.0}


@st.composite
def law_and_sigma(draw: st.DrawFn) -> tuple[Law, float]:
    law = draw(st.sampled_from(list(LAWS.values())))
    return law, draw(st.floats(1e-3, _largest[law.name]))


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def moments(law: Law, sigma: float) -> tuple[float, float]:
    """Mean of f and RMS of f - 1, integrated over the quantiles by Gauss-Legendre panels."""
    x, w = np.polynomial.legendre.leggauss(40)
    u = np.logspace(-13, math.log10(0.5), 60)
    edges = np.concatenate([u, 1 - u[::-1][1:]])
    half, centre = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    at = (centre[:, None] + half[:, None] * x).ravel()
    weight = (half[:, None] * w).ravel()
    f = law.factor(torch.tensor(at), sigma).numpy()
    return float((f * weight).sum()), math.sqrt(((f - 1) ** 2 * weight).sum())


def test_the_three_laws_are_known_by_name() -> None:
    assert {name: get_law(name).name for name in ("uniform", "gaussian", "lognormal")} == {
        name: name for name in LAWS
    }
    assert all(isinstance(law, Law) for law in LAWS.values())
    with pytest.raises(ValueError, match=r"law: wanted one of \['gaussian'.*got 'cauchy'"):
        get_law("cauchy")


@given(law_and_sigma())
def test_mean_is_one_and_rms_is_sigma(case: tuple[Law, float]) -> None:
    law, sigma = case
    mean, rms = moments(law, sigma)
    assert mean == pytest.approx(1, abs=1e-7)
    assert rms == pytest.approx(sigma, rel=1e-6)


@given(law_and_sigma(), st.floats(1e-12, 1 - 1e-12))
def test_cdf_inverts_factor(case: tuple[Law, float], u: float) -> None:
    law, sigma = case
    f = law.factor(f64([u]), sigma)
    assert float(law.cdf(f, f64([sigma]))[0]) == pytest.approx(u, abs=1e-10)


@given(law_and_sigma(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_density_integrates_to_the_cdf(case: tuple[Law, float], p: float, q: float) -> None:
    """Between any two points of the support, by a rule of its own."""
    law, sigma = case
    knots = law.knots(f64([sigma]))[0]
    lo, hi = float(knots[0]), float(knots[-1])
    a, b = sorted((lo + p * (hi - lo), lo + q * (hi - lo)))
    x, w = np.polynomial.legendre.leggauss(50)
    # In the logarithm of the factor where it is positive: a lognormal density is steep near 0.
    log = a > 0
    ends = np.log([a, b]) if log else np.array([a, b])
    edges = np.linspace(*ends, 81)
    at = ((edges[1:] + edges[:-1])[:, None] / 2 + np.diff(edges)[:, None] / 2 * x).ravel()
    weight = (np.diff(edges)[:, None] / 2 * w).ravel()
    f = np.exp(at) if log else at
    density = law.density(torch.tensor(f), f64([sigma])).numpy() * (f if log else 1)
    mass = law.cdf(f64([a, b]), f64([sigma])).numpy()
    assert (density * weight).sum() == pytest.approx(mass[1] - mass[0], abs=1e-9)


@given(law_and_sigma())
def test_knots_ascend_and_hold_the_mass(case: tuple[Law, float]) -> None:
    law, sigma = case
    knots = law.knots(f64([sigma, sigma / 2]))
    assert knots.shape[0] == 2
    assert (knots.diff(dim=1) > 0).all()
    below = law.cdf(knots[0, [0, -1]], f64([sigma]))
    # Near 1 a narrow law's own factors are rounded: (1 + a) - 1 is a to 1e-16.
    assert float(below[0]) < 1e-13
    assert float(1 - below[1]) < 1e-13


@given(law_and_sigma(), st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_cdf_never_falls(case: tuple[Law, float], points: list[float]) -> None:
    law, sigma = case
    values = law.cdf(f64(sorted(points)), f64([sigma]))
    assert (values.diff() >= 0).all()
    assert ((values >= 0) & (values <= 1)).all()


@laws
def test_outside_the_support_the_cdf_is_zero_or_one(law: Law) -> None:
    assert law.cdf(f64([-math.inf, -1e300, 1e300, math.inf]), f64([0.1])).tolist() == [0, 0, 1, 1]


@given(law_and_sigma())
def test_factors_do_not_turn_negative(case: tuple[Law, float]) -> None:
    """Never; under the gaussian law with a probability below 1e-6."""
    law, sigma = case
    least = 1e-6 if law.name == "gaussian" else 2.0**-54
    assert float(law.factor(f64([least]), sigma)[0]) > 0


@laws
def test_sigma_limits(law: Law) -> None:
    check_sigma(0.0, law)
    for sigma in (-0.1, -1e-300, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"sigma: wanted a finite number >= 0; got {sigma!r}"):
            check_sigma(sigma, law)


def test_uniform_ends_below_one_over_the_root_of_three() -> None:
    limit = 1 / math.sqrt(3)
    check_sigma(math.nextafter(limit, 0), get_law("uniform"))
    for sigma in (limit, 0.58, 3.0):
        with pytest.raises(ValueError, match=r"wanted < 0\.57735 for uniform noise .*negative"):
            check_sigma(sigma, get_law("uniform"))


def test_gaussian_ends_at_a_fifth() -> None:
    check_sigma(0.2, get_law("gaussian"))
    for sigma in (math.nextafter(0.2, 1), 0.25):
        with pytest.raises(ValueError, match=r"wanted <= 0\.2 for gaussian noise .*negative"):
            check_sigma(sigma, get_law("gaussian"))


def test_lognormal_has_no_end() -> None:
    check_sigma(1e6, get_law("lognormal"))
