"""Compiled: the probability that a row's arg max moves under norm noise.

A competitor's noised score is a random variable X_t = f_t s_t - beta_t / f_q, the attended one's
X_* = f_* s_* (see :mod:`hooks.noise.probability`), so that

    P = P(max_t X_t > X_*) = E_{X_*}[ 1 - H(X_*) ],        H(x) = prod_t P(X_t <= x).

Under uniform noise every factor of H is a line in x that ends at 1: between the points at which a
competitor comes in H is a polynomial, which takes Legendre nodes, as many as keep P's error below
3e-7. Under the other laws H is smooth, and the trapezoidal rule in the normal variable behind f_*
converges beyond any power of its step.
"""

from __future__ import annotations

import math

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.types import Array

UNIFORM, GAUSSIAN, LOGNORMAL = 0, 1, 2
LAW_CODES = {"uniform": UNIFORM, "gaussian": GAUSSIAN, "lognormal": LOGNORMAL}

_FEW = 16  # competitors up to which each node is taken for itself
_LANES = 8  # nodes that are taken together, for the vector units
_BLOCK = 4 * _LANES
GRID = (3, _BLOCK)
_Y, _WEIGHT, _H = 0, 1, 2  # its rows
FALL = 2.0  # of log H, by which it falls in one stretch at most, or little more
_WRONG = 2e-6  # error of the mean of H
DEEP = 15.0  # H < exp(-15), and less beyond: what is cut off is below 1e-7
_Z_END, _Z_STEP = 8.5, 0.125  # normal variable of a factor; 1e-17 of the mass lies beyond
_Q_NODES = 8  # nodes per panel of the outer integral over f_q, under uniform noise
# Panels, finer towards small f_q (by which the bias is divided), further split where the nearest
# competitors turn.
_Q_PANELS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0)
_Q_NEAREST = 8


def _legendre() -> tuple[Array, Array]:
    """Nodes in (0, 1) and weights of the rules with 1 to 10 nodes, a row each."""
    most = 10
    x, w = np.zeros((most + 1, most)), np.zeros((most + 1, most))
    for n in range(1, most + 1):
        nodes, weights = np.polynomial.legendre.leggauss(n)
        x[n, :n], w[n, :n] = (nodes + 1) / 2, weights / 2
    return x, w


LEGENDRE_X, LEGENDRE_W = _legendre()
# Of n nodes on a stretch of length 1, as a multiple of the derivative of order 2 n.
LEGENDRE_ERROR = np.array(
    [math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 3) for n in range(8)]
)

# The normal distribution function at steps of 1/64: cubic Hermite interpolation is good to 1e-9.
_PHI_END, _PHI_STEP = 8.5, 1.0 / 64
_PHI_AT = np.arange(-_PHI_END, _PHI_END + _PHI_STEP / 2, _PHI_STEP)
_PHI = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _PHI_AT])
_PHI_SLOPE = np.exp(-0.5 * _PHI_AT**2) / math.sqrt(2 * math.pi) * _PHI_STEP


@compiled
def normal_cdf(z: float) -> float:
    """P(Z <= z) of a standard normal Z."""
    if z >= _PHI_END - _PHI_STEP:
        return 1.0
    if z <= -_PHI_END:
        return 0.0
    at = (z + _PHI_END) / _PHI_STEP
    i = int(at)
    t = at - i
    u = 1.0 - t
    left = _PHI[i] * (1 + 2 * t) * u * u + _PHI_SLOPE[i] * t * u * u
    right = _PHI[i + 1] * t * t * (3 - 2 * t) - _PHI_SLOPE[i + 1] * t * t * u
    return float(left + right)


@compiled
def drawn_factor(law: int, base: float, sigma: float) -> float:
    """The factor 1 + kappa of a drawn number: uniform in (-1, 1), or standard normal."""
    if law == UNIFORM:
        return 1 + math.sqrt(3.0) * sigma * base
    if law == LOGNORMAL:
        s = math.sqrt(math.log1p(sigma * sigma))
        return math.exp(s * base - s * s / 2)
    return 1 + sigma * base


@compiled
def factor_cdf(law: int, f: float, sigma: float) -> float:
    """P(1 + kappa <= f)."""
    if law == UNIFORM:
        a = math.sqrt(3.0) * sigma
        return min(max((f - 1 + a) / (2 * a), 0.0), 1.0)
    if law == GAUSSIAN:
        return normal_cdf((f - 1) / sigma)
    if f <= 0:
        return 0.0
    s = math.sqrt(math.log1p(sigma * sigma))
    return normal_cdf(math.log(f) / s + s / 2)


# -- uniform noise ------------------------------------------------------------------------------
#
# y = top - x runs downwards from the highest point that a competitor reaches. Competitor t has
# P(X_t <= x) = A_t - g_t y for y > d_t, and 1 before; d ascends.


@compiled
def _cut(g: Array, d: Array, n: int, width: float) -> tuple[int, float]:
    """Where H is as good as zero: competitors and width up to there.

    log H <= -depth(y) = -sum_t g_t (y - d_t) over those with d_t < y.
    """
    depth, steep = 0.0, 0.0
    for t in range(n):
        if t > 0:
            depth += steep * (min(d[t], width) - d[t - 1])
        if depth >= DEEP or d[t] >= width:
            return t, min(d[t], width) - max(0.0, depth - DEEP) / steep
        steep += g[t]
    depth += steep * (width - d[n - 1])
    return n, width - max(0.0, depth - DEEP) / steep


@compiled
def _inside(A: Array, g: Array, d: Array, n: int, width: float, grid: Array) -> float:
    """Integral of H over 0 < y < width; d ascends."""
    n, width = _cut(g, d, n, width)
    total, used, depth, steep = 0.0, 0, 0.0, 0.0
    for j in range(1, n + 1):
        steep += g[j - 1]
        start = max(d[j - 1], 0.0)
        stop = width if j == n else min(width, max(d[j], 0.0))
        if stop <= start:
            continue
        parts = int(steep * (stop - start) / FALL) + 1
        span = (stop - start) / parts
        for part in range(parts):
            nodes = legendre_nodes(j, steep * span, depth)
            for k in range(nodes):
                if n <= _FEW:
                    y, h = start + span * (part + LEGENDRE_X[nodes, k]), 1.0
                    for t in range(j):
                        h *= A[t] - g[t] * y
                    total += span * LEGENDRE_W[nodes, k] * h
                    continue
                if used == _BLOCK:
                    total += _block(A, g, j, grid, used)
                    used = 0
                grid[_Y, used] = start + span * (part + LEGENDRE_X[nodes, k])
                grid[_WEIGHT, used] = span * LEGENDRE_W[nodes, k]
                used += 1
            depth += steep * span
    return total + _block(A, g, n, grid, used) if used else total


@compiled
def legendre_nodes(degree: int, fall: float, depth: float) -> int:
    """Legendre nodes for a stretch over which ``degree`` lines fall by ``fall`` together.

    H > 0 is a polynomial there, and its derivatives have |H^(k)| <= slope^k exp(-depth).
    """
    room = _WRONG * (1 + depth / 8) ** 8  # at most exp(depth)
    square, most = fall * fall, degree // 2 + 1
    if square * LEGENDRE_ERROR[1] <= room:
        return 1
    if most <= 2 or square * square * LEGENDRE_ERROR[2] <= room:
        return min(2, most)
    nodes, power = 3, square * square * square
    while nodes < most and nodes < len(LEGENDRE_ERROR) - 1 and power * LEGENDRE_ERROR[nodes] > room:
        nodes, power = nodes + 1, power * square
    return nodes


@compiled
def _block(A: Array, g: Array, n: int, grid: Array, used: int) -> float:
    """Weighted sum of H over the nodes in ``grid``, of which the last ones may be unused."""
    y, weight, h = grid[_Y], grid[_WEIGHT], grid[_H]
    lines = -(-used // _LANES)
    for i in range(used, lines * _LANES):
        y[i], weight[i] = y[used - 1], 0.0
    for i in range(lines * _LANES):
        h[i] = 1.0
    for t in range(n):
        a, b = A[t], g[t]
        for line in range(lines):
            for lane in range(_LANES):
                k = np.uintp(line * _LANES + lane)  # an index that may be negative is gathered
                h[k] *= min(1.0, a - b * y[k])
    total = 0.0
    for i in range(used):
        total += weight[i] * h[i]
    return total


@compiled
def uniform_plain(
    s_star: float, s: Array, inverse: Array, n: int, a: float, work: Array, grid: Array
) -> float:
    """P without a bias. Competitors descend; ``inverse`` is 1/s; half-width a <= 1.

    Only competitors with the sign of s_* can win, and they share the factor 1 + a or 1 - a at
    which they reach furthest up.
    """
    half = a * abs(s_star)
    low = s_star - half
    up = 1 + a if s_star > 0 else 1 - a
    if n == 0 or s_star == 0.0 or s[0] * up <= low or (s[0] > 0) != (s_star > 0):
        return 0.0
    top = s[0] * up
    A, g, d = work[0], work[1], work[2]
    slope = 0.5 / a if s_star > 0 else -0.5 / a
    # As in `_cut`, so that competitors beyond it are not even looked at.
    depth, steep, count = 0.0, 0.0, 0
    while count < n and s[count] * up > low and (s[count] > 0) == (s_star > 0):
        d[count] = top - s[count] * up
        if count > 0:
            depth += steep * (d[count] - d[count - 1])
            if depth > DEEP:
                break
        g[count] = slope * inverse[count]
        A[count] = 1 + g[count] * d[count]
        steep += g[count]
        count += 1
    inside = _inside(A, g, d, count, d[count] if depth > DEEP else top - low, grid)
    return max(0.0, float(top - low - inside) / (2 * half))


@compiled
def _sort_together(d: Array, A: Array, g: Array, n: int) -> None:
    """Ascending by d, in place: Shell's sort, as numpy's takes seconds to compile."""
    step = 1
    while step < n // 3:
        step = 3 * step + 1
    while step > 0:
        for i in range(step, n):
            key, a, b, j = d[i], A[i], g[i], i
            while j >= step and d[j - step] > key:
                d[j], A[j], g[j] = d[j - step], A[j - step], g[j - step]
                j -= step
            d[j], A[j], g[j] = key, a, b
        step //= 3


@compiled
def _uniform_shifted(
    s_star: float, s: Array, beta: Array, f_q: float, n: int, a: float, work: Array, grid: Array
) -> float:
    """P at one factor of the query, with biases: X_t uniform about s_t - beta_t / f_q."""
    half = a * abs(s_star)
    low, high = s_star - half, s_star + half
    A, g, d = work[0], work[1], work[2]
    begin, top, count = low, -math.inf, 0
    for t in range(n):
        middle, reach = s[t] - beta[t] / f_q, a * abs(s[t])
        if middle + reach <= low:
            continue
        begin = max(begin, middle - reach)
        top = max(top, middle + reach)
        if reach > 0:
            d[count], g[count] = middle + reach, 0.5 / reach
            count += 1
    if top == -math.inf:
        return 0.0
    if half == 0.0:  # X_* does not move: one product
        stays = 0.0 if begin > low else 1.0
        for t in range(count):
            stays *= min(1.0, max(0.0, 1 - g[t] * (d[t] - low)))
        return 1 - stays
    top = min(top, high)
    if begin >= top:
        return (min(begin, high) - low) / (2 * half)
    kept = 0
    for t in range(count):
        if d[t] > begin:
            d[kept], g[kept] = top - d[t], g[t]
            A[kept] = 1 + g[kept] * d[kept]
            kept += 1
    width = top - begin
    _sort_together(d, A, g, kept)
    inside = _inside(A, g, d, kept, width, grid) if kept else width
    return max(0.0, (top - low - inside) / (2 * half))


@compiled
def _turning_points(s_star: float, s: Array, beta: Array, n: int, a: float, edges: Array) -> int:
    """Fill ``edges`` with query factors between which P is smooth, ascending; returns how many.

    A grid, and where the nearest competitors become able, or certain, to win.
    """
    count = 0
    for share in _Q_PANELS:
        edges[count] = 1 - a + 2 * a * share
        count += 1
    for t in range(min(n, _Q_NEAREST)):
        for corner in range(4):
            theirs = s[t] * (1 - a if corner % 2 else 1 + a)
            gap = theirs - s_star * (1 - a if corner < 2 else 1 + a)
            if gap != 0.0 and 1 - a < beta[t] / gap < 1 + a:
                at, turn = count, beta[t] / gap
                while edges[at - 1] > turn:  # the first edge is below them all
                    edges[at] = edges[at - 1]
                    at -= 1
                edges[at] = turn
                count += 1
    return count


# -- every law ----------------------------------------------------------------------------------


@compiled
def normal_rule(step: float, z: float) -> float:
    """Weight of a node z of the trapezoidal rule for the normal law."""
    return step * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


@compiled
def _not_winning(law: int, threshold: float, s: float, sigma: float) -> float:
    """P(f s <= threshold)."""
    if s > 0:
        return factor_cdf(law, threshold / s, sigma)
    if s < 0:
        return 1 - factor_cdf(law, threshold / s, sigma)
    return 1.0 if threshold >= 0 else 0.0


@compiled
def _smooth(
    law: int, s_star: float, s: Array, beta: Array, biased: bool, f_q: float, n: int, sigma: float
) -> float:
    """P at one factor of the query, under a gaussian or lognormal law."""
    total = 0.0
    for i in range(int(2 * _Z_END / _Z_STEP) + 1):
        z = -_Z_END + i * _Z_STEP
        own = drawn_factor(law, z, sigma) * s_star
        stays = 1.0
        for t in range(n):
            shift = beta[t] / f_q if biased else 0.0
            stays *= _not_winning(law, own + shift, s[t], sigma)
            if stays < 1e-12:
                break
        total += normal_rule(_Z_STEP, z) * (1 - stays)
    return total


@compiled
def _query_alone(law: int, s_star: float, s: Array, beta: Array, n: int, sigma: float) -> float:
    """P under query noise alone: the row stays while f_q (s_t - s_*) <= beta_t for all t."""
    upper, lower = math.inf, -math.inf
    for t in range(n):
        gap = s[t] - s_star
        if gap > 0:
            upper = min(upper, beta[t] / gap)
        elif gap < 0:
            lower = max(lower, beta[t] / gap)
    above = 0.0 if upper == math.inf else 1 - factor_cdf(law, upper, sigma)
    below = 0.0 if lower == -math.inf else factor_cdf(law, lower, sigma)
    return min(1.0, above + below)


@compiled
def biased(
    law: int,
    s_star: float,
    s: Array,
    beta: Array,
    n: int,
    sigma: float,
    on_q: bool,
    on_k: bool,
    work: Array,
    grid: Array,
) -> float:
    """P with a bias, under any law; competitors nearest first."""
    if not on_k:
        return _query_alone(law, s_star, s, beta, n, sigma)
    a = math.sqrt(3.0) * sigma
    if not on_q:
        if law == UNIFORM:
            return _uniform_shifted(s_star, s, beta, 1.0, n, a, work, grid)
        return _smooth(law, s_star, s, beta, True, 1.0, n, sigma)
    total = 0.0
    if law != UNIFORM:
        for i in range(int(2 * _Z_END / _Z_STEP) + 1):
            z = -_Z_END + i * _Z_STEP
            f_q = drawn_factor(law, z, sigma)
            if f_q > 0:
                p = _smooth(law, s_star, s, beta, True, f_q, n, sigma)
                total += normal_rule(_Z_STEP, z) * p
        return total
    edges = np.empty(len(_Q_PANELS) + 4 * _Q_NEAREST)
    count = _turning_points(s_star, s, beta, n, a, edges)
    for i in range(count - 1):
        span = edges[i + 1] - edges[i]
        for k in range(_Q_NODES):
            f_q = edges[i] + span * LEGENDRE_X[_Q_NODES, k]
            p = _uniform_shifted(s_star, s, beta, f_q, n, a, work, grid)
            total += LEGENDRE_W[_Q_NODES, k] * span * p
    return total / (2 * a)


@compiled
def plain(
    law: int,
    s_star: float,
    s: Array,
    inverse: Array,
    n: int,
    sigma: float,
    work: Array,
    grid: Array,
) -> float:
    """P without a bias, noise on k, under any law; competitors descend."""
    if law == UNIFORM:
        return uniform_plain(s_star, s, inverse, n, math.sqrt(3.0) * sigma, work, grid)
    return _smooth(law, s_star, s, s, False, 1.0, n, sigma)
