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

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import UNIFORM, drawn_factor, normal_cdf
from hooks.kernels.row import sort_descending
from hooks.kernels.strict_grid import CROWD, capped, curvature, grid_rate
from hooks.kernels.strict_uniform import uniform_rate
from hooks.kernels.types import BIAS, Array, Rule, S, Scratch, Setting

__all__ = ["CROWD", "strict_rates"]

_Q_ALONE, _Q_ALONE_END = 64, 5.5  # cells and end of a query's number where only it is noised
_FAR = 12.0  # tokens that stay further below W add less than exp(-12)
_SLIGHT = 1e-6  # loose rates below which the strict one is only bounded
_LEVEL = 5  # a row of the working memory


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
    result, law, needed = np.empty(3), rule.law, -math.log(rule.room)
    plain = not rule.biased and sink == -math.inf
    for i in range(len(rule.sigmas) - 1, -1, -1):
        sigma = rule.sigmas[i]
        for which in range(3):  # without slices, whose compilation takes seconds
            result[which] = 0.0
        if use.rates[i] < _SLIGHT:  # a strict collapse is a loose one
            at[2][i] += use.rates[i]
            continue
        how = Setting(law, sigma, rule.soft_cap, needed, sink, plain, curvature(law, sigma))
        if not rule.on_k:
            result[0] = result[1] = result[2] = _query_alone(how, crowd, n, star)
        elif law == UNIFORM and rule.soft_cap == 0.0:
            if not uniform_rate(how, crowd, n, star, rule.on_q, result):
                return  # nor at smaller sigmas
        else:
            grid_rate(how, crowd, n, star, rule.on_q, result)
        high = min(result[2], use.rates[i])
        low = min(result[1], high)
        at[0][i] += min(max(result[0], low), high)
        at[1][i] += low
        at[2][i] += high


@compiled
def _gather(rule: Rule, use: Scratch, crowd: Array, n: int, star: int) -> tuple[int, int]:
    """Copy the tokens that can matter at any sigma, largest first: how many, and ``star`` there."""
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
            use.key[count], use.near[count], use.place[count] = use.s[k], use.bias[k], k
            count += 1
    sort_descending(use.key, use.near, use.place, count, use.spare, use.at)
    for k in range(count):
        if use.place[k] == star:
            own = k
        crowd[S, k], crowd[BIAS, k] = use.key[k], use.near[k]
    return count, own


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
        level = capped(how.soft_cap, f_q * crowd[S, k] + crowd[BIAS, k])
        crowd[_LEVEL, k] = level
        if level > top:
            best, top = k, level
    if best == star:
        return False
    room = math.exp(-how.needed) + 1 - math.exp(how.sink - top)  # the winner is in the sum
    for k in range(n):
        room -= math.exp(crowd[_LEVEL, k] - top)
    return room >= 0
