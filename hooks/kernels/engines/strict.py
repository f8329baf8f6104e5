"""The strict rate under uniform noise, many rows at a time.

The equations, grids and constants of :mod:`hooks.kernels.strict_uniform`: the level of each token
is uniform between two ends, and on ten cells of W the moments of the others' sum follow from two
exponentials a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.kernels import LEGENDRE_W, LEGENDRE_X, UNIFORM, Rule
from hooks.kernels.engines.apart import Rows
from hooks.kernels.engines.slots import Slots, constant

_CELLS = 10  # of the grid of W
_NODES = 6  # of the query's factor, where there are biases
_NEAR = 8  # of a factor around one of the query's
_WIDE = 8.0  # ratio of the query's factors above which two parts of them are taken
_LEAST = 1e-6  # half-width of a level
_LOST = 1e-3  # probability that W is below the grid: the first cell takes it
_HALVINGS = 5
_MANY = 24  # tokens beyond which a part of them is looked at first
_FAR = 12.0  # tokens that stay further below W add less than exp(-12)
_FADED, _MOST = -40.0, 300.0  # where an exponential is 0; where its square is finite
_NOTHING = 1e-7  # probability of a win in a cell that is only bounded
SLIGHT = 1e-6  # loose rates below which the strict one is only bounded
_TINY = 1e-30
_NO_REST = 1e-12  # of two tokens' sum nothing is left but rounding
_SIZES = (32, 128)  # tokens of a row
_ROOM = 1 << 20  # numbers in the largest intermediate tensor


def computes(rule: Rule) -> bool:
    """Whether this engine has the strict rate under these conditions."""
    return rule.law == UNIFORM and rule.on_k and rule.soft_cap == 0.0


class Crowd(NamedTuple):
    """The tokens of items, in any order (without biases and sinks: descending)."""

    s: Float[Tensor, "item token"]
    bias: Float[Tensor, "item token"]
    there: Bool[Tensor, "item token"]
    own: Bool[Tensor, "item token"]  # the attended one
    sink: Float[Tensor, "item"]
    n: Float[Tensor, "item"]  # how many tokens there are


class _Levels(NamedTuple):
    """Tokens on their levels: P(l <= w) = (w - low) * slope."""

    high: Tensor
    low: Tensor
    slope: Tensor
    there: Tensor


class _Grid(NamedTuple):
    """What holds for all cells of an item's grid of W."""

    first: Tensor  # [item]
    width: Tensor
    earlier: Tensor  # W's density before it rises from zero, or begins with a step
    needed: float
    last_needed: Tensor
    far: Tensor
    nodes: tuple[Tensor, Tensor, Tensor]  # [item, node]: weights, inverses and logarithms


def strict_rates(
    rule: Rule,
    rows: Rows,
    loose: Float[Tensor, "row sigma"],
    sink: Float[Tensor, "row"],
    some: Bool[Tensor, "row"],
    slots: Slots,
) -> Float[Tensor, "which row sigma"]:
    """Estimate, lower and upper bound of the strict rates."""
    n_rows, n_sigmas = loose.shape
    crowd = _gather(rule, rows, sink)
    out = loose.new_zeros(3, n_rows * n_sigmas + 1)
    some = some & (crowd.n >= 2)
    out[2, :-1] = torch.where(some[:, None] & (loose < SLIGHT), loose, 0.0).flatten()
    wanted = (some[:, None] & (loose >= SLIGHT)).flatten()
    sigmas = constant(rule.sigmas, loose.dtype, loose.device)
    n = crowd.s.shape[1]
    least, plain = 0, rows.bias is None
    for size in [*(size for size in _SIZES if size < n and plain), n]:
        fits = (crowd.n > least) & ((crowd.n <= size) | (size == n))
        mine = wanted & fits.repeat_interleave(n_sigmas)
        item, taken = slots.pick(f"strict items of {size if size < n else 'more'}", mine)
        least, step = size, max(1, _ROOM // (8 * 6 * size))
        for first in range(0, len(item), step):
            at = item[first : first + step]
            row = torch.div(at, n_sigmas, rounding_mode="floor")
            part = Crowd(*(x[row, :size] if x.ndim == 2 else x[row] for x in crowd))
            sigma = sigmas[at - row * n_sigmas]
            found = loose.new_zeros(3, len(at))
            for scales in {plain and x == -math.inf for x in rule.sink.tolist()}:
                mine = (part.sink == -math.inf) == scales if plain else taken[first : first + step]
                found = torch.where(mine, _uniform(rule, part, sigma, scales), found)
            high = torch.minimum(found[2], loose.flatten()[at])
            low = torch.minimum(found[1], high)
            rates = torch.stack([found[0].clamp_min(0).maximum(low).minimum(high), low, high])
            to = torch.where(taken[first : first + step], at, n_rows * n_sigmas)
            out.scatter_(1, to.expand(3, -1), rates)
    return out[:, :-1].view(3, n_rows, n_sigmas)


def _gather(rule: Rule, rows: Rows, sink: Tensor) -> Crowd:
    """The tokens that can matter at any sigma."""
    own = torch.zeros_like(rows.visible).scatter_(1, rows.star[:, None], True)
    if rows.bias is not None:
        n = rows.visible.sum(1).to(rows.s)
        return Crowd(rows.s, rows.bias, rows.visible, own, sink, n)
    a = math.sqrt(3.0) * float(rule.sigmas[-1])
    high = rows.s + a * rows.s.abs()
    low = rows.top - a * rows.top.abs()
    top = torch.where(rows.visible & ~own, high, -math.inf).amax(1)
    bar = low - _FAR * (top - low) / -math.log(rule.room)
    there = rows.visible & (high > bar[:, None])
    most = 1 + a if rule.on_q else 1.0
    there &= (most * (top - low) > -math.log(rule.room))[:, None]
    s, order = torch.where(there, rows.s, -math.inf).sort(1, descending=True)
    there = there.gather(1, order)
    s = torch.where(there, s, 0.0)
    return Crowd(s, torch.zeros_like(s), there, own.gather(1, order), sink, there.sum(1).to(s))


def _uniform(
    rule: Rule, crowd: Crowd, sigma: Float[Tensor, "item"], plain: bool
) -> Float[Tensor, "which item"]:
    """Rates, by the factors of the query between which another token can win.

    ``plain``: no biases and no sink, so that all levels scale with the query's factor.
    """
    needed = -math.log(rule.room)
    if not rule.on_q:
        f_q = torch.ones_like(sigma)[:, None]
        return _at_factors(crowd, sigma, f_q, f_q, torch.zeros_like(f_q), needed, plain)
    a = math.sqrt(3.0) * sigma
    first, last = (x[:, None] for x in _winning_factors(crowd, a, needed))
    wide = (last - first).clamp_min(0)
    if plain:
        two, k = last > _WIDE * first, torch.arange(2, device=a.device)
        width = wide * torch.where(two, 0.5, 1.0)
        f_q, share = first + (k + 0.5) * width, torch.where(two | (k == 0), width, 0.0)
        away = 0.5 * width / f_q
    else:
        x, w = (constant(r[_NODES, :_NODES], a.dtype, a.device) for r in (LEGENDRE_X, LEGENDRE_W))
        f_q, share = first + wide * x, w * wide
        away = torch.zeros_like(f_q)
    return _at_factors(crowd, sigma, f_q, share / (2 * a)[:, None], away, needed, plain)


def _winning_factors(
    crowd: Crowd, a: Float[Tensor, "item"], needed: float
) -> tuple[Float[Tensor, "item"], Float[Tensor, "item"]]:
    """Between which factors of the query another token can win."""
    least, most = (1 - a)[:, None], (1 + a)[:, None]
    high = crowd.s + a[:, None] * crowd.s.abs()
    low = torch.where(crowd.own, crowd.s - a[:, None] * crowd.s.abs(), -math.inf).amax(1)
    own_bias = torch.where(crowd.own, crowd.bias, -math.inf).amax(1)
    gap = high - low[:, None]
    lacks = needed + own_bias[:, None] - crowd.bias
    others = crowd.there & ~crowd.own
    rising = others & (gap > 0) & (lacks < most * gap)
    falling = others & (gap <= 0) & (lacks < least * gap)
    turn = lacks / torch.where(gap != 0, gap, 1.0)
    first = torch.where(rising, torch.maximum(turn, least), torch.where(falling, least, most))
    ends = torch.where(gap < 0, torch.minimum(turn, most), most)
    last = torch.where(rising, most, torch.where(falling, torch.maximum(ends, least), least))
    return first.amin(1), last.amax(1)


def _at_factors(
    crowd: Crowd,
    sigma: Float[Tensor, "item"],
    f_q: Float[Tensor, "item factor"],
    share: Float[Tensor, "item factor"],
    away: Float[Tensor, "item factor"],
    needed: float,
    plain: bool,
) -> Float[Tensor, "which item"]:
    """The rate around some factors of the query, with their shares."""
    times = f_q.shape[1]
    many = Crowd(*(x.repeat_interleave(times, 0) for x in crowd))
    f_q, wide = f_q.reshape(-1), math.sqrt(3.0) * sigma.repeat_interleave(times) * f_q.reshape(-1)
    middle = f_q[:, None] * many.s + many.bias
    half = (wide[:, None] * many.s.abs()).clamp_min(_LEAST)
    middle = torch.where(many.there, middle, -math.inf)
    levels = _Levels(middle + half, middle - half, 0.5 / half, many.there)
    x, weight = (
        constant(r[_NEAR, :_NEAR], f_q.dtype, f_q.device) for r in (LEGENDRE_X, LEGENDRE_W)
    )
    r = 1 + away.reshape(-1, 1) * (2 * x - 1)
    last_needed = needed / r[:, -1]
    lows = levels.low.topk(2, dim=1).values[:, 1]
    start = torch.maximum(lows, torch.where(many.own, levels.low, -math.inf).amax(1))
    last = torch.where(many.own, -math.inf, levels.high).amax(1) - last_needed
    able = (last > start) & (share.reshape(-1) > 0)
    last = torch.where(able, last, start + 1)
    first = start
    if plain and crowd.s.shape[1] > _MANY:  # the largest ones alone tell where W can't be
        some = _Levels(*(x[:, :_MANY] for x in levels))
        first = torch.where(many.n > _MANY, _where_mass_begins(some, start, start, last), start)
    there = levels.there & (levels.high > first[:, None] - _FAR)
    levels = levels._replace(there=there)
    first = _where_mass_begins(levels, first, first, last)
    grid = _Grid(
        first=first,
        width=(last - first) / _CELLS,
        earlier=torch.where(first > start, 0.0, -1.0).to(first),
        needed=needed,
        last_needed=last_needed,
        far=(many.n - there.sum(1)) * math.exp(-_FAR),
        nodes=(weight.expand_as(r), 1 / r, r.log()),
    )
    result = _over_cells(levels, many, grid)
    result = torch.where(able, result, 0.0) * share.reshape(-1)
    return result.view(3, -1, times).sum(2)


def _where_mass_begins(levels: _Levels, first: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A level between these below which W is with hardly any probability."""
    there = levels.there & (levels.high > first[:, None] - _FAR)
    for _ in range(_HALVINGS):
        w = 0.5 * (low + high)
        f = ((w[:, None] - levels.low) * levels.slope).clamp(_TINY, 1.0)
        f = torch.where(there, f, 1.0)
        lost = f.prod(1) < _LOST * f.amin(1)
        low, high = torch.where(lost, w, low), torch.where(lost, high, w)
    return low


def _over_cells(levels: _Levels, many: Crowd, grid: _Grid) -> Float[Tensor, "which item"]:
    """Sum what W gives in each cell, for every token that may win over it."""
    there, first = levels.there, grid.first[:, None]
    ends = [torch.where(there, (x - first).clamp_max(_MOST), _FADED) for x in levels[:2]]
    e_high, e_low = (torch.where(x > _FADED, x.exp(), 0.0) for x in ends)
    so_far, mass = torch.zeros_like(e_low), grid.earlier[:, None].expand_as(e_low)
    total = first.new_zeros(3, len(first))
    high, low = (torch.where(there, x, first) for x in levels[:2])
    slope = torch.where(there, levels.slope, 0.0)
    for i in range(_CELLS):
        bottom, width = grid.first + i * grid.width, grid.width
        middle, fade = bottom + 0.5 * width, torch.exp(-(i + 0.5) * width)[:, None]
        below = ((bottom + width)[:, None] - low).mul(slope).clamp(_TINY, 1.0)
        begun = (bottom[:, None] - low).mul(slope).clamp(_TINY, 1.0)
        inverse = slope / (middle[:, None] - low).mul(slope).clamp(_TINY, 1.0)
        below, begun = (torch.where(there, x, 1.0) for x in (below, begun))
        over = (high - middle[:, None]).clamp_max(0)
        top = torch.where(over < 0, e_high * fade, 1.0)
        base = (e_low * fade).clamp_max(1)
        mean = ((top - base) * inverse).clamp_max(1)
        variance = (0.5 * (top + base) * mean - mean * mean).clamp_min(0)
        drift = ((over - 1) * top - (low - middle[:, None] - 1) * base) * inverse
        token = (below, (below - begun) / (below + begun), mean, variance, drift.clamp(-1, 0))
        own_mass = below.prod(1, keepdim=True) / below
        mass_now = own_mass - so_far
        before = torch.where(mass >= 0, mass, mass_now)
        able = mass_now * (high - middle[:, None] - (grid.last_needed - 0.5 * width)[:, None])
        able = able * slope
        wins = there & ~many.own & (high > (bottom + grid.last_needed)[:, None])
        bounded = wins & (able < _NOTHING)
        total[2] += torch.where(bounded, able.clamp_min(0), 0.0).sum(1)
        wins &= ~bounded
        rates = _winners(grid, token, many.sink, middle, high, slope, mass_now, before)
        total += torch.where(wins, rates * mass_now, 0.0).sum(2)
        so_far, mass = own_mass, mass_now
    return total


def _winners(
    grid: _Grid,
    token: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sink: Tensor,
    middle: Tensor,
    high: Tensor,
    slope: Tensor,
    mass: Tensor,
    before: Tensor,
) -> Float[Tensor, "which item token"]:
    """Of each token, if W lies in this cell: estimate, lower and upper bound of its winning."""
    _, weight, mean, variance, drift = token
    weighted, inner = weight * mean, weight * variance
    sums = [x.sum(1, keepdim=True) for x in (mean, variance, drift, weight, weighted, inner)]
    squares = (weighted * mean).sum(1, keepdim=True)
    means = sums[0] + torch.exp((sink - middle).clamp_max(700.0))[:, None]
    bent = ((mass - before) / torch.where(mass > 0, mass, 1.0)).clamp(-1, 1)
    space = high - middle[:, None] - grid.width[:, None] * bent / 12
    # Of the others one is W: its mean does not count, it adds 1 itself.
    per = 1 / (sums[3] - weight).clamp_min(_TINY)
    largest = (sums[4] - weighted) * per
    spread = (sums[1] - variance - (sums[5] - inner) * per).clamp_min(0)
    spread += ((squares - weighted * mean) * per - largest * largest).clamp_min(0)
    rest = (means - mean - largest).clamp_min(0)
    drifts = sums[2] - drift - ((weight * drift).sum(1, keepdim=True) - weight * drift) * per
    return _winner(grid, space, slope, (rest, spread, drifts.clamp_max(0)))


def _winner(
    grid: _Grid, space: Tensor, slope: Tensor, others: tuple[Tensor, Tensor, Tensor]
) -> Float[Tensor, "which item token"]:
    """E P(l_j >= w + M - ln(room)), over factors near the query's."""
    rest, variance, drift = others
    within = (grid.width * grid.width / 12)[:, None]
    log, inverse = torch.log(1 + rest), 1 / (1 + rest)
    relative = variance * inverse * inverse
    skewed = relative * (6 + relative) / (6 + 4 * relative)
    drift = drift * inverse
    bend = 0.5 * drift * drift / rest.clamp_min(_NO_REST)
    mean, least = log - 0.5 * skewed, (log - 0.5 * variance).clamp_min(0)
    most = log + grid.far[:, None]
    out = []
    for weight, inverse, of_r in zip(*(x.unbind(1) for x in grid.nodes), strict=True):
        part, inverse, of_r = weight[:, None], inverse[:, None], of_r[:, None]
        needed = grid.needed + (drift + bend * of_r) * of_r
        turn = torch.sqrt(skewed * inverse * inverse + within)
        y = space - (needed + mean) * inverse
        estimate = ((y - turn) * slope).clamp(0, 1) + ((y + turn) * slope).clamp(0, 1)
        low = ((space - (needed + most) * inverse) * slope).clamp(0, 1)
        y = space - (needed + least) * inverse
        higher = 0.5 * (torch.sqrt(variance * inverse * inverse + within + y * y) + y) * slope
        out.append(part * torch.stack([0.5 * estimate, low, higher.clamp_max(1)]))
    return torch.stack(out).sum(0)
