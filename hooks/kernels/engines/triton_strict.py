"""Triton: the strict rate of rows without biases under uniform noise.

The equations, grids and constants of :mod:`hooks.kernels.engines.strict`. A program works on one
row at one sigma. Only tokens above the lowest level of the attended one move with W: they are its
nearest competitors, or the row is read again. What the others add fades from cell to cell, so that
it is summed once.
"""

from __future__ import annotations

import math

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from triton import language as tl

from hooks.kernels import LEGENDRE_W, LEGENDRE_X, Rule
from hooks.kernels.engines import strict as plain
from hooks.kernels.engines.slots import Slots, constant
from hooks.kernels.engines.triton_nearest import ROOM, Nearest

_TOKENS, _KEYS = 32, 128  # that a warp works on at once: of the nearest, and of all


@triton.jit
def _times(x, y):  # type: ignore[no-untyped-def]
    return x * y


@triton.jit
def _unit(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 1e-30), 1.0)


@triton.jit
def _faded(x):  # type: ignore[no-untyped-def]
    """exp(x), 0 where it has faded; no larger than what can be squared."""
    return tl.where(x > -40.0, tl.exp(tl.minimum(x, 300.0)), 0.0)


@triton.jit
def _level(s, f_q, wide):  # type: ignore[no-untyped-def]
    """Upper and lower end of a level, and its slope: P(l <= w) = (w - low) slope."""
    half = tl.maximum(wide * tl.abs(s), 1e-6)
    return f_q * s + half, f_q * s - half, 0.5 / half


@triton.jit
def _begins(  # type: ignore[no-untyped-def]
    s_ptr, top, n, listed, f_q, wide, bar, low, high, BLOCK: tl.constexpr
):  # fmt: skip
    """A level between low and high below which W is with hardly any probability."""
    lanes = tl.arange(0, BLOCK)
    for _ in range(5):
        w = 0.5 * (low + high)
        product = w * 0.0 + 1.0
        least = w * 0.0 + 1.0
        for t in range(0, n, BLOCK):
            s = _tokens(s_ptr, t + lanes, n, top, listed)
            upper, lower, slope = _level(s, f_q, wide)
            counts = (t + lanes < n) & (s > -3e4) & (upper > bar)
            f = tl.where(counts, _unit((w - lower) * slope), 1.0)
            product *= tl.reduce(f, 0, _times)
            least = tl.minimum(least, tl.min(f))
        lost = product < 1e-3 * least
        low = tl.where(lost, w, low)
        high = tl.where(lost, high, w)
    return low


@triton.jit
def _tokens(s_ptr, at, n, top, listed):  # type: ignore[no-untyped-def]
    """Tokens of a row; in a list of competitors the first one is the attended."""
    inside = (at < n) & (at >= listed)
    s = tl.load(s_ptr + at, mask=inside, other=float("-inf")).to(tl.float64)
    s = tl.where(at < listed, top, s)
    return tl.where(s > -3e4, s, -1e5)  # what is masked; of no use, but finite


@triton.jit
def _winner(  # type: ignore[no-untyped-def]
    space, slope, rest, variance, drift, needed, within, far, away, x_ptr, weight_ptr,
):  # fmt: skip
    """E P(l_j >= w + M - ln(room)): estimate, lower and upper bound."""
    log, per = tl.log(1 + rest), 1 / (1 + rest)
    relative = variance * per * per
    skewed = relative * (6 + relative) / (6 + 4 * relative)
    drift = drift * per
    bend = 0.5 * drift * drift / tl.maximum(rest, 1e-12)
    mean, least = log - 0.5 * skewed, tl.maximum(log - 0.5 * variance, 0.0)
    most = log + far
    estimate, low, high = space * 0.0, space * 0.0, space * 0.0
    for node in range(8):
        part = tl.load(weight_ptr + node)
        r = 1 + away * (2 * tl.load(x_ptr + node) - 1)
        inverse, of_r = 1 / r, tl.log(r)
        wanted = needed + (drift + bend * of_r) * of_r
        turn = tl.sqrt(skewed * inverse * inverse + within)
        y = space - (wanted + mean) * inverse
        more = tl.minimum(tl.maximum((y - turn) * slope, 0.0), 1.0)
        less = tl.minimum(tl.maximum((y + turn) * slope, 0.0), 1.0)
        estimate += part * 0.5 * (more + less)
        y = (space - (wanted + most) * inverse) * slope
        low += part * tl.minimum(tl.maximum(y, 0.0), 1.0)
        y = space - (wanted + least) * inverse
        higher = 0.5 * (tl.sqrt(variance * inverse * inverse + within + y * y) + y) * slope
        high += part * tl.minimum(higher, 1.0)
    return estimate, low, high


@triton.jit
def _moments(s, there, f_q, wide, first, bottom, middle, width, fade):  # type: ignore[no-untyped-def]
    """Of tokens in a cell: P(l <= end), weight, mean, variance, drift; upper end, slope, low."""
    upper, lower, slope = _level(s, f_q, wide)
    below = tl.where(there, _unit((bottom + width - lower) * slope), 1.0)
    begun = tl.where(there, _unit((bottom - lower) * slope), 1.0)
    inverse = slope / _unit((middle - lower) * slope)
    over = tl.minimum(upper - middle, 0.0)
    top = tl.where(over < 0, _faded(upper - first) * fade, 1.0)
    base = tl.minimum(_faded(lower - first) * fade, 1.0)
    mean = tl.where(there, tl.minimum((top - base) * inverse, 1.0), 0.0)
    variance = tl.maximum(0.5 * (top + base) * mean - mean * mean, 0.0)
    drift = ((over - 1) * top - (lower - middle - 1) * base) * inverse
    drift = tl.where(there, tl.minimum(tl.maximum(drift, -1.0), 0.0), 0.0)
    return below, (below - begun) / (below + begun), mean, variance, drift, upper, slope, lower


@triton.jit
def _below_all(  # type: ignore[no-untyped-def]
    w_ptr, n_key, f_q, wide, first, bar, start, least, KEYS: tl.constexpr
):  # fmt: skip
    """Sums over what never exceeds W, at the start of the grid; how many tokens count at all."""
    lanes = tl.arange(0, KEYS)
    means = tl.zeros([KEYS], tl.float64)
    variances = tl.zeros([KEYS], tl.float64)
    drifts = tl.zeros([KEYS], tl.float64)
    held = tl.zeros([KEYS], tl.int32)
    for t in range(0, n_key, KEYS):
        narrow = tl.load(w_ptr + t + lanes, mask=t + lanes < n_key, other=float("-inf"))
        seen = narrow > least
        if tl.max(seen.to(tl.int32)) > 0:
            s = tl.where(seen, narrow, -1e5).to(tl.float64)
            upper, lower, slope = _level(s, f_q, wide)
            there = seen & (upper > bar)
            held += there.to(tl.int32)
            there = there & (upper <= start)
            if tl.max(there.to(tl.int32)) > 0:
                over, under = _faded(upper - first), _faded(lower - first)
                mean = slope * (over - under)
                inner = 0.5 * slope * (over * over - under * under) - mean * mean
                drift = (upper - first - 1) * over - (lower - first - 1) * under
                means += tl.where(there, mean, 0.0)
                variances += tl.where(there, tl.maximum(inner, 0.0), 0.0)
                drifts += tl.where(there, slope * drift, 0.0)
    return tl.sum(means), tl.sum(variances), tl.sum(drifts), tl.sum(held)


@triton.jit
def _others(  # type: ignore[no-untyped-def]
    s_ptr, n, listed, top, f_q, wide, first, bar, start, bottom, width, fade, BLOCK: tl.constexpr
):  # fmt: skip
    """P(all <= a cell's end), and sums over tokens that move with W in it."""
    lanes = tl.arange(0, BLOCK)
    total, sums, variances, drifts = f_q * 0.0 + 1.0, f_q * 0.0, f_q * 0.0, f_q * 0.0
    weights, weighted, inner, squares, drifted = sums, sums, sums, sums, sums
    for t in range(0, n, BLOCK):
        s = _tokens(s_ptr, t + lanes, n, top, listed)
        upper, _, _ = _level(s, f_q, wide)
        there = (t + lanes < n) & (s > -3e4) & (upper > start) & (upper > bar)
        below, weight, mean, variance, drift, _, _, _ = _moments(
            s, there, f_q, wide, first, bottom, bottom + 0.5 * width, width, fade
        )
        total *= tl.reduce(below, 0, _times)
        sums += tl.sum(mean)
        variances += tl.sum(tl.where(there, variance, 0.0))
        drifts += tl.sum(drift)
        weights += tl.sum(weight)
        weighted += tl.sum(weight * mean)
        inner += tl.sum(weight * variance)
        squares += tl.sum(weight * mean * mean)
        drifted += tl.sum(weight * drift)
    return total, sums, variances, drifts, weights, weighted, inner, squares, drifted


@triton.jit
def _masses(  # type: ignore[no-untyped-def]
    total, before, third, below, lower, slope, bottom, width, cell, rises
):  # fmt: skip
    """W's mass in a cell, and in the one before, if a token wins."""
    earlier = before / _unit((bottom - lower) * slope)
    earliest = third / _unit((bottom - width - lower) * slope)
    mass = total / below - tl.where(cell > 0, earlier, 0.0)
    lately = tl.where(cell > 1, earlier - earliest, earlier)
    lately = tl.where(cell > 0, lately, tl.where(rises, 0.0, mass))
    return mass, tl.where(lately >= 0, lately, mass)


@triton.jit
def _without(  # type: ignore[no-untyped-def]
    weight, mean, variance, drift, sums, variances, drifts, weights, weighted, inner, squares,
    drifted,
):  # fmt: skip
    """The others' sum: mean, variance, drift. One of them is W: it adds 1 itself."""
    per = 1 / tl.maximum(weights - weight, 1e-30)
    largest = (weighted - weight * mean) * per
    spread = tl.maximum(variances - variance - (inner - weight * variance) * per, 0.0)
    spread += tl.maximum((squares - weight * mean * mean) * per - largest * largest, 0.0)
    slow = drifts - drift - (drifted - weight * drift) * per
    return tl.maximum(sums - mean - largest, 0.0), spread, tl.minimum(slow, 0.0)


@triton.jit
def _winners(  # type: ignore[no-untyped-def]
    s_ptr, n, listed, top, f_q, wide, first, bar, start, bottom, width, fade, cell, last_needed,
    total, before, third, sums, variance_sum, drift_sum, weights, weighted, inner, squares, drifted,
    needed, far, away, x_ptr, weight_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What tokens win over a cell: estimate, lower and upper bound."""
    lanes = tl.arange(0, BLOCK)
    middle, within = bottom + 0.5 * width, width * width / 12
    estimate, low, high = f_q * 0.0, f_q * 0.0, f_q * 0.0
    for t in range(0, n, BLOCK):
        at = t + lanes
        s = _tokens(s_ptr, at, n, top, listed)
        upper, lower, slope = _level(s, f_q, wide)
        wins = (at < n) & (s > -3e4) & (s < top) & (upper > bottom + last_needed)
        wins = wins & (upper > start) & (upper > bar)
        if tl.max(wins.to(tl.int32)) > 0:
            below, weight, mean, variance, drift, upper, slope, lower = _moments(
                s, wins, f_q, wide, first, bottom, middle, width, fade
            )
            mass, lately = _masses(
                total, before, third, below, lower, slope, bottom, width, cell, first > start
            )  # fmt: skip
            able = mass * (upper - middle - (last_needed - 0.5 * width)) * slope
            slight = wins & (able < 1e-7)
            high += tl.sum(tl.where(slight, tl.maximum(able, 0.0), 0.0))
            wins = wins & (able >= 1e-7)
            bent = (mass - lately) / tl.where(mass > 0, mass, 1.0)
            bent = tl.minimum(tl.maximum(bent, -1.0), 1.0)
            space = upper - middle - width * bent / 12
            rest, spread, slow = _without(
                weight, mean, variance, drift, sums, variance_sum, drift_sum, weights,
                weighted, inner, squares, drifted,
            )  # fmt: skip
            one, lower_one, upper_one = _winner(
                space, slope, rest, spread, slow, needed, within, far, away, x_ptr, weight_ptr,
            )  # fmt: skip
            estimate += tl.sum(tl.where(wins, one * mass, 0.0))
            low += tl.sum(tl.where(wins, lower_one * mass, 0.0))
            high += tl.sum(tl.where(wins, upper_one * mass, 0.0))
    return estimate, low, high


@triton.jit
def _crowd(w_ptr, n_key, most, bar, LEAST: tl.constexpr, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many tokens can matter at any sigma."""
    lanes = tl.arange(0, KEYS)
    count = tl.zeros([KEYS], tl.int32)
    for t in range(0, n_key, KEYS):
        s = tl.load(w_ptr + t + lanes, mask=t + lanes < n_key, other=float("-inf"))
        wide = tl.where(s > LEAST, s, -1e5).to(tl.float64)
        count += ((s > LEAST) & (wide + most * tl.abs(wide) > bar)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _at_factor(  # type: ignore[no-untyped-def]
    w_ptr, n_key, list_ptr, count, listed, top, second, least, crowd, sink, f_q, wide, away,
    needed, x_ptr, weight_ptr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The rate around one factor of the query: estimate, lower and upper bound."""
    nothing = f_q * 0.0
    n = tl.where(listed != 0, count + 1, n_key)
    s_ptr = tl.where(listed != 0, list_ptr, w_ptr)
    estimate, low, high = nothing, nothing, nothing
    last_needed = needed / (1 + away * (2 * tl.load(x_ptr + 7) - 1))
    _, own_low, _ = _level(top, f_q, wide)
    highest, its_low, _ = _level(second, f_q, wide)
    start, last = tl.maximum(own_low, its_low), highest - last_needed
    if last > start:
        first = start
        if (crowd > 24) & (sink == float("-inf")):  # the largest ones tell where W can't be
            few = tl.minimum(count + 1, 24)
            first = _begins(list_ptr, top, few, 1, f_q, wide, start - 12.0, start, last, BLOCK)
        bar = first - 12.0
        first = _begins(s_ptr, top, n, listed, f_q, wide, bar, first, last, BLOCK)
        width = (last - first) / 10
        means, variances, drifts, held = _below_all(
            w_ptr, n_key, f_q, wide, first, bar, start, least, KEYS
        )
        far = (crowd - held) * 6.14421235332821e-06  # exp(-12)
        total, before, third = nothing, nothing, nothing  # P(W <= .): this cell's end, and earlier
        for cell in range(10):
            bottom = first + cell * width
            middle, away_of = bottom + 0.5 * width, (cell + 0.5) * width
            fade = tl.exp(-away_of)
            third, before = before, total
            sums, variance_sum = means * fade, variances * fade * fade
            drift_sum = (drifts - away_of * means) * fade
            total, mean_of, inner_of, drift_of, weights, weighted, inner, squares, drifted = (
                _others(
                    s_ptr, n, listed, top, f_q, wide, first, bar, start, bottom, width, fade, BLOCK
                )
            )
            sums += mean_of + tl.exp(tl.minimum(sink - middle, 700.0))
            variance_sum += inner_of
            drift_sum += drift_of
            one, lower_one, upper_one = _winners(
                s_ptr, n, listed, top, f_q, wide, first, bar, start, bottom, width, fade, cell,
                last_needed, total, before, third, sums, variance_sum, drift_sum, weights,
                weighted, inner, squares, drifted, needed, far, away, x_ptr, weight_ptr, BLOCK,
            )  # fmt: skip
            estimate += one
            low += lower_one
            high += upper_one
    return estimate, low, high


@triton.jit
def _strict(  # type: ignore[no-untyped-def]
    w_ptr, s_ptr, end_ptr, item_ptr, taken_ptr, floats_ptr, count_ptr, loose_ptr, sigma_ptr, x_ptr,
    weight_ptr, six_x_ptr, six_weight_ptr, out_ptr, step, n_rows, n_items, n_sigmas, needed,
    LEAST: tl.constexpr, ON_Q: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    item = tl.load(item_ptr + place).to(tl.int64)
    if tl.load(taken_ptr + place) != 0:
        row = item // n_sigmas
        a = 1.7320508075688772 * tl.load(sigma_ptr + item % n_sigmas)
        most = 1.7320508075688772 * tl.load(sigma_ptr + n_sigmas - 1)
        top, second = tl.load(floats_ptr + row), tl.load(floats_ptr + n_rows + row)
        rest, sink = tl.load(floats_ptr + 2 * n_rows + row), tl.load(floats_ptr + 3 * n_rows + row)
        count = tl.load(count_ptr + row).to(tl.int32)
        w_ptr += row * step
        n_key = tl.load(end_ptr + row).to(tl.int32)
        widest = 1.0
        if ON_Q:
            widest = 1 + a
        estimate, least, highest = a * 0.0, a * 0.0, a * 0.0
        low = top - a * tl.abs(top)
        gap = second + a * tl.abs(second) - low
        if widest * gap > needed:
            lowest = top - most * tl.abs(top)
            bar = lowest - 12.0 * (second + most * tl.abs(second) - lowest) / needed
            crowd = _crowd(w_ptr, n_key, most, bar, LEAST, KEYS)
            # Whether all tokens above the attended one's lowest level are in the list.
            listed = ((rest == float("-inf")) | (rest + a * tl.abs(rest) <= low)).to(tl.int32)
            first, last = a * 0.0 + 1.0, a * 0.0 + 1.0
            parts = tl.full((), 1, tl.int32)
            if ON_Q:
                first, last = tl.maximum(needed / gap, 1 - a), 1 + a
                parts = tl.where(sink > float("-inf"), 6, tl.where(last > 8 * first, 2, 1))
            for k in range(parts):
                f_q, share, away = first, first * 0.0 + 1.0, first * 0.0
                if ON_Q:
                    width = (last - first) / parts
                    f_q = first + (k + 0.5) * width
                    share, away = width / (2 * a), 0.5 * width / f_q
                    if sink > float("-inf"):
                        f_q = first + (last - first) * tl.load(six_x_ptr + k)
                        share = tl.load(six_weight_ptr + k) * (last - first) / (2 * a)
                        away = first * 0.0
                one, lower, higher = _at_factor(
                    w_ptr, n_key, s_ptr + row * ROOM - 1, count, listed, top, second, LEAST, crowd,
                    sink, f_q, a * f_q, away, needed, x_ptr, weight_ptr, BLOCK, KEYS,
                )  # fmt: skip
                estimate += share * one
                least += share * lower
                highest += share * higher
        highest = tl.minimum(highest, tl.load(loose_ptr + item))
        least = tl.minimum(least, highest)
        estimate = tl.minimum(tl.maximum(tl.maximum(estimate, 0.0), least), highest)
        tl.store(out_ptr + item, estimate)
        tl.store(out_ptr + n_items + item, least)
        tl.store(out_ptr + 2 * n_items + item, highest)


def strict_rates(
    rule: Rule,
    scores: Float[Tensor, "row key"],
    rows: Nearest,
    loose: Float[Tensor, "row sigma"],
    sink: Float[Tensor, "row"],
    some: Bool[Tensor, "row"],
    slots: Slots,
) -> Float[Tensor, "which row sigma"]:
    """Estimate, lower and upper bound, as :func:`hooks.kernels.engines.strict.strict_rates`."""
    n_rows, n_sigmas = loose.shape
    some = some & (rows.seen >= 2)
    out = loose.new_zeros(3, n_rows, n_sigmas)
    out[2] = loose.where(some[:, None] & (loose < plain.SLIGHT), loose.new_zeros(()))
    wanted = (some[:, None] & (loose >= plain.SLIGHT)).flatten()
    item, taken = slots.pick("strict items", wanted)
    if not len(item):
        return out
    like = loose
    near = (r[8, :8] for r in (LEGENDRE_X, LEGENDRE_W))
    six = (r[6, :6] for r in (LEGENDRE_X, LEGENDRE_W))
    sigmas, *nodes = (constant(v, like.dtype, like.device) for v in (rule.sigmas, *near, *six))
    floats = like.new_empty(4, n_rows)
    for i, values in enumerate((rows.top, rows.second, rows.rest, sink)):
        floats[i] = values
    n_key = scores.shape[1]
    _strict[(len(item),)](
        scores, rows.s, rows.end, item, taken.to(torch.int8), floats, rows.held,
        loose.contiguous(), sigmas, *nodes, out, n_key, n_rows, n_rows * n_sigmas, n_sigmas,
        -math.log(rule.room), LEAST=-3e4, ON_Q=rule.on_q, ROOM=ROOM, BLOCK=_TOKENS, KEYS=_KEYS,
        num_warps=1,
    )  # fmt: skip
    return out
