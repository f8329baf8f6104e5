"""Compiled: the loop over a layer's rows.

:mod:`hooks.kernels.row` handles one row.
"""

from __future__ import annotations

import math

import numpy as np

from hooks.kernels.compile import compiled
from hooks.kernels.integrals import GRID, LOGNORMAL, UNIFORM, drawn_factor
from hooks.kernels.row import (
    ABLE,
    BROKEN,
    EXAMINED,
    SINGLE,
    TIE,
    TIES,
    UNDECIDED,
    at_least_two,
    bar_of_nearest,
    collect_plain,
    exact_biased,
    exact_plain,
    first_at_least,
    first_sigma,
    half_width,
    has_no_number,
    holds_sparse,
    is_sparse,
    largest,
    last_seen,
    lowest_able,
    moves,
    sort_descending,
    sparse_again,
    sparse_by_nearest,
    survey,
    tied,
    uncapped,
)
from hooks.kernels.strict import CROWD, strict_rates
from hooks.kernels.types import (
    BEYOND,
    MASKED,
    Drawn,
    Draws,
    Floats,
    Found,
    Layer,
    Pending,
    Place,
    Rule,
    Scratch,
    Sums,
    Table,
)
from hooks.kernels.uniform_plain import NODES


def scratch(n_key: int, n_sigmas: int) -> Scratch:
    """Working memory for rows of this many keys."""
    floats = [np.empty(n_key) for _ in range(6)]
    ints = [np.empty(n_key, np.int64) for _ in range(3)]
    return Scratch(
        visible=ints[0],
        s=floats[0],
        bias=floats[1],
        key=floats[2],
        near=floats[3],
        beta=floats[4],
        a=floats[5],
        place=ints[1],
        spare=np.empty((2, n_key)),
        at=ints[2],
        work=np.empty((3, n_key)),
        grid=np.empty(GRID),
        nodes=np.empty(NODES),
        ends=np.empty((2, n_sigmas)),
        crowd=np.empty((CROWD, n_key)),
        rates=np.empty(n_sigmas),
    )


@compiled
def scan(rule: Rule, layer: Layer, draws: Draws, found: Found, use: Scratch, first: int) -> int:
    """Add rows to ``found`` from row ``first`` on, until its table or ``pending`` may be full.

    Returns the row to continue with, ``matrices * queries`` at the end.
    """
    n_matrices, n_query, n_key = layer.scores.shape
    n_rows: int = n_matrices * n_query
    sums, table, pending = found.sums, found.table, found.pending
    for at in range(first, n_rows):
        if table.used[0] == len(table.s_star) or table.used[1] + n_key > len(table.s):
            return at
        if len(pending.row) and pending.used[0] == len(pending.row):
            return at
        m, q = at // n_query, at % n_query
        row = layer.scores[m, q]
        seen = at_least_two(row)
        if layer.pattern.size:  # one NaN score spoils all of a row's weights
            broken = has_no_number(layer.pattern[m, q, :1])
        else:
            broken = has_no_number(row)
        if broken and (seen > 0 or has_no_number(row)):
            sums.counts[BROKEN, m] += 1
            continue
        if layer.pattern.size:
            sparse, top = holds_sparse(layer.pattern[m, q], rule.sparse), 0.0
        else:
            top = largest(row)
            sparse = is_sparse(row, top, rule.room)
        if seen < 2:
            sums.counts[SINGLE, m] += seen
            continue
        sums.counts[EXAMINED, m] += 1
        if not sparse:
            continue
        # Under a causal mask, keys after the query's own need not be read again.
        row = row[: last_seen(row, n_key - n_query + q + 1)]
        if layer.qk.size or rule.soft_cap > 0:
            _unpacked_row(rule, layer, draws, found, use, m, q)
        else:
            top = largest(row) if layer.pattern.size else top
            _plain_row(rule, row, top, draws, found, use, m, q)
    return n_rows


@compiled
def _reach(rule: Rule) -> float:
    """The half-width within which a competitor can win at the largest sigma."""
    return math.sqrt(3.0) * rule.sigmas[-1] if rule.law == UNIFORM else 1.0


@compiled
def _place(rule: Rule, m: int, q: int, star: int) -> Place:
    first = rule.first[(m + rule.first_matrix) // rule.n_heads, star]
    return Place(m, q, star, int(first))


@compiled
def _plain_row(
    rule: Rule, row: Floats, top: float, draws: Draws, found: Found, use: Scratch, m: int, q: int
) -> None:
    """A row whose scores are its q.k parts: only competitors are copied, few where few decide."""
    sums = found.sums
    star, reach = first_at_least(row, top), _reach(rule)
    if (not rule.on_k or top == 0) and tied(row, star, rule.eps):
        sums.counts[TIES, m] += 1
        return
    n_visible, n_positive, mean = survey(row)
    n, rest = 0, -math.inf
    every = min(lowest_able(top, min(1.0, reach)), mean + lowest_able(top - mean, reach))
    if rule.on_k:
        listed = lowest_able(top, min(1.0, rule.cutoff))
        bar, tie = min(every, listed), top - TIE * rule.eps * abs(top)
        if rule.law == UNIFORM and rule.exact and top > 0 and not draws.k.shape[0]:
            near = bar_of_nearest(row, top, max(top, top - mean), bar)
            bar = max(bar, min(near, listed, tie))
        n, rest = _nearest(rule, row, use, star, bar), bar if bar > every else -math.inf
        if n and use.key[0] >= tie:
            sums.counts[TIES, m] += 1
            return
    at = _place(rule, m, q, star)
    sums.rows[m, at.kind] += 1
    sums.level[m, at.kind] += top
    if not rule.on_k:
        return
    if top != 0:  # those of its sign, itself among them
        sums.counts[ABLE + at.kind, m] += (n_positive if top > 0 else n_visible) - 1
    for t in range(n):
        use.beta[t] = 0.0
        use.a[t] = half_width(top, use.near[t], 0.0, rule.on_q, rule.on_k)
    _list(rule, use, n, top, at, found.table)
    for gauge in range(2):
        shift = mean if gauge else 0.0
        if gauge:
            for t in range(n):
                use.near[t] -= shift
        if rule.exact and not exact_plain(rule, use, n, top - shift, rest - shift, use.rates):
            n, rest = _nearest(rule, row, use, star, every), -math.inf
            for t in range(n):
                use.near[t] -= shift
            exact_plain(rule, use, n, top - shift, rest, use.rates)
        if rule.exact:
            _add_rates(use, found, at, gauge)
        if draws.k.shape[0] and (gauge == 0 or not rule.exact):
            _draw(rule, row, draws, sums, use, n, at, top - shift, gauge, 0)


@compiled
def _nearest(rule: Rule, row: Floats, use: Scratch, star: int, bar: float) -> int:
    """Collect the competitors above ``bar`` in ``use.near``, nearest first; how many."""
    n = collect_plain(row, star, bar, use.key, use.place)
    sort_descending(use.key, use.near, use.place, n, use.spare, use.at)
    for t in range(n):
        use.near[t] = use.key[t]
    return n


@compiled
def _no_rates(use: Scratch) -> None:
    for i in range(len(use.rates)):  # slices take seconds to compile
        use.rates[i] = 0.0


@compiled
def _add_rates(use: Scratch, found: Found, at: Place, gauge: int) -> None:
    """Add the row's rates; put it down for the strict ones, where its loose ones are added."""
    sums, pending = found.sums, found.pending
    some, r = 0.0, pending.used[0]
    out = sums.centred if gauge else sums.loose
    for i in range(len(use.rates)):
        out[i, at.matrix, at.kind] += use.rates[i]
        some = max(some, use.rates[i])
    if gauge == 0 and some > 0.0 and r < len(pending.row):
        pending.row[r, 0], pending.row[r, 1] = at.matrix, at.query
        pending.row[r, 2], pending.row[r, 3] = at.star, at.kind
        for i in range(len(use.rates)):
            pending.rates[r, i] = use.rates[i]
        pending.used[0] = r + 1


@compiled
def _list(rule: Rule, use: Scratch, n: int, s_star: float, at: Place, table: Table) -> None:
    """Put the row into the table, with its competitors below the cutoff, nearest first."""
    begin = table.used[1]
    end = begin
    for t in range(n):
        if np.float32(use.a[t]) < np.float32(rule.cutoff):  # as the table keeps it
            table.s[end], table.a[end] = use.near[t], use.a[t]
            if len(table.beta):
                table.beta[end] = use.beta[t]
            end += 1
    if end == begin:
        return
    r = table.used[0]
    table.row[r, 0], table.row[r, 1] = at.matrix + rule.first_matrix, at.query + rule.first_query
    table.row[r, 2], table.row[r, 3] = at.star, use.place[0]
    table.row[r, 4] = end - begin
    table.s_star[r] = s_star
    table.used[0], table.used[1] = r + 1, end


@compiled
def _unpack(rule: Rule, layer: Layer, use: Scratch, m: int, q: int) -> tuple[int, int]:
    """Separate q.k parts and biases; how many keys are visible, and which of them is attended."""
    row = layer.scores[m, q]
    n, star, top = 0, -1, -math.inf
    for k in range(len(row)):
        w: float = np.float64(row[k])
        if w <= MASKED:
            continue
        if rule.soft_cap > 0:
            w = uncapped(w, rule.soft_cap, rule.eps)
        use.s[n] = layer.qk[m, q, k] if layer.qk.size else w
        use.bias[n] = w - use.s[n]
        use.visible[n] = k
        if w > top:
            top, star = w, n
        n += 1
    return n, star


@compiled
def _unpacked_row(
    rule: Rule, layer: Layer, draws: Draws, found: Found, use: Scratch, m: int, q: int
) -> None:
    """A row with a bias or under a soft cap."""
    sums = found.sums
    n, star = _unpack(rule, layer, use, m, q)
    top = use.s[star] + use.bias[star]
    bar, close, mean = top - TIE * rule.eps * abs(top), 0, 0.0
    for i in range(n):
        close += use.s[i] + use.bias[i] >= bar
        mean += use.s[i] / n
    if close > 1:
        sums.counts[TIES, m] += 1
        return
    at = _place(rule, m, q, int(use.visible[star]))
    sums.rows[m, at.kind] += 1
    sums.level[m, at.kind] += use.s[star]
    if not (rule.on_q or rule.on_k):
        return
    biased, reach = layer.qk.size > 0, _reach(rule)
    for gauge in range(2):
        shift = mean if gauge else 0.0
        s_star = use.s[star] - shift
        wanted = reach if gauge else max(reach, rule.cutoff)
        count, able = _competitors(rule, use, n, star, shift, biased, wanted)
        if not gauge:
            sums.counts[ABLE + at.kind, m] += able
            _list(rule, use, count, s_star, at, found.table)
        _no_rates(use)
        if rule.exact and biased:
            exact_biased(rule, use, count, s_star, use.rates)
        elif rule.exact:
            exact_plain(rule, use, count, s_star, -math.inf, use.rates)
        if rule.exact:
            _add_rates(use, found, at, gauge)
        if draws.k.shape[0] and (gauge == 0 or not rule.exact):
            _draw(rule, layer.scores[m, q], draws, sums, use, count, at, s_star, gauge, n)


@compiled
def _competitors(
    rule: Rule, use: Scratch, n: int, star: int, shift: float, biased: bool, wanted: float
) -> tuple[int, int]:
    """Competitors within half-width ``wanted``, nearest first; and how many can win at all."""
    count, able = 0, 0
    # A half-width never exceeds 1, but the factors of an unbounded law may exceed 2.
    everyone = biased and rule.law != UNIFORM
    s_star = use.s[star] - shift
    for i in range(n):
        if i == star:
            continue
        s, beta = use.s[i] - shift, use.bias[star] - use.bias[i] if biased else 0.0
        a = half_width(s_star, s, beta, rule.on_q, rule.on_k)
        able += everyone or a < math.inf
        if everyone or a < min(1.0, wanted):
            use.key[count] = -min(a, BEYOND)
            use.near[count], use.place[count] = beta, i
            count += 1
    sort_descending(use.key, use.near, use.place, count, use.spare, use.at)
    for t in range(count):
        i = use.place[t]
        use.beta[t], use.near[t], use.place[t] = use.near[t], use.s[i] - shift, use.visible[i]
        use.a[t] = -use.key[t]
    return count, able


# -- draws --------------------------------------------------------------------------------------


@compiled
def _draw(
    rule: Rule,
    row: Floats,
    draws: Draws,
    sums: Sums,
    use: Scratch,
    count: int,
    at: Place,
    s_star: float,
    gauge: int,
    n_visible: int,
) -> None:
    """Draw the row's noise: the loose rate where it is sampled, the strict rate always.

    ``n_visible`` is 0 for a row that was not unpacked.
    """
    if count == 0:
        return
    m, matrix, unpacked = at.matrix, at.matrix + rule.first_matrix, n_visible > 0
    head, batch = matrix % rule.n_heads, matrix // rule.n_heads
    simple = rule.law != LOGNORMAL and not unpacked and rule.on_k
    near = simple and rule.law == UNIFORM and s_star > 0 and rule.sink[head] == -math.inf
    for d in range(draws.k.shape[0]):
        base = draws.k[d, batch, rule.kv_head[head]]
        at_q, own = draws.q[d, batch, head, at.query], base[at.star]
        first = 0.0
        if simple:
            first = first_sigma(rule.law, s_star, use.near, use.place, count, own, base)
        for i in range(len(rule.sigmas)):
            sigma = rule.sigmas[i]
            if sigma <= first and (simple or sigma == 0.0):
                continue
            f_q = drawn_factor(rule.law, at_q, sigma) if rule.on_q else 1.0
            drawn = Drawn(sigma, f_q, own, base)
            if (not simple or f_q <= 0) and not moves(rule, use, count, s_star, drawn):
                continue
            if not rule.exact:
                out = sums.centred_draws if gauge else sums.loose_draws
                out[i, d, m, at.kind] += 1
            if gauge:
                continue
            if near:
                verdict = sparse_by_nearest(rule, use, count, s_star, drawn)
                if verdict != UNDECIDED:
                    sums.strict_draws[i, d, m, at.kind] += verdict
                    continue
            if n_visible == 0:
                n_visible = _visible(row, use)
            if sparse_again(rule, use, n_visible, drawn, rule.sink[head]):
                sums.strict_draws[i, d, m, at.kind] += 1


@compiled
def _visible(row: Floats, use: Scratch) -> int:
    """Copy the visible keys of a row whose scores are its q.k parts."""
    n = 0
    for k in range(len(row)):
        if row[k] > MASKED:
            use.s[n], use.bias[n], use.visible[n] = row[k], 0.0, k
            n += 1
    return n


# -- the strict rate ------------------------------------------------------------------------------


def no_pending(n_rows: int, n_sigmas: int) -> Pending:
    """Room for rows whose strict rate is still to be computed."""
    return Pending(
        row=np.empty((n_rows, 4), np.int64),
        rates=np.empty((n_rows, n_sigmas)),
        used=np.zeros(1, np.int64),
    )


@compiled
def add_strict(rule: Rule, layer: Layer, found: Found, use: Scratch) -> None:
    """Add the strict rates of the rows put down in ``found.pending``; then there are none.

    A function of its own, as what :func:`scan` calls is compiled into it again.
    """
    sums, pending = found.sums, found.pending
    for r in range(pending.used[0]):
        m, q = pending.row[r, 0], pending.row[r, 1]
        star, kind = pending.row[r, 2], pending.row[r, 3]
        if layer.qk.size or rule.soft_cap > 0:
            n, own = _unpack(rule, layer, use, m, q)
        else:
            n, own = _visible(layer.scores[m, q], use), 0
            while use.visible[own] != star:
                own += 1
        for i in range(len(use.rates)):
            use.rates[i] = pending.rates[r, i]
        out = sums.strict[:, m, kind], sums.strict_low[:, m, kind], sums.strict_high[:, m, kind]
        strict_rates(rule, use, n, own, rule.sink[(m + rule.first_matrix) % rule.n_heads], out)
    pending.used[0] = 0
