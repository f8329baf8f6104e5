"""Compiled: the strict rate on a grid of W, under any law and soft cap.

In the notation of :mod:`hooks.kernels.strict`. With F the distribution function of a level, mean
and mean square of exp(l - w) given l <= w are

    1 - (1/F(w)) integral of exp(l - w) F(l),    1 - (2/F(w)) integral of exp(2 l - 2 w) F(l),

which grow from cell to cell of the grid.
"""

from __future__ import annotations

import math

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import (
    GAUSSIAN,
    LEGENDRE_W,
    LEGENDRE_X,
    LOGNORMAL,
    UNIFORM,
    drawn_factor,
    factor_cdf,
    normal_rule,
)
from hooks.kernels.strict_uniform import winning_factors
from hooks.kernels.types import BIAS, Array, S, Setting

_Q_NODES = 6  # of the query's factor under uniform noise
_Q_STEP, _Q_END = 0.5, 5.0  # its normal variable under the other laws
_TAIL = 4.5  # normal variable beyond which a level is not followed
_CELLS, _MORE_CELLS = 12, 40  # of the grid of W: under uniform noise, under other laws
_BELOW, _DEPTH = 5, 10.0  # cells and length of a grid below it, from which sums start
_FAR = 12.0  # tokens that stay further below W add less than exp(-12)
_NOTHING = 1e-9  # mass of W in a cell that is not followed
_TINY = 1e-30

# Rows of the working memory: each token's state on the grid of W.
ORIGIN, SLOPE = 2, 3  # (l - origin) * slope: the key's factor; under uniform noise P(. <= l)
HIGH = 4  # the level that the token never exceeds
CDF, BEFORE = 5, 6  # P(l <= w) at a cell's upper end, and at its lower one
ONE, TWO = 7, 8  # integrals of exp(l - w) P(. <= l) and of exp(2 l - 2 w) P(. <= l) up to w
MEAN, VARIANCE = 9, 10  # of exp(l - w), given l <= w: at the cell's end,
MIDDLE_MEAN, MIDDLE_VARIANCE = 11, 12  # and in its middle
WEIGHT = 13  # to be the largest, in this cell
INVERSE, INVERSE_BEFORE = 14, 15  # 1 / cdf, 1 / before
DENSITY = 16  # of W in the cell before
CROWD = 17


@compiled
def grid_rate(how: Setting, crowd: Array, n: int, star: int, on_q: bool, result: Array) -> None:
    """Add a row's rate to ``result``."""
    if not on_q:
        _at_factor(how, crowd, n, star, 1.0, 1.0, result)
    elif how.law == UNIFORM:
        a = math.sqrt(3.0) * how.sigma
        first, last = winning_factors(how, crowd, n, star, a)
        for k in range(_Q_NODES):
            f_q = first + (last - first) * LEGENDRE_X[_Q_NODES, k]
            share = LEGENDRE_W[_Q_NODES, k] * max(0.0, last - first) / (2 * a)
            _at_factor(how, crowd, n, star, f_q, share, result)
    else:
        step = _Q_STEP if how.plain else 0.5 * _Q_STEP  # with biases, wins begin at a corner
        for k in range(int(2 * _Q_END / step) + 1):
            z = -_Q_END + k * step
            share, f_q = normal_rule(step, z), drawn_factor(how.law, z, how.sigma)
            _at_factor(how, crowd, n, star, f_q, share, result)


@compiled
def curvature(law: int, sigma: float) -> float:
    """The largest slope of a factor's density, under an unbounded law."""
    if law == UNIFORM:
        return 0.0
    if law == GAUSSIAN:
        return math.exp(-0.5) / (math.sqrt(2 * math.pi) * sigma * sigma)
    s = math.sqrt(math.log1p(sigma * sigma))
    most = 0.0
    for sign in (-1.0, 1.0):  # where the slope itself turns
        v = 0.5 * (sign * math.sqrt(s * s + 4) - s)
        u = v - s
        log = s * s - 2 * s * u - 0.5 * u * u
        most = max(most, math.exp(log) * abs(v) / (s * s * math.sqrt(2 * math.pi)))
    return most


@compiled
def capped(soft_cap: float, x: float) -> float:
    """A score under its soft cap; 0: none."""
    return soft_cap * math.tanh(x / soft_cap) if soft_cap > 0 else x


@compiled
def _uncapped(soft_cap: float, w: float) -> float:
    """The score before its soft cap; infinite from the cap on."""
    if soft_cap == 0.0:
        return w
    share = w / soft_cap
    if abs(share) >= 1:
        return math.copysign(math.inf, share)
    return soft_cap * math.atanh(share)


@compiled
def _at_factor(
    how: Setting, crowd: Array, n: int, star: int, f_q: float, share: float, result: Array
) -> None:
    """Add ``share`` times the rate at one factor of the query to ``result``."""
    m, own, first, last = _levels(how, crowd, n, star, f_q)
    last -= how.needed
    if last <= first:
        return
    _start(how, crowd, m, first)
    cells = _CELLS if how.law == UNIFORM else _MORE_CELLS
    w, left_out = first, (n - m) * math.exp(-_FAR)
    for i in range(1, cells + 1):
        part = i / cells
        if how.law == LOGNORMAL:  # skewed: finer below
            part *= part
        upper = first + (last - first) * part
        _below(how, crowd, m, upper)
        _integrate(crowd, m, upper - w)
        _cell(how, crowd, m, own, w, upper, left_out, share, result)
        w = upper


@compiled
def _levels(
    how: Setting, crowd: Array, n: int, star: int, f_q: float
) -> tuple[int, int, float, float]:
    """Put the tokens that matter on levels; their number, the attended one's index, W's range.

    W is at least the second of the lowest levels, and the attended token's: one token can be j.
    """
    end = 1.0 if how.law == UNIFORM else _TAIL
    lower, upper = drawn_factor(how.law, -end, how.sigma), drawn_factor(how.law, end, how.sigma)
    largest, second, own_low, last = -math.inf, -math.inf, 0.0, -math.inf
    for k in range(n):
        scale = f_q * crowd[S, k]
        ends = scale * lower + crowd[BIAS, k], scale * upper + crowd[BIAS, k]
        low, high = capped(how.soft_cap, min(ends)), capped(how.soft_cap, max(ends))
        crowd[HIGH, k] = high
        if low > largest:
            largest, second = low, largest
        elif low > second:
            second = low
        if k == star:
            own_low = low
        else:
            last = max(last, high)
    first = max(second, own_low)
    m, own = 0, -1
    for k in range(n):
        if crowd[HIGH, k] <= first - _FAR:
            continue
        if k == star:
            own = m
        scale = f_q * crowd[S, k]
        if how.law == UNIFORM:
            crowd[ORIGIN, m] = scale - (upper - 1) * abs(scale) + crowd[BIAS, k]
            crowd[SLOPE, m] = 0.5 / max((upper - 1) * abs(scale), _TINY)
        else:
            crowd[ORIGIN, m] = crowd[BIAS, k]
            crowd[SLOPE, m] = 1 / math.copysign(max(abs(scale), _TINY), scale)
        crowd[HIGH, m] = crowd[HIGH, k]
        m += 1
    return m, own, first, last


@compiled
def _below(how: Setting, crowd: Array, m: int, w: float) -> None:
    """Fill ``cdf``: P(l <= w)."""
    u = _uncapped(how.soft_cap, w)
    if how.law == UNIFORM:
        for k in range(m):
            crowd[CDF, k] = min(1.0, max(0.0, (u - crowd[ORIGIN, k]) * crowd[SLOPE, k]))
        return
    for k in range(m):
        crowd[CDF, k] = 1 - _above(how, crowd[ORIGIN, k], crowd[SLOPE, k], w)


@compiled
def _above(how: Setting, origin: float, slope: float, w: float) -> float:
    """P(l >= w) of one token."""
    x = (_uncapped(how.soft_cap, w) - origin) * slope
    if how.law == UNIFORM:
        return 1 - min(1.0, max(0.0, x))
    below = factor_cdf(how.law, x, how.sigma)
    return 1 - below if slope > 0 else below


@compiled
def _integrate(crowd: Array, m: int, h: float) -> None:
    """Carry the integrals of exp(l - w) over one cell, in which P(. <= l) is taken as a line."""
    e = math.exp(-h)
    whole, whole_two = (1 - e) / h, (1 - e * e) / (2 * h)
    for k in range(m):
        f, p = crowd[CDF, k], crowd[BEFORE, k]
        crowd[ONE, k] = e * crowd[ONE, k] + (whole - e) * p + (1 - whole) * f
        two = (whole_two - e * e) * p + (1 - whole_two) * f
        crowd[TWO, k] = e * e * crowd[TWO, k] + 0.5 * two


@compiled
def _start(how: Setting, crowd: Array, m: int, first: float) -> None:
    """The state at the lower end of W's grid."""
    step = _DEPTH / _BELOW
    _below(how, crowd, m, first - _DEPTH)
    for k in range(m):
        # As if the distribution function had this value all the way down: too much, by exp(-10).
        crowd[ONE, k] = crowd[TWO, k] = 0.0
        crowd[BEFORE, k] = crowd[CDF, k]
    for i in range(1, _BELOW + 1):
        _below(how, crowd, m, first - _DEPTH + i * step)
        _integrate(crowd, m, step)
        for k in range(m):
            crowd[BEFORE, k] = crowd[CDF, k]
    for k in range(m):
        inverse = 1 / max(crowd[BEFORE, k], _TINY)
        mean = min(1.0, max(0.0, 1 - crowd[ONE, k] * inverse))
        crowd[MEAN, k], crowd[INVERSE_BEFORE, k], crowd[DENSITY, k] = mean, inverse, 0.0
        crowd[VARIANCE, k] = max(0.0, 1 - 2 * crowd[TWO, k] * inverse - mean * mean)


@compiled
def _cell(
    how: Setting,
    crowd: Array,
    m: int,
    own: int,
    low: float,
    high: float,
    left_out: float,
    share: float,
    result: Array,
) -> None:
    """Add what W between these ends gives, for every token that may win over it."""
    h, middle = high - low, 0.5 * (low + high)
    sink = math.exp(min(700.0, how.sink - middle)) if how.sink > -math.inf else 0.0
    below, begun = 1.0, 1.0  # P(W <= .) at both ends
    means, variances, weights, weighted, squares, inner = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(m):
        f, p = max(crowd[CDF, k], _TINY), max(crowd[BEFORE, k], _TINY)
        inverse = 1 / f
        at_end = min(1.0, max(0.0, 1 - crowd[ONE, k] * inverse))
        varies = max(0.0, 1 - 2 * crowd[TWO, k] * inverse - at_end * at_end)
        mean = 0.5 * (at_end + crowd[MEAN, k])
        variance = 0.5 * (varies + crowd[VARIANCE, k])
        weight = (f - p) / (f + p)
        crowd[INVERSE, k], crowd[WEIGHT, k] = inverse, weight
        crowd[MEAN, k], crowd[VARIANCE, k] = at_end, varies
        crowd[BEFORE, k] = crowd[CDF, k]
        crowd[MIDDLE_MEAN, k], crowd[MIDDLE_VARIANCE, k] = mean, variance
        means += mean
        variances += variance
        weights += weight
        weighted += weight * mean
        squares += weight * mean * mean
        inner += weight * variance
        below *= f
        begun *= p
    for j in range(m):
        density = (below * crowd[INVERSE, j] - begun * crowd[INVERSE_BEFORE, j]) / h
        last = crowd[DENSITY, j]
        crowd[DENSITY, j], crowd[INVERSE_BEFORE, j] = density, crowd[INVERSE, j]
        if j == own or density * h < _NOTHING or crowd[HIGH, j] < low + how.needed:
            continue
        # W lies in the cell where its density, a line through this cell and the last, has it.
        bent = max(-1.0, min(1.0, (density - last) / density))
        w = middle + h * bent / 12
        mean, variance, weight = crowd[MIDDLE_MEAN, j], crowd[MIDDLE_VARIANCE, j], crowd[WEIGHT, j]
        per = 1 / max(weights - weight, _TINY)
        largest = (weighted - weight * mean) * per  # mean of the one that is W: it adds 1 itself
        rest = max(0.0, means - mean - largest) + sink
        spread = max(0.0, variances - variance - (inner - weight * variance) * per)
        spread += max(0.0, (squares - weight * mean * mean) * per - largest * largest)
        token, others = (crowd[ORIGIN, j], crowd[SLOPE, j]), (rest, spread, left_out)
        _add_winner(how, token, w + how.needed, others, h, share * density * h, result)


@compiled
def _add_winner(
    how: Setting,
    token: tuple[float, float],
    x: float,
    others: tuple[float, float, float],
    h: float,
    share: float,
    result: Array,
) -> None:
    """Add ``share`` times E P(l_j >= x + M): estimate, lower and upper bound."""
    (origin, slope), (rest, variance, left_out) = token, others
    relative = variance / ((1 + rest) * (1 + rest))
    most = math.log(1 + rest)
    skewed = relative * (6 + relative) / (6 + 4 * relative)  # ln(1 + relative), to 1e-3
    mean = most - 0.5 * skewed
    within = h * h / 12  # W's own variance in its cell
    turn = math.sqrt(skewed + within)
    more = _above(how, origin, slope, x + mean + turn)
    result[0] += share * 0.5 * (more + _above(how, origin, slope, x + mean - turn))
    least, most = max(0.0, most - 0.5 * variance), most + left_out
    if how.law == UNIFORM and how.soft_cap == 0.0:
        y = 1 / slope + origin - x
        result[1] += share * min(1.0, max(0.0, (y - most) * slope))
        y -= least
        result[2] += share * min(1.0, 0.5 * (math.sqrt(variance + within + y * y) + y) * slope)
        return
    low, high = 0.0, _above(how, origin, slope, x)
    if how.soft_cap == 0.0:  # by a second-order remainder
        bend = 0.5 * how.curvature * slope * slope * (variance + within)
        low = _above(how, origin, slope, x + most) - bend
        high = min(high, _above(how, origin, slope, x + least) + bend)
    for k in range(3):
        away = 2.0**k
        out = 1 / (1 + away * away)
        step = away * math.sqrt(variance)
        low = max(low, (1 - out) * _above(how, origin, slope, x + most + step))
        high = min(high, _above(how, origin, slope, x + least - step) + out)
    result[1] += share * low
    result[2] += share * high
