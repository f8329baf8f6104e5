"""Compiled: the strict rate under uniform noise, where everything has a closed form.

In the notation of :mod:`hooks.kernels.strict`. A level is uniform between two ends, so P(l <= w)
is a line, and mean and variance of exp(l - w) given l <= w follow from two exponentials a token.
Without biases a factor r of all levels is the same as a factor r of the query: rows are put on
their levels for few factors of the query, and near each one

    M(r) = M + D ln r + D^2 (ln r)^2 / (2 R),    R = exp(M) - 1,    D = dM/dr at r = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hooks.kernels.compile import compiled, compiled_without_nan
from hooks.kernels.integrals import LEGENDRE_W, LEGENDRE_X
from hooks.kernels.types import BIAS, Array, S, Setting

_CELLS = 10  # of the grid of W
_NODES = 6  # of the query's factor, where there are biases
_NEAR = 8  # of a factor around one of the query's: a whole vector
_WIDE = 8.0  # ratio of the query's factors above which two parts of them are taken
_LEAST = 1e-6  # half-width of a level
_LOST = 1e-3  # probability that W is below the grid: the first cell takes it
_HALVINGS = 5
_MANY = 24  # tokens beyond which a part of them is looked at first
_FAR = 12.0  # tokens that stay further below W add less than exp(-12)
_FADED, _MOST = -40.0, 300.0  # where an exponential is 0; where its square is finite
_NOTHING = 1e-7  # probability of a win in a cell that is only bounded
_ALONE = 1e-12  # sums of others that are rounding: the two alone are left
_TINY = 1e-30

# Rows of the working memory, tokens in descending order of the level that they never exceed.
HIGH, LOW, SLOPE = 2, 3, 4  # P(l <= w) = (w - low) * slope
E_HIGH, E_LOW = 5, 6  # exp(. - start of the grid)
SO_FAR, MASS = 7, 8  # P(W <= w) and W's mass in the cell before (if any), if the token wins


class _Cell(NamedTuple):
    """A cell of W's grid."""

    low: float
    width: float
    fade: float  # exp(start of the grid - its middle)


class _Sum(NamedTuple):
    """Sum of exp(l - w) given l <= w: moments, and dE/dr."""

    mean: float
    variance: float
    drift: float


class _Token(NamedTuple):
    """One token in a cell."""

    below: float  # P(l <= its upper end)
    weight: float  # to be the largest
    mean: float  # of exp(l - w), given l <= w in the cell's middle
    variance: float
    drift: float  # dE/dr


@compiled
def uniform_rate(how: Setting, crowd: Array, n: int, star: int, on_q: bool, result: Array) -> bool:
    """Add a row's rate to ``result``; False where no smaller sigma has one either."""
    if not on_q:
        _at_factor(how, crowd, n, star, 1.0, _nodes(0.0), 1.0, result)
        return True
    a = math.sqrt(3.0) * how.sigma
    first, last = winning_factors(how, crowd, n, star, a)
    if last <= first:
        return False
    if how.plain:
        parts = 2 if last > _WIDE * first else 1
        width = (last - first) / parts
        for k in range(parts):
            f_q = first + (k + 0.5) * width
            nodes = _nodes(0.5 * width / f_q)
            _at_factor(how, crowd, n, star, f_q, nodes, width / (2 * a), result)
    else:
        nodes = _nodes(0.0)
        for k in range(_NODES):
            f_q = first + (last - first) * LEGENDRE_X[_NODES, k]
            share = LEGENDRE_W[_NODES, k] * (last - first) / (2 * a)
            _at_factor(how, crowd, n, star, f_q, nodes, share, result)
    return True


@compiled
def _nodes(away: float) -> Array:
    """Factors in 1 +- away: weights, inverses and logarithms."""
    nodes = np.empty((3, _NEAR))
    for k in range(_NEAR):
        r = 1 + away * (2 * LEGENDRE_X[_NEAR, k] - 1)
        nodes[0, k], nodes[1, k], nodes[2, k] = LEGENDRE_W[_NEAR, k], 1 / r, math.log(r)
    return nodes


@compiled
def winning_factors(how: Setting, crowd: Array, n: int, star: int, a: float) -> tuple[float, float]:
    """Between which factors of the query another token can win."""
    first, last = 1 + a, 1 - a
    low = crowd[S, star] - a * abs(crowd[S, star])
    for k in range(n):
        if k == star:
            continue
        gap = crowd[S, k] + a * abs(crowd[S, k]) - low
        needed = how.needed + crowd[BIAS, star] - crowd[BIAS, k]
        if gap > 0:
            if needed < (1 + a) * gap:
                first, last = min(first, max(1 - a, needed / gap)), 1 + a
        elif needed < (1 - a) * gap:
            first = 1 - a
            last = max(last, min(1 + a, needed / gap) if gap < 0 else 1 + a)
    return first, last


@compiled
def _at_factor(
    how: Setting,
    crowd: Array,
    n: int,
    star: int,
    f_q: float,
    nodes: Array,
    share: float,
    result: Array,
) -> None:
    """Add ``share`` times the rate around one factor of the query."""
    wide = math.sqrt(3.0) * how.sigma * f_q
    needed = how.needed * nodes[1, _NEAR - 1]
    first, last = _range(how, crowd, n, star, f_q, wide)
    last -= needed
    if last <= first:
        return
    start = first
    if how.plain and n > _MANY:  # the largest ones alone tell where W can't be
        m, own = _levels(crowd, _MANY, star, f_q, wide, first - _FAR, True)
        first = _where_mass_begins(crowd, m, start, last)
    m, own = _levels(crowd, n, star, f_q, wide, first - _FAR, how.plain)
    first = _where_mass_begins(crowd, m, first, last)
    earlier = 0.0 if first > start else -1.0  # W's density rises from zero, or begins with a step
    width = (last - first) / _CELLS
    for k in range(m):
        crowd[E_LOW, k] = _exp(min(_MOST, crowd[LOW, k] - first))
        crowd[E_HIGH, k] = _exp(min(_MOST, crowd[HIGH, k] - first))
        crowd[SO_FAR, k], crowd[MASS, k] = 0.0, earlier  # what lies below is in the first cell
    far = (n - m) * math.exp(-_FAR)
    fade, per = math.exp(-0.5 * width), math.exp(-width)
    winners = m
    done = _Sum(0.0, 0.0, 0.0)
    for i in range(_CELLS):
        low = first + i * width
        while crowd[HIGH, m - 1] <= low:  # from here on it only fades
            m -= 1
            done = _with_done(crowd, m, first, done)
        while winners > 0 and crowd[HIGH, winners - 1] <= low + needed:
            winners -= 1
        if winners == 0:
            return
        cell = _Cell(low, width, fade)
        away = low + 0.5 * width - first
        faded = _Sum(
            done.mean * fade, done.variance * fade * fade, (done.drift - away * done.mean) * fade
        )
        _add_cell(how, crowd, (m, winners, own), cell, faded, far, nodes, share, result)
        fade *= per


@compiled
def _exp(x: float) -> float:
    return math.exp(x) if x > _FADED else 0.0


@compiled
def _range(
    how: Setting, crowd: Array, n: int, star: int, f_q: float, wide: float
) -> tuple[float, float]:
    """Where W can lie below a winner: from the second of the lowest ends, and the attended one's.

    One token can be the winner itself. To the highest end of another than the attended one.
    """
    largest, second, own_low, last = -math.inf, -math.inf, 0.0, -math.inf
    for k in range(n):
        middle, half = f_q * crowd[S, k] + crowd[BIAS, k], max(_LEAST, wide * abs(crowd[S, k]))
        low = middle - half
        if low > largest:
            largest, second = low, largest
        elif low > second:
            second = low
        if k == star:
            own_low = low
        else:
            last = max(last, middle + half)
        if how.plain and k > max(1, star):  # they descend
            break
    return max(second, own_low), last


@compiled
def _levels(
    crowd: Array, n: int, star: int, f_q: float, wide: float, bar: float, descend: bool
) -> tuple[int, int]:
    """Put the tokens above ``bar`` on their levels; their number, and the attended one's index."""
    m, own = 0, -1
    for k in range(n):
        middle, half = f_q * crowd[S, k] + crowd[BIAS, k], max(_LEAST, wide * abs(crowd[S, k]))
        high = middle + half
        if high <= bar:
            if descend:
                break
            continue
        j = m
        while j > 0 and crowd[HIGH, j - 1] < high:
            for row in (HIGH, LOW, SLOPE):
                crowd[row, j] = crowd[row, j - 1]
            j -= 1
        crowd[HIGH, j], crowd[LOW, j], crowd[SLOPE, j] = high, middle - half, 0.5 / half
        if k == star:
            own = j
        elif own >= j:
            own += 1
        m += 1
    return m, own


@compiled_without_nan
def _where_mass_begins(crowd: Array, m: int, first: float, last: float) -> float:
    """A level between these below which W is with hardly any probability."""
    low, high = first, last
    for _ in range(_HALVINGS):
        w = 0.5 * (low + high)
        product, least = 1.0, 1.0
        for k in range(m):
            f = min(1.0, max(_TINY, (w - crowd[LOW, k]) * crowd[SLOPE, k]))
            product *= f
            least = min(least, f)
        if product < _LOST * least:
            low = w
        else:
            high = w
    return low


@compiled
def _with_done(crowd: Array, k: int, first: float, done: _Sum) -> _Sum:
    """The sum of tokens that never exceed W, as it is at the start of the grid, and one more."""
    high, low, slope = crowd[E_HIGH, k], crowd[E_LOW, k], crowd[SLOPE, k]
    mean = slope * (high - low)
    upper, lower = crowd[HIGH, k] - first - 1, crowd[LOW, k] - first - 1
    return _Sum(
        done.mean + mean,
        done.variance + max(0.0, 0.5 * slope * (high * high - low * low) - mean * mean),
        done.drift + slope * (upper * high - lower * low),
    )


@compiled_without_nan
def _token(crowd: Array, k: int, cell: _Cell) -> _Token:
    low, slope, middle = crowd[LOW, k], crowd[SLOPE, k], cell.low + 0.5 * cell.width
    below = min(1.0, max(_TINY, (cell.low + cell.width - low) * slope))
    begun = min(1.0, max(_TINY, (cell.low - low) * slope))
    inverse = slope / min(1.0, max(_TINY, (middle - low) * slope))
    over = min(0.0, crowd[HIGH, k] - middle)
    top = crowd[E_HIGH, k] * cell.fade if over < 0 else 1.0
    bottom = min(1.0, crowd[E_LOW, k] * cell.fade)  # one token can lie above W: it is the winner
    mean = min(1.0, (top - bottom) * inverse)
    return _Token(
        below,
        (below - begun) / (below + begun),
        mean,
        max(0.0, 0.5 * (top + bottom) * mean - mean * mean),
        max(-1.0, min(0.0, ((over - 1) * top - (low - middle - 1) * bottom) * inverse)),
    )


@compiled_without_nan
def _add_cell(
    how: Setting,
    crowd: Array,
    counts: tuple[int, int, int],
    cell: _Cell,
    done: _Sum,
    far: float,
    nodes: Array,
    share: float,
    result: Array,
) -> None:
    """Add what W in this cell gives, for every token that may win over it."""
    m, winners, own = counts
    below, (means, variances, drifts) = 1.0, done
    weights, weighted, squares, inner, drifted = 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(m):
        t = _token(crowd, k, cell)
        below *= t.below
        means += t.mean
        variances += t.variance
        drifts += t.drift
        weights += t.weight
        weighted += t.weight * t.mean
        squares += t.weight * t.mean * t.mean
        inner += t.weight * t.variance
        drifted += t.weight * t.drift
    middle = cell.low + 0.5 * cell.width
    if how.sink > -math.inf:
        means += math.exp(min(700.0, how.sink - middle))
    estimate, low, high = 0.0, 0.0, 0.0
    within = cell.width * cell.width / 12  # W's own variance
    needed = how.needed * nodes[1, _NEAR - 1]
    for j in range(winners):
        t = _token(crowd, j, cell)
        so_far = below / t.below
        mass = so_far - crowd[SO_FAR, j]
        last = crowd[MASS, j] if crowd[MASS, j] >= 0 else mass
        crowd[SO_FAR, j], crowd[MASS, j] = so_far, mass
        space = crowd[HIGH, j] - middle
        able = mass * (space - needed + 0.5 * cell.width) * crowd[SLOPE, j]
        if j == own or able < _NOTHING:
            high += max(0.0, able) if j != own else 0.0
            continue
        # W lies in the cell where its density, a line through this cell and the last, has it.
        bent = max(-1.0, min(1.0, (mass - last) / mass))
        space -= cell.width * bent / 12
        # Of the others one is W: its mean does not count, it adds 1 itself.
        per = 1 / max(weights - t.weight, _TINY)
        largest = (weighted - t.weight * t.mean) * per
        spread = max(0.0, variances - t.variance - (inner - t.weight * t.variance) * per)
        spread += max(0.0, (squares - t.weight * t.mean * t.mean) * per - largest * largest)
        others = _Sum(
            max(0.0, means - t.mean - largest),
            spread,
            min(0.0, drifts - t.drift - (drifted - t.weight * t.drift) * per),
        )
        rates = _winner(how, space, crowd[SLOPE, j], others, within, far, nodes)
        estimate += mass * rates[0]
        low += mass * rates[1]
        high += mass * rates[2]
    result[0] += share * estimate
    result[1] += share * low
    result[2] += share * high


@compiled_without_nan
def _winner(
    how: Setting,
    space: float,
    slope: float,
    others: _Sum,
    within: float,
    far: float,
    nodes: Array,
) -> tuple[float, float, float]:
    """E P(l_j >= w + M - ln(room)): estimate, lower and upper bound."""
    rest, variance, drift = others
    log, inverse = math.log(1 + rest), 1 / (1 + rest)
    relative = variance * inverse * inverse
    skewed = relative * (6 + relative) / (6 + 4 * relative)  # ln(1 + relative), to 1e-3
    drift *= inverse
    bend = 0.5 * drift * drift / max(rest, _ALONE)
    mean, least, most = log - 0.5 * skewed, max(0.0, log - 0.5 * variance), log + far
    estimate, low, high = 0.0, 0.0, 0.0
    for k in range(nodes.shape[1]):
        part, inverse, of_r = nodes[0, k], nodes[1, k], nodes[2, k]
        needed = how.needed + (drift + bend * of_r) * of_r
        turn = math.sqrt(skewed * inverse * inverse + within)
        y = space - (needed + mean) * inverse
        more, less = (y - turn) * slope, (y + turn) * slope
        estimate += part * 0.5 * (min(1.0, max(0.0, more)) + min(1.0, max(0.0, less)))
        low += part * min(1.0, max(0.0, (space - (needed + most) * inverse) * slope))
        y = space - (needed + least) * inverse
        higher = 0.5 * (math.sqrt(variance * inverse * inverse + within + y * y) + y) * slope
        high += part * min(1.0, higher)
    return estimate, low, high
