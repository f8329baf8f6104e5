"""Independent computations that the tests hold the library against.

Nothing here imports from `hooks`: integrals come from scipy.integrate, scores and patterns
from plain numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import integrate

_REACH = 8.5  # standard deviations: 1e-17 of the mass lies beyond


class Factor:
    """The law of 1 + kappa as a function of a variable x with a simple density.

    x is the factor itself (uniform) or a standard normal variable (gaussian, lognormal).
    """

    def __init__(self, law: str, sigma: float) -> None:
        self.law, self.sigma = law, sigma
        self.a = math.sqrt(3) * sigma
        self.log_s = math.sqrt(math.log(1 + sigma**2))
        self.support = (1 - self.a, 1 + self.a) if law == "uniform" else (-_REACH, _REACH)

    def value(self, x: float) -> float:
        if self.law == "uniform":
            return x
        if self.law == "gaussian":
            return 1 + self.sigma * x
        return math.exp(self.log_s * x - self.log_s**2 / 2)

    def x_of(self, factor: float) -> float:
        """The x of a factor (the end of the support where there is none)."""
        if self.law == "uniform":
            return factor
        if self.law == "gaussian":
            return (factor - 1) / self.sigma
        return (math.log(factor) + self.log_s**2 / 2) / self.log_s if factor > 0 else -_REACH

    def density(self, x: float) -> float:
        if self.law == "uniform":
            return 1 / (2 * self.a)
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def cdf(self, factor: float) -> float:
        """P(1 + kappa <= factor)."""
        if self.law == "uniform":
            return min(max((factor - 1 + self.a) / (2 * self.a), 0.0), 1.0)
        if self.law == "lognormal" and factor <= 0:
            return 0.0
        return 0.5 * math.erfc(-self.x_of(factor) / math.sqrt(2))


def collapse_probability(
    s_star: float,
    s: Sequence[float],
    sigma: float,
    law: str,
    beta: Sequence[float] | None = None,
    *,
    on_q: bool = True,
    on_k: bool = True,
) -> float:
    """P(some t: f_q (f_t s_t - f_* s_*) > beta_t) by nested adaptive quadrature."""
    f = Factor(law, sigma)
    lo, hi = f.support
    bars = [0.0] * len(s) if beta is None else list(beta)
    if not on_k:
        assert on_q
        turns = [f.x_of(b / (t - s_star)) for t, b in zip(s, bars, strict=True) if t != s_star]
        edges = np.unique(np.clip([lo, *turns, hi], lo, hi))
        return sum(
            f.cdf(f.value(b)) - f.cdf(f.value(a))
            for a, b in itertools.pairwise(edges)
            if any(
                f.value((a + b) / 2) * (t - s_star) > bar for t, bar in zip(s, bars, strict=True)
            )
        )

    def stays_given(q: float) -> float:
        """E over f_* of the product of distribution functions, at one f_q."""

        def integrand(x: float) -> float:
            out = f.density(x)
            for t, b in zip(s, bars, strict=True):
                bound = f.value(x) * s_star + b / q
                if t > 0:
                    out *= f.cdf(bound / t)
                elif t < 0:
                    out *= 1 - f.cdf(bound / t)
                elif bound < 0:
                    out = 0.0
            return out

        kinks = [
            f.x_of((end * t - b / q) / s_star)
            for t, b in zip(s, bars, strict=True)
            for end in (f.value(lo), f.value(hi))
            if s_star != 0
        ]
        return _integral(integrand, lo, hi, kinks)

    if beta is None or not on_q:
        return 1 - stays_given(1.0)
    corners = [
        f.x_of(b / (x * t - y * s_star))
        for t, b in zip(s, bars, strict=True)
        for x in map(f.value, f.support)
        for y in map(f.value, f.support)
        if law == "uniform" and x * t != y * s_star
    ]
    return 1 - _integral(lambda x: stays_given(f.value(x)) * f.density(x), lo, hi, corners)


def _integral(
    function: Callable[[float], float], lo: float, hi: float, kinks: Sequence[float]
) -> float:
    """Adaptive quadrature piece by piece between the points where the integrand has a kink."""
    edges = np.unique(np.clip([lo, (lo + hi) / 2, hi, *kinks], lo, hi))
    return sum(
        integrate.quad(function, a, b, epsabs=1e-8, epsrel=1e-8)[0]
        for a, b in itertools.pairwise(edges)
        if b - a > 1e-12
    )


def unbiased_uniform(s_star: float, s: np.ndarray, sigma: float) -> float:
    """Collapse probability without a bias under uniform noise, for any number of competitors.

    Between the points where a competitor's distribution function has a corner the integrand is a
    polynomial of degree len(s): one Gauss-Legendre rule is exact.
    """
    if s_star == 0:
        return 0.0
    a = math.sqrt(3) * sigma
    edges = np.unique(
        np.clip(np.r_[1 - a, 1 + a, (1 - a) * s / s_star, (1 + a) * s / s_star], 1 - a, 1 + a)
    )
    x, w = np.polynomial.legendre.leggauss(len(s) // 2 + 1)
    half, centre = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    bound = (centre + half * x)[..., None] * s_star
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.clip((bound / s - 1 + a) / (2 * a), 0, 1)
    stays = np.where(s > 0, below, np.where(s < 0, 1 - below, bound >= 0)).prod(-1)
    return 1 - float((stays * w * half).sum() / (2 * a))


def drawn_rate(
    s_star: float,
    s: Sequence[float],
    sigma: float,
    law: str,
    beta: Sequence[float] | None = None,
    *,
    on_q: bool = True,
    on_k: bool = True,
    n: int = 1_000_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Share of n draws in which the arg max moves, and its standard error."""
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        if law == "uniform":
            return 1 + math.sqrt(3) * sigma * rng.uniform(-1, 1, n)
        if law == "gaussian":
            return rng.normal(1, sigma, n)
        variance = math.log(1 + sigma**2)
        return rng.lognormal(-variance / 2, math.sqrt(variance), n)

    f_q = draw() if on_q else np.ones(n)
    f_star = draw() if on_k else np.ones(n)
    top = f_q * f_star * s_star
    moved = np.zeros(n, dtype=bool)
    for i, t in enumerate(s):
        f_t = draw() if on_k else np.ones(n)
        moved |= f_q * f_t * t > top + (0.0 if beta is None else beta[i])
    rate = float(moved.mean())
    return rate, math.sqrt(max(rate * (1 - rate), 1 / n) / n)


def corner_half_width(
    s_star: float, s: float, beta: float, *, on_q: bool = True, on_k: bool = True
) -> float:
    """Least a in [0, 1] at which some corner of the box of factors moves the row to t, else inf.

    f_q (f_t s_t - f_* s_*) is linear in each factor: its maximum over a box lies at a corner.
    """

    def reached(a: float) -> bool:
        ends = (1 - a, 1 + a)
        return any(
            q * (t * s - star * s_star) > beta
            for q in (ends if on_q else (1.0,))
            for t in (ends if on_k else (1.0,))
            for star in (ends if on_k else (1.0,))
        )

    lo, hi = 0.0, 1.0
    if not reached(hi):
        return math.inf
    if reached(0.0):
        return 0.0
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if reached(mid) else (mid, hi)
    return hi


CROWDS = (
    np.r_[26.0, np.linspace(8, 7.9, 300)],
    np.r_[26.0, np.linspace(16, 4, 299)],
    np.r_[29.0, np.full(50, 20.0)],
    np.r_[28.0, 27.9, np.full(1000, 12.0)],
    np.r_[np.linspace(29.9, 25, 200), np.full(2000, 15.0)],
)
"""Competitors that come in many at once, far below the nearest; each crowd descends."""


def crowded(s_star: float, s: np.ndarray, a: float) -> float:
    """P without a bias under uniform noise of half-width ``a``, for a positive ``s_star``.

    Panels between the points where competitors come in, graded towards the upper end of each.
    """
    s = s[s > 0]
    low, turns = (1 - a) * s_star, (1 + a) * s
    ends = sorted({low, *(turn for turn in turns if turn > low)})
    x, w = np.polynomial.legendre.leggauss(20)
    total = 0.0
    for begin, end in itertools.pairwise(ends):
        parts = end - (end - begin) * np.r_[0, 2.0 ** -np.arange(14, -1, -1)]
        for high, bottom in itertools.pairwise(parts):
            at = (bottom + high) / 2 + (high - bottom) / 2 * x
            stays = np.clip((at[:, None] / s - 1 + a) / (2 * a), 0, 1).prod(1)
            total += (high - bottom) / 2 * float((w * (1 - stays)).sum())
    return total / (2 * a * s_star)
