"""Compiled: one pass over a layer's rows of scores, from which all sums of a probe come.

Each row is read once: is it sparse, which competitors could take its arg max at the largest sigma,
with which probability at each. Only sums are kept and, for the table, the competitors that are near
enough.
"""

from __future__ import annotations

import math

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import GRID, LOGNORMAL, UNIFORM, biased, drawn_factor, plain
from hooks.kernels.types import MASKED, Array, Drawn, Floats, Ints, Rule, Scratch
from hooks.kernels.uniform_plain import uniform_rates

TIE = 2.0  # scores closer than this many eps of their size differ by rounding alone
_BUCKETS = 64
_LINE = 64  # scores that are looked at together
_FEW, _HALVINGS, _DECIDED = 128, 6, 28.0  # competitors that need no choice; its steps; its depth
_MANY = 40  # competitors whose rates are computed together
_LEAST_INT, _SIGN, _NO_SIGN = np.int32(-(2**31)), np.int32(31), np.int32(2**31 - 1)

# Rows of the counts: examined; one visible key; two keys that share the maximum; competitors able
# to win at all, of rows that attend to content and of those that attend to the first token; rows
# in which something is not finite.
EXAMINED, SINGLE, TIES, ABLE, BROKEN = 0, 1, 2, 3, 5
N_COUNTS = 6


# Loops count: iterating over an array compiles to gathers, ten times slower than by index.


@compiled
def largest(row: Floats) -> float:
    """max_t row_t, of numbers.

    Numba's maxima of floats are not vectorised, those of integers are: the bits of a float32, those
    below the sign flipped where it is set, are in its order.
    """
    if row.itemsize == 8:
        top = row[0]
        for k in range(row.shape[0]):
            top = max(top, row[k])
        return np.float64(top)
    bits, best = row.view(np.int32), _LEAST_INT
    for k in range(bits.shape[0]):
        best = max(best, bits[k] ^ ((bits[k] >> _SIGN) & _NO_SIGN))
    best = np.int32(best ^ ((best >> _SIGN) & _NO_SIGN))
    return np.float64(best.view(np.float32))


@compiled
def first_at_least(row: Floats, bar: float) -> int:
    """Index of the first score from ``bar`` on; 0 where there is none."""
    start = 0
    for block in range(row.shape[0] // _LINE):
        start, count = block * _LINE, 0
        for k in range(_LINE):
            count += row[start + k] >= bar
        if count > 0:
            break
    for k in range(start, row.shape[0]):
        if row[k] >= bar:
            return k
    return 0


@compiled
def has_no_number(row: Floats) -> bool:
    """Whether a score is NaN or +inf."""
    wrong = 0
    for k in range(row.shape[0]):
        wrong += not row[k] < math.inf
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
    if count_above(row, top + math.log(room)) > 1:
        return False  # already one of them has more
    total = 0.0
    for k in range(row.shape[0]):
        x = max(row[k] - top, -40.0) / 256  # what lies lower adds less than 1e-17
        e = 1 + x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
        for _ in range(8):  # exp, to 1e-7, without a call: only then vectorised
            e *= e
        total += e
    return total <= 1 + room


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


@compiled
def survey(row: Floats) -> tuple[int, int, float]:
    """How many scores are visible, how many positive; the mean of the visible ones."""
    visible, positive, total = 0, 0, 0.0
    for k in range(row.shape[0]):
        visible += row[k] > MASKED
        positive += row[k] > 0
        total += row[k] if row[k] > MASKED else 0.0
    return visible, positive, total / visible


@compiled
def count_above(row: Floats, bar: float) -> int:
    """How many scores lie above ``bar``."""
    count = 0
    for k in range(row.shape[0]):
        count += row[k] > bar
    return count


@compiled
def bar_of_nearest(row: Floats, top: float, scale: float, low: float) -> float:
    """A bar from ``low`` on, above which lie, mostly, the competitors that decide P.

    Nearest first, they make the row's arg max certain to move before the others come in: a depth of
    ``_DECIDED`` (see :mod:`hooks.kernels.integrals`), here from their number and range at the
    largest half-width. ``scale``: the attended score, the larger one of both gauges'.
    """
    if count_above(row, low) <= _FEW:
        return low
    above, below = top, low
    for _ in range(_HALVINGS):
        bar = 0.5 * (above + below)
        if count_above(row, bar) * (top - bar) > 2 * _DECIDED * scale:
            below = bar
        else:
            above = bar
    return below


@compiled
def last_seen(row: Floats, guess: int) -> int:
    """One past the last visible key, or the row's length; ``guess`` is returned if it is right."""
    if 0 < guess < len(row) and largest(row[guess:]) <= MASKED:
        return guess
    return len(row)


@compiled
def tied(row: Floats, star: int, eps: float) -> bool:
    """Whether another key's score equals the attended one's up to the dtype's rounding."""
    close = 0
    bar = row[star] - TIE * eps * abs(row[star])
    for k in range(row.shape[0]):
        close += row[k] >= bar
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
    for k in range(row.shape[0]):
        index[n] = k  # without a branch: the next one takes its place
        n += (row[k] > bar) & (k != star)
    for t in range(n):
        key[t] = row[index[t]]
    return n


@compiled
def exact_plain(rule: Rule, use: Scratch, n: int, s_star: float, rest: float, out: Array) -> bool:
    """Set ``out`` to the row's probability at each sigma; its competitors descend in ``use.near``.

    ``rest``: the highest score that a competitor can have which is not among them, -inf if all are.
    False where such a one would count.
    """
    s, inverse = use.near, use.key
    for i in range(len(out)):  # slices take seconds to compile
        out[i] = 0.0
    if n == 0 or s_star == 0.0 or (s[0] > 0) != (s_star > 0):
        return rest == -math.inf
    for t in range(n):
        inverse[t] = 1 / s[t] if s[t] != 0 else 0.0
    if rule.law == UNIFORM and (n > _MANY or rest > -math.inf):
        return uniform_rates(
            s_star, s, inverse, n, rest, rule.sigmas, use.nodes, use.ends, use.work, use.grid, out
        )
    nearest = (s_star - s[0]) / (abs(s_star) + abs(s[0]))
    for i in range(len(rule.sigmas)):
        sigma, count = rule.sigmas[i], n
        if sigma == 0.0 or (rule.law == UNIFORM and nearest >= math.sqrt(3.0) * sigma):
            continue
        if rule.law != UNIFORM:
            count = 0  # beyond it a competitor wins with less than 1e-13
            while count < n and within_tails(rule.law, s_star, s[count], sigma):
                count += 1
        out[i] = plain(rule.law, s_star, s, inverse, count, sigma, use.work, use.grid)
    return True


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
