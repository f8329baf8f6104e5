"""Compiled: the probability that a row jumps to another token and is sparse there again.

Token j wins strictly if all others together have at most ``room`` times its weight. With the level
l_t = cap(f_q f_t s_t + b_t) of every token, W the largest level but j's, and

    M = ln(1 + sum of exp(l_t - W) over the other tokens, sinks included),

this is l_j >= W + M - ln(room). Two tokens cannot both win, so

    P = sum_j E_q [ integral of P(l_j >= w + M - ln(room)) dP(W <= w) ],

where P(W <= w) is the product of the others' distribution functions. Only M couples them. Given W
the others are independent and at most W: mean and variance of their sum are integrals of their
distribution functions, and the estimate puts half of M's mass one standard deviation to either
side of its mean, as for a lognormal exp(M). Bounds, up to the grids' own error: under uniform noise
P(l_j >= x) is convex in x, so Jensen's inequality (with E M <= ln E exp(M)) bounds the integrand
from below, and Scarf's (E (y - M)_+ <= (sqrt(V + (y - E M)^2) + y - E M) / 2) from above. Under
other laws a second-order remainder does both or, where that is nearer (and under soft caps),
Cantelli's inequality.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import (
    GAUSSIAN,
    LEGENDRE_W,
    LEGENDRE_X,
    LOGNORMAL,
    UNIFORM,
    drawn_factor,
    factor_cdf,
    normal_cdf,
    normal_rule,
)
from hooks.kernels.types import Array, Rule, Scratch

_Q_NODES = 4  # of the query's factor under uniform noise
_Q_STEP, _Q_END = 0.5, 5.0  # its normal variable under the other laws
_TAIL = 4.5  # normal variable beyond which a level is not followed
_CELLS, _MORE_CELLS = 12, 40  # of the grid of W: under uniform noise, under other laws
_BELOW, _DEPTH = 5, 10.0  # cells and length of a grid below it, from which sums start
_Q_ALONE, _Q_ALONE_END = 64, 5.5  # cells and end of a query's number where only it is noised
_FAR = 12.0  # tokens that stay further below W add less than exp(-12)
_SLIGHT = 1e-6  # loose rates below which the strict one is only bounded
_NOTHING = 1e-9  # mass of W in a cell that is not followed
_TINY = 1e-30


# Rows of the working memory: a row's tokens that matter, and each one's state on the grid of W.
S, BIAS = 0, 1  # q.k parts before the query's factor, and what is added
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


class Setting(NamedTuple):
    """What holds for all tokens of a row at one sigma."""

    law: int
    sigma: float
    soft_cap: float
    needed: float  # by how much a token must lie above the others' sum
    sink: float
    curvature: float  # the largest slope of the factor's density


@compiled
def strict_rates(
    rule: Rule, use: Scratch, n: int, star: int, sink: float, at: tuple[Array, Array, Array]
) -> None:
    """Add a row's strict rate at each sigma to ``at``: estimate, lower and upper bound.

    The row's n visible keys are in ``use``, and its loose rates; ``star`` is the attended key's
    index among them.
    """
    crowd = use.crowd
    n, star = _gather(rule, use, crowd, n, star)
    if n < 2:
        return
    result = np.empty(3)
    for i in range(len(rule.sigmas) - 1, -1, -1):
        sigma = rule.sigmas[i]
        for which in range(3):  # without slices, whose compilation takes seconds
            result[which] = 0.0
        if use.rates[i] < _SLIGHT:  # a strict collapse is a loose one
            at[2][i] += use.rates[i]
            continue
        law, needed = rule.law, -math.log(rule.room)
        how = Setting(law, sigma, rule.soft_cap, needed, sink, _curvature(law, sigma))
        if not rule.on_k:
            result[0] = result[1] = result[2] = _query_alone(how, crowd, n, star)
        elif not rule.on_q:
            _at_factor(how, crowd, n, star, 1.0, 1.0, result)
        elif law == UNIFORM:
            if not _over_uniform_queries(how, crowd, n, star, result):
                return  # nor at smaller sigmas
        else:
            for k in range(int(2 * _Q_END / _Q_STEP) + 1):
                z = -_Q_END + k * _Q_STEP
                share = normal_rule(_Q_STEP, z)
                _at_factor(how, crowd, n, star, drawn_factor(law, z, sigma), share, result)
        high = min(result[2], use.rates[i])
        low = min(result[1], high)
        at[0][i] += min(max(result[0], low), high)
        at[1][i] += low
        at[2][i] += high


@compiled
def _gather(rule: Rule, use: Scratch, crowd: Array, n: int, star: int) -> tuple[int, int]:
    """Copy the tokens that can matter at any sigma; how many, and the attended one's index."""
    bar, a = -math.inf, math.sqrt(3.0) * rule.sigmas[-1]
    if rule.law == UNIFORM and rule.on_k and rule.soft_cap == 0.0 and not rule.biased:
        low, top = use.s[star] - a * abs(use.s[star]), -math.inf
        for k in range(n):
            if k != star:
                top = max(top, use.s[k] + a * abs(use.s[k]))
        most = 1 + a if rule.on_q else 1.0
        if most * (top - low) <= -math.log(rule.room):
            return 0, 0
        bar = low - _FAR * (top - low) / -math.log(rule.room)
    count, own = 0, 0
    for k in range(n):
        if use.s[k] + a * abs(use.s[k]) > bar:
            if k == star:
                own = count
            crowd[S, count], crowd[BIAS, count] = use.s[k], use.bias[k]
            count += 1
    return count, own


@compiled
def _over_uniform_queries(how: Setting, crowd: Array, n: int, star: int, result: Array) -> bool:
    """Integrate over the query's factor, where any token can win; False where none can."""
    a = math.sqrt(3.0) * how.sigma
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
    if last <= first:
        return False
    for k in range(_Q_NODES):
        f_q = first + (last - first) * LEGENDRE_X[_Q_NODES, k]
        share = LEGENDRE_W[_Q_NODES, k] * (last - first) / (2 * a)
        _at_factor(how, crowd, n, star, f_q, share, result)
    return True


@compiled
def _query_alone(how: Setting, crowd: Array, n: int, star: int) -> float:
    """Under query noise alone: where in its factor's law another token wins, by bisection."""
    uniform = how.law == UNIFORM
    end = 1.0 if uniform else _Q_ALONE_END
    total, last, held = 0.0, -end, _wins(how, crowd, n, star, -end)
    for i in range(1, _Q_ALONE + 1):
        z = -end + 2 * end * i / _Q_ALONE
        holds = _wins(how, crowd, n, star, z)
        turn = z if holds == held else _turn(how, crowd, n, star, last, z)
        begin, stop = (last, turn) if held else (turn, z)
        if held or holds:
            total += _mass(uniform, begin, stop)
        last, held = z, holds
    return total


@compiled
def _turn(how: Setting, crowd: Array, n: int, star: int, low: float, high: float) -> float:
    """Where between the ends a win begins or stops."""
    held = _wins(how, crowd, n, star, low)
    for _ in range(40):
        middle = 0.5 * (low + high)
        if _wins(how, crowd, n, star, middle) == held:
            low = middle
        else:
            high = middle
    return low


@compiled
def _mass(uniform: bool, low: float, high: float) -> float:
    """Of a factor's number, uniform in (-1, 1) or standard normal, between two values."""
    return (high - low) / 2 if uniform else normal_cdf(high) - normal_cdf(low)


@compiled
def _wins(how: Setting, crowd: Array, n: int, star: int, z: float) -> bool:
    """Whether another token wins strictly at this number of the query's factor."""
    f_q = drawn_factor(how.law, z, how.sigma)
    best, top = -1, -math.inf
    for k in range(n):
        level = _capped(how.soft_cap, f_q * crowd[S, k] + crowd[BIAS, k])
        crowd[CDF, k] = level
        if level > top:
            best, top = k, level
    if best == star:
        return False
    room = math.exp(-how.needed) + 1 - math.exp(how.sink - top)  # the winner is in the sum
    for k in range(n):
        room -= math.exp(crowd[CDF, k] - top)
    return room >= 0


@compiled
def _capped(soft_cap: float, x: float) -> float:
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


# -- one factor of the query ----------------------------------------------------------------------


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
def _curvature(law: int, sigma: float) -> float:
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
        low, high = _capped(how.soft_cap, min(ends)), _capped(how.soft_cap, max(ends))
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
