"""Compiled: one pass over a layer's rows of scores, from which all sums of a probe come.

Each row is read once: is it sparse, which competitors could take its arg max at the largest sigma,
with which probability at each. Only sums are kept and, for the table, the competitors that are near
enough.
"""

from __future__ import annotations

import math

import numpy as np

from hooks.kernels.compile import compiled, compiled_without_nan
from hooks.kernels.integrals import GRID, LOGNORMAL, UNIFORM, biased, drawn_factor, plain
from hooks.kernels.types import MASKED, Array, Drawn, Floats, Ints, Rule, Scratch

TIE = 2.0  # scores closer than this many eps of their size differ by rounding alone
_BUCKETS = 64

# Rows of the counts: examined; one visible key; two keys that share the maximum; competitors able
# to win at all, of rows that attend to content and of those that attend to the first token; rows
# in which something is not finite.
EXAMINED, SINGLE, TIES, ABLE, BROKEN = 0, 1, 2, 3, 5
N_COUNTS = 6


@compiled_without_nan
def largest(row: Floats) -> float:
    """max_t row_t."""
    top = row[0]
    for x in row:
        top = max(top, x)
    return np.float64(top)  # compiled, float() of a float32 is one: callers would be, twice


@compiled
def first_of_largest(row: Floats) -> int:
    """argmax_t row_t; 0 where nothing is a number."""
    best = 0
    for k in range(len(row)):
        if row[k] > row[best]:
            best = k
    return best


@compiled
def has_no_number(row: Floats) -> bool:
    """Whether a score is NaN or +inf."""
    wrong = 0
    for x in row:
        wrong += not x < math.inf
    return wrong > 0


@compiled
def at_least_two(row: Floats) -> int:
    """How many keys are visible, counted up to two."""
    count = 0
    for x in row:
        if x > MASKED:
            count += 1
            if count == 2:
                return 2
    return count


@compiled
def holds_sparse(weights: Floats, sparse: float) -> bool:
    """Whether one of a row's attention weights is at least ``sparse``.

    The weights sum to at most one: where smaller ones already exceed 1 - ``sparse``, none can be.
    """
    room = 1.01 - sparse  # 0.01 more than it leaves, for rounding
    for x in weights:
        if x >= sparse:
            return True
        room -= x
        if room < 0:
            return False
    return False


@compiled
def is_sparse(row: Floats, top: float, room: float) -> bool:
    """Whether all others together have at most ``room`` times the maximum's weight."""
    left = room
    for x in row:
        if top - 40 < x and x > MASKED:
            left -= math.exp(x - top)
            if left < -1:  # the maximum itself counts one
                return False
    return True


@compiled
def half_width(s_star: float, s: float, beta: float, on_q: bool, on_k: bool) -> float:
    """Smallest a such that factors in [1 - a, 1 + a] move the row; inf above 1.

    See :func:`hooks.critical_half_width`, whose cases these are.
    """
    gap, reach = s - s_star, abs(s) + abs(s_star)
    a = math.inf
    if on_q and not on_k:
        if (beta > 0 and gap > 0) or (beta < 0 and gap < 0):
            a = abs(beta / gap - 1)
    elif reach > 0:
        if not on_q or beta == 0:
            a = (beta - gap) / reach
        elif beta > 0:
            rising = reach + gap
            a = (math.sqrt(max(0.0, rising**2 + 4 * reach * (beta - gap))) - rising) / (2 * reach)
        else:
            falling = reach - gap
            root = math.sqrt(max(0.0, falling**2 - 4 * reach * (beta - gap)))
            a = 2 * (beta - gap) / (falling + root)
    return a if a < 1 else math.inf


@compiled
def sort_descending(key: Array, value: Array, index: Ints, n: int, spare: Array, at: Ints) -> None:
    """Sort by key, in place, with value and index; buckets first, as rows can be long."""
    if n > 24:
        low, high = key[0], key[0]
        for i in range(n):
            low, high = min(low, key[i]), max(high, key[i])
        if high > low and math.isfinite(high - low):
            _into_buckets(key, value, index, n, low, high, spare, at)
    for i in range(1, n):
        k, v, x, j = key[i], value[i], index[i], i - 1
        while j >= 0 and key[j] < k:
            key[j + 1], value[j + 1], index[j + 1] = key[j], value[j], index[j]
            j -= 1
        key[j + 1], value[j + 1], index[j + 1] = k, v, x


@compiled
def _into_buckets(
    key: Array, value: Array, index: Ints, n: int, low: float, high: float, spare: Array, at: Ints
) -> None:
    """A first order by a counting sort, so that the insertion sort moves little."""
    n_buckets = max(_BUCKETS, n)
    per = (n_buckets - 1) / (high - low)
    start = np.zeros(n_buckets + 1, np.int64)
    for i in range(n):
        start[int((high - key[i]) * per) + 1] += 1
    for b in range(n_buckets):
        start[b + 1] += start[b]
    for i in range(n):
        b = int((high - key[i]) * per)
        spare[0, start[b]], spare[1, start[b]], at[start[b]] = key[i], value[i], index[i]
        start[b] += 1
    for i in range(n):
        key[i], value[i], index[i] = spare[0, i], spare[1, i], at[i]


# -- one row ------------------------------------------------------------------------------------


@compiled_without_nan
def visible_sum(row: Floats) -> float:
    """Sum of the visible scores."""
    total = 0.0
    for x in row:
        total += x if x > MASKED else 0.0
    return total


@compiled
def count_above(row: Floats, bar: float) -> int:
    """How many scores lie above ``bar``."""
    count = 0
    for x in row:
        count += x > bar
    return count


@compiled
def last_seen(row: Floats, guess: int) -> int:
    """One past the last visible key, or the row's length; ``guess`` is returned if it is right."""
    if 0 < guess < len(row) and largest(row[guess:]) <= MASKED:
        return guess
    return len(row)


@compiled
def tied(row: Floats, star: int, eps: float) -> bool:
    """Whether another key's score equals the attended one's up to the dtype's rounding."""
    bar = row[star] - TIE * eps * abs(row[star])
    close = 0
    for x in row:
        close += x >= bar
    return close > 1


@compiled
def lowest_able(s_star: float, a: float) -> float:
    """Without a bias competitors with s_t above this are within half-width a <= 1."""
    if s_star > 0:
        return s_star * (1 - a) / (1 + a)
    return s_star * (1 + a) / (1 - a) if a < 1 else -math.inf


@compiled
def collect_plain(row: Floats, star: int, bar: float, key: Array, index: Ints) -> int:
    """Competitors above ``bar``, unsorted."""
    n, bar = 0, max(bar, MASKED)
    for k in range(len(row)):
        key[n], index[n] = row[k], k  # without a branch: the next one takes its place
        n += (row[k] > bar) & (k != star)
    return n


@compiled
def exact_plain(rule: Rule, use: Scratch, n: int, s_star: float, sums: Array) -> None:
    """Add the row's probability at each sigma; its competitors descend in ``use.near``."""
    s, inverse = use.near, use.key
    if n == 0 or s_star == 0.0 or (s[0] > 0) != (s_star > 0):
        return
    for t in range(n):
        inverse[t] = 1 / s[t] if s[t] != 0 else 0.0
    nearest = (s_star - s[0]) / (abs(s_star) + abs(s[0]))
    for i in range(len(rule.sigmas)):
        sigma, count = rule.sigmas[i], n
        if sigma == 0.0 or (rule.law == UNIFORM and nearest >= math.sqrt(3.0) * sigma):
            continue
        if rule.law != UNIFORM:
            count = 0  # beyond it a competitor wins with less than 1e-13
            while count < n and within_tails(rule.law, s_star, s[count], sigma):
                count += 1
        sums[i] += plain(rule.law, s_star, s, inverse, count, sigma, use.work, use.grid)


@compiled
def within_tails(law: int, s_star: float, s: float, sigma: float) -> bool:
    """Whether this competitor wins more often than once in 1e13, under an unbounded law."""
    if law == LOGNORMAL:
        spread = math.sqrt(2 * math.log1p(sigma * sigma))
        ratio = s / s_star if s_star > 0 else s_star / s
        return ratio > 0 and -math.log(ratio) < 7.5 * spread
    return s_star - s < 7.5 * sigma * math.hypot(s_star, s)


@compiled
def exact_biased(rule: Rule, use: Scratch, n: int, s_star: float, sums: Array) -> None:
    """Add the row's probability where biases are added; competitors nearest first."""
    law, on_q, on_k, s, beta = rule.law, rule.on_q, rule.on_k, use.near, use.beta
    for i in range(len(rule.sigmas)):
        sigma, count = rule.sigmas[i], n
        if law == UNIFORM:
            count = 0
            while count < n and use.a[count] < math.sqrt(3.0) * sigma:
                count += 1
        if count and sigma > 0:
            sums[i] += biased(law, s_star, s, beta, count, sigma, on_q, on_k, use.work, use.grid)


# -- scores and factors ---------------------------------------------------------------------------


@compiled
def uncapped(w: float, soft_cap: float, eps: float) -> float:
    """A score before its soft cap; what the dtype can't tell from the cap ties just below it."""
    edge = 1 - eps
    return soft_cap * math.atanh(min(edge, max(-edge, w / soft_cap)))


# -- draws --------------------------------------------------------------------------------------


@compiled
def first_sigma(
    law: int, s_star: float, s: Array, index: Ints, n: int, own: float, base: Array
) -> float:
    """The sigma from which this draw moves the row, without a bias, for factors linear in sigma."""
    scale = math.sqrt(3.0) if law == UNIFORM else 1.0
    first = math.inf
    for t in range(n):
        pull = scale * (base[index[t]] * s[t] - own * s_star)
        if pull > 0:
            first = min(first, (s_star - s[t]) / pull)
    return first


@compiled
def moves(rule: Rule, use: Scratch, n: int, s_star: float, drawn: Drawn) -> bool:
    """Whether this draw moves the row's arg max."""
    law, sigma, f_q = rule.law, drawn.sigma, drawn.f_q
    f_star = drawn_factor(law, drawn.own, sigma) if rule.on_k else 1.0
    for t in range(n):
        f = drawn_factor(law, drawn.base[use.place[t]], sigma) if rule.on_k else 1.0
        if f_q * (f * use.near[t] - f_star * s_star) > use.beta[t]:
            return True
    return False


@compiled
def sparse_again(rule: Rule, use: Scratch, n: int, drawn: Drawn, sink: float) -> bool:
    """Whether the noised row is sparse again (:func:`is_sparse`), from its n visible keys."""
    law, sigma, w, room = rule.law, drawn.sigma, use.key, rule.room
    top, second = -math.inf, sink
    for i in range(n):
        f = drawn_factor(law, drawn.base[use.visible[i]], sigma) if rule.on_k else 1.0
        x = drawn.f_q * f * use.s[i] + use.bias[i]
        if rule.soft_cap > 0:
            x = rule.soft_cap * math.tanh(x / rule.soft_cap)
        w[i] = x
        if x > top:
            top, second = x, max(top, second)
        elif x > second:
            second = x
    if math.exp(second - top) > room:
        return False
    room -= math.exp(sink - top) - 1  # the maximum itself is among the w
    for i in range(n):
        if w[i] > top - 40:
            room -= math.exp(w[i] - top)
            if room < 0:
                return False
    return True


UNDECIDED, NOT_SPARSE, SPARSE = -1, 0, 1


@compiled
def sparse_by_nearest(rule: Rule, use: Scratch, n: int, s_star: float, drawn: Drawn) -> int:
    """:func:`sparse_again` from the competitors alone, where all other keys are out of reach.

    Without a bias, under uniform noise; competitors descend, and no other key lies above them. A
    key more than exp(45) below the maximum, at its largest factor, adds nothing to the sum.
    """
    s, place, room = use.near, use.place, rule.room
    f_q, own, base, a = drawn.f_q, drawn.own, drawn.base, math.sqrt(3.0) * drawn.sigma
    top, second = (1 + a * own) * s_star, -math.inf
    count, reached = 0, True
    while count < n:
        reached = f_q * (top - max(0.0, (1 + a) * s[count])) < 45
        if not reached:
            break
        x = (1 + a * base[place[count]]) * s[count]
        if x > top:
            top, second = x, top
        elif x > second:
            second = x
        count += 1
    if n == 0 or (reached and f_q * (top - max(0.0, (1 + a) * s[n - 1])) < 45):
        return UNDECIDED
    if math.exp(f_q * (second - top)) > room:
        return NOT_SPARSE
    room -= math.exp(f_q * ((1 + a * own) * s_star - top)) - 1  # the maximum itself is in the sum
    for t in range(count):
        room -= math.exp(f_q * ((1 + a * base[place[t]]) * s[t] - top))
        if room < 0:
            return NOT_SPARSE
    return SPARSE


@compiled
def table_rates(
    law: int,
    s_star: Floats,
    start: Ints,
    s: Floats,
    beta: Floats,
    rows: Ints,
    sigma: Array,
    on_q: bool,
    on_k: bool,
    out: Array,
) -> None:
    """P of some rows of a table, each at its own sigma."""
    most = 1
    for r in rows:
        most = max(most, start[r + 1] - start[r])
    near, shift, inverse = np.empty(most), np.zeros(most), np.empty(most)
    work, grid = np.empty((3, most)), np.empty(GRID)
    for i in range(len(rows)):
        begin, end = start[rows[i]], start[rows[i] + 1]
        n, own = end - begin, np.float64(s_star[rows[i]])
        for t in range(n):
            near[t] = s[begin + t]
            inverse[t] = 1 / near[t] if near[t] != 0 else 0.0
            if len(beta):
                shift[t] = beta[begin + t]
        if sigma[i] == 0.0:
            out[i] = 0.0
        elif len(beta):
            out[i] = biased(law, own, near, shift, n, sigma[i], on_q, on_k, work, grid)
        else:
            out[i] = plain(law, own, near, inverse, n, sigma[i], work, grid) if on_k else 0.0
