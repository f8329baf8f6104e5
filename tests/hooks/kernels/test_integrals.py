"""The compiled probabilities against the simple implementation and against quadrature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from benchmarks.kernel import every_row
from hooks import collapse_probability, critical_half_width, kernels
from hooks.kernels import integrals
from hooks.kernels.row import (
    UNDECIDED,
    bar_of_nearest,
    exact_plain,
    first_at_least,
    first_sigma,
    half_width,
    has_no_number,
    holds_sparse,
    is_sparse,
    sort_descending,
    sparse_by_nearest,
    survey,
)
from hooks.kernels.types import Drawn
from hooks.kernels.uniform_plain import uniform_rates
from hooks.noise.laws import LAWS, get_law
from hooks.sites import uncapped
from tests.oracles import probability as reference
from tests.oracles.rows import ROWS, Row, biased_rows, probability

GRID = np.empty(integrals.GRID)


def compiled(row: Row) -> float:
    """The probe's own probability of a hand-built row."""
    s = np.asarray(row.s, dtype=float)
    beta = np.zeros_like(s) if row.beta is None else np.asarray(row.beta, dtype=float)
    on_q, on_k = row.how["on_q"], row.how["on_k"]
    a = [half_width(row.s_star, x, b, on_q, on_k) for x, b in zip(s, beta, strict=True)]
    order = np.argsort(a, kind="stable")
    s, beta, work = s[order], beta[order], np.empty((3, len(s)))
    law = integrals.LAW_CODES[row.law]
    if row.beta is not None:
        return integrals.biased(law, row.s_star, s, beta, len(s), row.sigma, on_q, on_k, work, GRID)
    s = np.sort(s)[::-1].copy()
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
    alone = integrals.plain(law, row.s_star, s, inverse, len(s), row.sigma, work, GRID)
    if row.law == "uniform" and len(s) and s[0] * row.s_star > 0 and row.sigma > 0:
        assert together(row.s_star, s, row.sigma) == pytest.approx(alone, abs=8e-7)
    return alone


@pytest.mark.parametrize("row", [r for r in ROWS if r.on != "q" or r.beta is not None], ids=str)
def test_hand_built_rows_equal_quadrature(row: Row) -> None:
    wanted = reference.collapse_probability(
        row.s_star, row.s, row.sigma, row.law, row.beta, **row.how
    )
    both = row.beta is not None and row.on == "qk" and row.law == "uniform"
    assert compiled(row) == pytest.approx(wanted, abs=2e-5 if both else 1e-6)


@given(
    s_star=st.floats(1, 60),
    sign=st.sampled_from([1, -1]),
    gaps=st.lists(st.floats(1e-3, 70), min_size=1, max_size=60),
    sigma=st.floats(0.01, 0.57),
    repeated=st.integers(1, 4),
)
@settings(max_examples=300)
def test_without_a_bias_it_is_the_simple_implementation(
    s_star: float, sign: int, gaps: list[float], sigma: float, repeated: int
) -> None:
    """Few or many competitors, apart or in one place, under uniform noise: to 1e-6."""
    row = Row("random", sign * s_star, tuple(sign * s_star - g for g in gaps * repeated), sigma)
    assert compiled(row) == pytest.approx(probability(row), abs=1e-6)


@given(
    s_star=st.floats(1, 60),
    gaps=st.lists(st.floats(0.1, 70), min_size=1, max_size=12),
    share=st.floats(0.05, 1),
    law=st.sampled_from(["gaussian", "lognormal"]),
)
def test_unbounded_laws_are_the_simple_implementation(
    s_star: float, gaps: list[float], share: float, law: str
) -> None:
    sigma = share * (0.15 if law == "gaussian" else 1.0)
    row = Row("random", s_star, tuple(s_star - g for g in gaps), sigma, law)
    assert compiled(row) == pytest.approx(probability(row), abs=1e-6)


@given(biased_rows())
@settings(max_examples=200)
def test_with_a_bias_it_is_the_simple_implementation(row: Row) -> None:
    """Noise on both makes the integral twofold: a row may be off by 1e-4, and few are by 1e-5."""
    allowed = 1e-4 if row.on == "qk" else 1e-6
    assert compiled(row) == pytest.approx(probability(row), abs=allowed)


def test_with_a_bias_most_rows_are_nearer_than_their_bound() -> None:
    rng = np.random.default_rng(0)
    off = []
    for _ in range(60):
        s_star, s = rng.uniform(-10, 30), rng.uniform(-20, 30, 6)
        beta = s - s_star + rng.exponential(4, 6) + 0.2
        row = Row("random", s_star, tuple(s), rng.uniform(0.02, 0.4), beta=tuple(beta))
        off.append(abs(compiled(row) - probability(row)))
    assert np.median(off) < 1e-7
    assert np.mean(off) < 1e-6


@pytest.mark.parametrize("n", [9, 30, 200, 1000])
@pytest.mark.parametrize("s_star", [20.0, -20.0])
def test_equal_competitors_have_a_closed_form(n: int, s_star: float) -> None:
    """n competitors at one score: P(none wins) is the mean of a power of one line."""
    s, sigma = s_star - 2, 0.2
    a = math.sqrt(3) * sigma
    low, high = (1 - a) * abs(s_star), (1 + a) * abs(s_star)
    # f_* |s_*| runs over (low, high); its competitors are cut at their own end.
    x = abs(s)
    if s_star > 0:
        begin, end = (low / x - 1 + a) / (2 * a), 1.0
    else:
        begin, end = 1.0, 1 - (high / x - 1 + a) / (2 * a)
    # The integral of u^n over the line's values, u's slope 1 / (2 a |s|).
    powers = (max(begin, end) ** (n + 1) - min(begin, end) ** (n + 1)) / (n + 1)
    outside = (high - (1 + a) * x) if s_star > 0 else ((1 - a) * x - low)
    wanted = 1 - (outside + powers * 2 * a * x) / (high - low)
    assert compiled(Row("equal", s_star, (s,) * n, sigma)) == pytest.approx(wanted, abs=1e-7)


@given(z=st.floats(-9, 9))
def test_the_normal_table_is_the_normal_law(z: float) -> None:
    assert integrals.normal_cdf(z) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), abs=1e-9)


@given(f=st.floats(0.01, 3), sigma=st.floats(0.01, 0.19), law=st.sampled_from(sorted(LAWS)))
def test_distribution_functions_are_those_of_the_laws(f: float, sigma: float, law: str) -> None:
    wanted = get_law(law).cdf(*(torch.tensor([x], dtype=torch.float64) for x in (f, sigma)))
    got = integrals.factor_cdf(integrals.LAW_CODES[law], f, sigma)
    assert got == pytest.approx(float(wanted), abs=2e-9)


@given(
    s_star=st.floats(-30, 30).map(lambda x: round(x, 3)),
    s=st.floats(-30, 30).map(lambda x: round(x, 3)),
    gap=st.floats(0, 20).map(lambda x: round(x, 3)),
    biased=st.booleans(),
    on=st.sampled_from(["q", "k", "qk"]),
)
def test_half_widths_are_those_of_the_simple_implementation(
    s_star: float, s: float, gap: float, biased: bool, on: str
) -> None:
    beta = s - s_star + gap if biased else 0.0
    s = s if biased else s_star - gap
    wanted = critical_half_width(
        torch.tensor([s_star], dtype=torch.float64),
        torch.tensor([[s]], dtype=torch.float64),
        torch.tensor([[beta]], dtype=torch.float64) if biased else None,
        noise_on_q="q" in on,
        noise_on_k="k" in on,
    )
    if not biased and on == "q":
        assert wanted == math.inf
        return
    got = half_width(s_star, s, beta, "q" in on, "k" in on)
    assert got == pytest.approx(float(wanted), abs=1e-9)


@given(
    x=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    masked=st.integers(0, 5),
    sparse=st.floats(0.3, 0.99),
)
def test_a_row_is_sparse_where_its_softmax_is(x: list[float], masked: int, sparse: float) -> None:
    row = np.asarray([*x, *[np.finfo(np.float32).min] * masked], np.float32)
    top = float(torch.softmax(torch.from_numpy(row).double(), -1).max())
    if abs(top - sparse) > 1e-6:
        assert is_sparse(row, float(max(x)), 1 / sparse - 1) == (top >= sparse)
        weights = torch.softmax(torch.from_numpy(row), -1).numpy()
        assert holds_sparse(weights, sparse) == (top >= sparse)


@given(x=st.lists(st.floats(-9, 9) | st.just(1.0), min_size=0, max_size=90))
def test_sorting_carries_what_belongs_together(x: list[float]) -> None:
    n = len(x)
    key, value, index = np.array(x, float), -2 * np.array(x, float), np.arange(n)
    sort_descending(key, value, index, n, np.empty((2, n)), np.empty(n, np.int64))
    assert np.array_equal(key, np.sort(np.array(x, float))[::-1])
    assert np.array_equal(value, -2 * key)
    assert np.array_equal(np.asarray(x, float)[index], key)


@given(
    s_star=st.floats(0.5, 30),
    gaps=st.lists(st.floats(0.01, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    law=st.sampled_from(["uniform", "gaussian"]),
)
def test_the_first_sigma_of_a_draw_is_where_it_moves(
    s_star: float, gaps: list[float], seed: int, law: str
) -> None:
    """Below it no factor of the draw moves the row's arg max, above it one does."""
    s = s_star - np.sort(gaps)
    base = get_law(law).base(torch.rand(len(s) + 1, generator=torch.Generator().manual_seed(seed)))
    drawn = base.double().numpy()
    first = first_sigma(
        integrals.LAW_CODES[law], s_star, s, np.arange(1, len(s) + 1), len(s), drawn[0], drawn
    )
    scale = math.sqrt(3) if law == "uniform" else 1.0
    for sigma, moved in ((first * (1 - 1e-6), False), (first * (1 + 1e-6), True)):
        if math.isfinite(sigma):
            f = 1 + scale * sigma * drawn
            assert bool((f[1:] * s > f[0] * s_star).any()) == moved


@given(
    x=st.lists(
        st.floats(-(2.0**127), 2.0**127, width=32) | st.just(-math.inf), min_size=1, max_size=200
    ),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_what_a_look_over_a_row_finds(x: list[float], dtype: type) -> None:
    row = np.array(x, dtype)
    assert kernels.largest(row) == max(x)
    assert first_at_least(row, float(max(x))) == int(row.argmax())
    seen = row[row > kernels.MASKED].astype(float)
    if len(seen):
        n, positive, mean = survey(row)
        assert (n, positive) == (len(seen), int((row > 0).sum()))
        assert mean == pytest.approx(seen.sum() / len(seen), rel=1e-9, abs=1e-6 * abs(seen).max())


@given(
    n=st.integers(200, 3000),
    spread=st.floats(0.3, 40),
    level=st.floats(-60, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
@settings(max_examples=150)
def test_the_nearest_of_many_decide_or_say_that_they_do_not(
    n: int, spread: float, level: float, share: float, seed: int
) -> None:
    """P from the competitors above a bar is P from all of them, wherever it is given at all."""
    row = (level + spread * np.random.default_rng(seed).normal(size=n)).astype(np.float32)
    s = np.sort(row.astype(float))[::-1]
    top, s = s[0], s[1:].copy()
    if top <= 0:
        return
    rule = every_row(np.array([0.02, 0.1, 0.3, 0.5]))
    chosen = bar_of_nearest(row, top, top, float(s[-1]))
    for bar in (chosen, top + share * (s[-1] - top)):
        out, use = np.empty((2, 4)), kernels.scratch(n, 4)
        for k, count in enumerate((n - 1, int((s > bar).sum()))):
            use.near[: n - 1] = s
            use.near[count : n - 1] = np.nan  # not told of
            decided = exact_plain(rule, use, count, top, bar if k else -math.inf, out[k])
        if decided:
            assert out[1] == pytest.approx(out[0], abs=3e-7)


def test_the_bar_of_the_nearest_is_seldom_too_high() -> None:
    """A normal row of thousands: a few hundred competitors at most, and they decide P."""
    rule, decided = every_row(np.array([0.1, 0.3, 0.5])), 0
    for seed in range(20):
        row = (20 * np.random.default_rng(seed).normal(size=4096)).astype(np.float32)
        s = np.sort(row.astype(float))[::-1]
        bar = bar_of_nearest(row, s[0], s[0], 0.0)
        use, count = kernels.scratch(4096, 3), int((s[1:] > bar).sum())
        use.near[:count] = s[1 : count + 1]
        assert count < 300
        decided += exact_plain(rule, use, count, s[0], bar, np.empty(3))
    assert decided == 20


@given(
    s_star=st.floats(1, 60),
    places=st.lists(st.tuples(st.floats(1e-3, 20), st.integers(1, 12)), min_size=1, max_size=5),
    a=st.floats(0.02, 0.99),
)
@settings(max_examples=200)
def test_competitors_in_few_places_equal_fine_panels(
    s_star: float, places: list[tuple[float, int]], a: float
) -> None:
    """Where many competitors come in at once H falls steeply: 3e-7 all the same."""
    s = np.sort(np.repeat([s_star - gap for gap, _ in places], [n for _, n in places]))[::-1].copy()
    s = s[s > 0]
    wanted = min(1.0, reference.crowded(s_star, s, a))
    sigma, work = a / math.sqrt(3), np.empty((3, len(s)))
    alone = integrals.plain(0, s_star, s, 1 / s, len(s), sigma, work, GRID)
    assert alone == pytest.approx(wanted, abs=3e-7)
    if len(s):
        assert together(s_star, s, sigma) == pytest.approx(wanted, abs=6e-7)


@pytest.mark.parametrize("crowd", reference.CROWDS, ids=len)
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.4, 0.5])
def test_a_crowd_far_below_one_rival(crowd: np.ndarray, sigma: float) -> None:
    wanted = reference.crowded(30.0, crowd, math.sqrt(3) * sigma)
    assert together(30.0, crowd, sigma) == pytest.approx(wanted, abs=6e-7)
    row = (torch.tensor(x, dtype=torch.float64) for x in ([30.0], crowd[None], [sigma]))
    plain = collapse_probability(*row, get_law("uniform"))
    assert float(plain) == pytest.approx(wanted, abs=1e-8)


@given(
    s_star=st.floats(1, 60),
    sign=st.sampled_from([1, -1]),
    gaps=st.lists(st.floats(1e-3, 70), min_size=1, max_size=150),
    sigma=st.floats(0.01, 0.57),
)
@settings(max_examples=200)
def test_all_sigmas_together_are_each_alone(
    s_star: float, sign: int, gaps: list[float], sigma: float
) -> None:
    """However few the competitors: power sums where they are many, of either sign."""
    top = sign * s_star
    s = np.sort(top - np.array(gaps))[::-1].copy()
    if (s[0] > 0) != (top > 0):
        return
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
    work = np.empty((3, len(s)))
    alone = integrals.plain(0, top, s, inverse, len(s), sigma, work, GRID)
    assert together(top, s, sigma) == pytest.approx(alone, abs=8e-7)


def together(s_star: float, s: np.ndarray, sigma: float) -> float:
    """P at this sigma, computed with those of two others, as of rows with many competitors."""
    sigmas = np.array([0.3 * sigma, sigma, min(1.5 * sigma, 0.5773)])
    use, out = kernels.scratch(len(s), 3), np.zeros(3)
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
    assert uniform_rates(
        s_star, s, inverse, len(s), -math.inf, sigmas, use.nodes, use.ends, use.work, use.grid, out
    )
    return float(out[1])


def test_a_row_of_one_million_competitors() -> None:
    """No rule's memory grows with competitors times anything; more of them win more often."""
    s = np.linspace(19, 1, 1_000_000)
    work, grid = np.empty((3, len(s))), np.empty(integrals.GRID)
    p = integrals.plain(0, 20.0, s, 1 / s, len(s), 0.3, work, grid)
    few = collapse_probability(
        torch.tensor([20.0]), torch.full((1, 1), 19.0), torch.tensor([0.3]), get_law("uniform")
    )
    assert float(few) < p <= 1


@given(
    s_star=st.floats(1, 90),
    gaps=st.lists(st.floats(0, 120), min_size=1, max_size=30),
    sigma=st.floats(0.01, 0.57),
    f_q=st.floats(0.05, 1.95),
    seed=st.integers(0, 999),
)
@settings(max_examples=300)
def test_the_nearest_decide_as_all_keys_do(
    s_star: float, gaps: list[float], sigma: float, f_q: float, seed: int
) -> None:
    """The short way to the strict rate gives the softmax's answer, or none."""
    s = s_star - np.sort(gaps)
    base = np.random.default_rng(seed).uniform(-1, 1, len(s) + 1)
    near = int((s > -0.3 * s_star).sum())  # the others lie below them, and are not told of
    use = kernels.scratch(len(s), 1)
    use.near[:], use.place[:] = s, np.arange(1, len(s) + 1)
    drawn = Drawn(sigma, f_q, base[0], base)
    verdict = sparse_by_nearest(every_row(np.array([sigma])), use, near, s_star, drawn)
    w = f_q * (1 + math.sqrt(3) * sigma * base) * np.r_[s_star, s]
    top = float(torch.softmax(torch.from_numpy(w), -1).max())
    if verdict != UNDECIDED and abs(top - 0.95) > 1e-9:
        assert verdict == (top >= 0.95)


def test_what_is_no_number_is_told_apart_and_ends_every_search() -> None:
    row = np.full(9, np.nan, np.float32)
    assert not holds_sparse(row, 0.95)
    assert first_at_least(row, 0.0) == 0
    for x, wrong in ((np.nan, True), (np.inf, True), (-np.inf, False), (-3e38, False)):
        assert has_no_number(np.array([0.5, x, 1.0], np.float32)) == wrong


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rows_maximum_is_wide(dtype: type) -> None:
    """Numba's float() keeps float32; what takes it would be compiled, and round, for that too."""
    assert kernels.largest(np.array([1, 1e30], dtype)) == float(dtype(1e30))
    compiled: Any = kernels.largest
    assert {str(s.return_type) for s in compiled.nopython_signatures} == {"float64"}


@given(st.floats(-1, 1), st.floats(0.5, 100), st.sampled_from([torch.float16, torch.float32]))
def test_compiled_code_and_torch_undo_a_soft_cap_alike(
    share: float, soft_cap: float, dtype: torch.dtype
) -> None:
    eps = torch.finfo(dtype).eps
    capped = share * soft_cap
    wide = uncapped(torch.tensor([capped], dtype=torch.float64), soft_cap, eps)
    assert kernels.uncapped(capped, soft_cap, eps) == pytest.approx(float(wide), rel=1e-12)
    assert soft_cap * math.tanh(float(wide) / soft_cap) == pytest.approx(capped, rel=2 * eps)
