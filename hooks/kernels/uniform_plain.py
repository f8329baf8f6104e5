"""Compiled: P without a bias under uniform noise, at all sigmas together.

With w = x / ((1 + a) s_*), r_t = s_t / s_* and c = (1 + a) / 2a, competitors come in at w = r_t
whatever sigma is, and w goes down from there to (1 - a) / (1 + a):

    P = c integral of (1 - H) dw,    H = prod_t (1 - c q_t),    q_t = max(0, 1 - w / r_t).

So one list of Legendre nodes serves all sigmas, and all but the nearest competitors enter through
power sums, log prod_t (1 - c q_t) = -sum_k c^k p_k / k with p_k = sum_t q_t^k. From a node w to the
next, rho w, every q_t becomes rho q_t + 1 - rho, and its powers follow. Where the last power counts
much, a sigma is computed by itself (:mod:`hooks.kernels.integrals`).

Where s_* < 0 it is 1 - a for 1 + a, w goes up to (1 + a) / (1 - a), and q_t = max(0, w / r_t - 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import (
    DEEP,
    FALL,
    LEGENDRE_W,
    LEGENDRE_X,
    legendre_nodes,
    uniform_plain,
)
from hooks.kernels.types import Array

_NEAREST = 6  # competitors that are factors of their own
_POWERS = 7  # of the others' q that are summed
_LAST = 3e-7  # of P, that the last power may give: what is left out is less
_LANES = 16  # nodes that are taken together, for the vector units
_NODES = 8 * _LANES

# Rows of the working memory; from _POWER on p_k / k, at each node.
_AT, _WEIGHT, _SUM, _POWER = 0, 1, 2, 3
_NOW = _POWER + _POWERS  # p_k where the walk is
_NEAR = _NOW + 1
NODES = (_NEAR + 2, _NODES)


class Walk(NamedTuple):
    """How far the nodes go."""

    begin: int  # the smallest sigma that takes part in those which are still to be taken
    used: int  # how many these are
    joined: int  # competitors in the power sums, and the nearest ones
    before: float  # the last node


@compiled
def uniform_rates(
    s_star: float,
    s: Array,
    inverse: Array,
    n: int,
    rest: float,
    sigmas: Array,
    nodes: Array,
    ends: Array,
    work: Array,
    grid: Array,
    out: Array,
) -> bool:
    """Set ``out`` to P at each sigma, ascending, of competitors that descend.

    ``rest``: the highest score of a competitor that is not among them; False where one would count.
    ``ends``: room for c and for the end of w, at each sigma.
    """
    n_sigmas, rising, w = len(sigmas), s_star < 0, s[0] / s_star
    per, edge = ends[0], ends[1]
    for j in range(n_sigmas):
        a = math.sqrt(3.0) * sigmas[j]
        per[j] = (1 - a if rising else 1 + a) / (2 * a)
        edge[j] = (1 + a) / (1 - a) if rising else (1 - a) / (1 + a)
    i = 0  # the smallest sigma whose w has not ended
    while i < n_sigmas and _passed(edge[i], w, rising):
        i += 1
    for k in range(_POWERS + 1):
        nodes[_NOW, k] = 0.0
    walk, m, slope, finest = Walk(i, 0, _NEAREST, w), 0, 0.0, i
    never = math.inf if rising else -math.inf
    unknown, place = rest / s_star if rest * s_star > 0 else never, w
    while i < n_sigmas:
        while _passed(place, w, rising):
            slope += s_star * inverse[m]
            m += 1
            place = s[m] / s_star if m < n and s[m] * s_star > 0 else never
        total = abs(m - w * slope)
        while finest < n_sigmas and per[finest] * total > DEEP:
            finest += 1  # there H is as good as zero
        if finest == n_sigmas:
            break
        if _passed(unknown, w, rising):
            return False
        stop = edge[i]
        for event in (place, unknown):
            stop = event if _passed(event, stop, rising) else stop
        fall = per[finest] * slope * abs(stop - w)
        parts = int(fall / FALL) + 1
        count = legendre_nodes(m, fall / parts, per[finest] * total)
        for part in range(parts):
            low, span = w + part * (stop - w) / parts, (stop - w) / parts
            walk = _lay(s_star, inverse, m, slope, walk, i, low, span, count, nodes, ends, out)
        w = stop
        while i < n_sigmas and _passed(edge[i], w, rising):
            i += 1
        finest = max(finest, i)
    _add(s_star, inverse, m, nodes, walk, ends, out)
    for j in range(i, n_sigmas):  # from here on H is as good as zero
        out[j] += per[j] * abs(w - edge[j])
    for j in range(n_sigmas):
        if out[j] != out[j]:
            a = math.sqrt(3.0) * sigmas[j]
            out[j] = uniform_plain(s_star, s, inverse, n, a, work, grid)
    return True


@compiled
def _lay(
    s_star: float,
    inverse: Array,
    m: int,
    slope: float,
    walk: Walk,
    i: int,
    low: float,
    span: float,
    count: int,
    nodes: Array,
    ends: Array,
    out: Array,
) -> Walk:
    """Lay nodes over a stretch; where there is no more room, take those that lie first."""
    begin, used, joined, before = walk
    for k in range(count):
        if used == _NODES:
            _add(s_star, inverse, m, nodes, Walk(begin, used, joined, before), ends, out)
            begin, used = i, 0
        w = low + span * LEGENDRE_X[count, k]
        joined = _step(s_star, inverse, m, joined, before, w, nodes, used)
        nodes[_WEIGHT, used] = abs(span) * LEGENDRE_W[count, k]
        nodes[_SUM, used] = abs(m - w * slope)
        before, used = w, used + 1
    return Walk(begin, used, joined, before)


@compiled
def _passed(place: float, w: float, rising: bool) -> bool:
    """Whether the walk to w has reached ``place``."""
    return place <= w if rising else place >= w


@compiled
def _step(
    s_star: float,
    inverse: Array,
    m: int,
    joined: int,
    before: float,
    w: float,
    nodes: Array,
    at: int,
) -> int:
    """Take the power sums from one node to the next; how many competitors they hold then."""
    now = nodes[_NOW]
    rho = w / before
    far, power = abs(1 - rho), rho
    for k in range(1, _POWERS + 1):
        now[k] *= power
        power *= rho
    for first in range(1, _POWERS + 1):  # Pascal's triangle, in place
        for k in range(_POWERS, first - 1, -1):
            now[k] += far * now[k - 1]
    for t in range(joined, m):
        q = abs(1 - w * s_star * inverse[t])
        power = 1.0
        for k in range(_POWERS + 1):
            now[k] += power
            power *= q
    nodes[_AT, at] = w
    for k in range(1, _POWERS + 1):
        nodes[_POWER + k - 1, at] = now[k] / k
    return max(joined, m)


@compiled
def _add(
    s_star: float,
    inverse: Array,
    m: int,
    nodes: Array,
    walk: Walk,
    ends: Array,
    out: Array,
) -> None:
    """Add what these nodes give to every sigma that takes part; NaN where that is not enough."""
    rising, used = s_star < 0, walk.used
    for k in range(used, -(-used // _LANES) * _LANES):  # the last lanes repeat a node
        for row in range(_NOW):
            nodes[row, k] = nodes[row, used - 1]
    for i in range(walk.begin, ends.shape[1]):
        c, end = ends[0, i], used
        while end > 0 and _passed(ends[1, i], nodes[_AT, end - 1], rising):
            end -= 1
        low, cut = 0, end  # H is as good as zero from the first node on that is deep
        while low < cut:
            middle = (low + cut) // 2
            if c * nodes[_SUM, middle] > DEEP:
                cut = middle
            else:
                low = middle + 1
        total, last = _moved(s_star, inverse, m, nodes, cut, c)
        for k in range(cut, end):
            total += nodes[_WEIGHT, k]
        out[i] += c * total if c * last < _LAST else math.nan


@compiled
def _moved(
    s_star: float, inverse: Array, m: int, nodes: Array, cut: int, c: float
) -> tuple[float, float]:
    """Sum of the first nodes' weights times 1 - H, and of H times the last power."""
    at, weight, p, near = nodes[_AT], nodes[_WEIGHT], nodes[_POWER:], nodes[_NEAR:]
    rising = s_star < 0
    for t in range(_NEAREST):  # its factor is near[0, t] + near[1, t] w, at most 1
        near[0, t], near[1, t] = 1.0, 0.0
        if t < m:
            near[0, t] = 1 + c if rising else 1 - c
            near[1, t] = (-c if rising else c) * s_star * inverse[t]
    total, last = 0.0, 0.0
    # Nothing is stored in these loops, and no index can count from the end: so they are vectorised.
    for block in range(-(-cut // _LANES)):
        start = block * _LANES
        if m <= _NEAREST:
            for lane in range(_LANES):
                k, h = np.uintp(start + lane), 1.0
                for t in range(_NEAREST):
                    h *= min(1.0, near[0, t] + near[1, t] * at[k])
                total += (weight[k] if start + lane < cut else 0.0) * (1 - h)
            continue
        for lane in range(_LANES):
            k = np.uintp(start + lane)
            log = p[3, k] + c * (p[4, k] + c * (p[5, k] + c * p[6, k]))
            log = c * (p[0, k] + c * (p[1, k] + c * (p[2, k] + c * log)))
            x = max(-log, -40.0) / 256
            h = 1 + x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
            for _ in range(8):  # exp, to 1e-6, without a call
                h *= h
            for t in range(_NEAREST):
                h *= min(1.0, near[0, t] + near[1, t] * at[k])
            mine = weight[k] if start + lane < cut else 0.0
            total += mine * (1 - h)
            last += mine * h * p[6, k]
    return total, c**_POWERS * last
