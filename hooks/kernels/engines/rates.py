"""The loose rates of sparse rows at every sigma, as they are and in the centred gauge.

A row, a gauge and a sigma make an item. Items are worked on with those that have about as many
competitors; the few nearest ones are all where together they already leave the row no chance.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.kernels import GAUSSIAN, UNIFORM, Rule
from hooks.kernels.engines import laws, uniform
from hooks.kernels.engines.apart import Competitors
from hooks.kernels.engines.slots import Slots, constant

_SIZES = (uniform.FEW, 32, 128)  # competitors of an item; more in one go only where they matter
_DEEP = 15.0  # see `uniform.staying`
_TAIL = 7.5  # spreads beyond which a competitor wins less than once in 1e13
_ROOM = 1 << 21  # numbers in the largest intermediate tensor


def loose_rates(
    rule: Rule, rows: Competitors, some: Bool[Tensor, "row"], slots: Slots
) -> Float[Tensor, "row gauge sigma"]:
    """P that the arg max moves; 0 where not ``some``."""
    sigmas = constant(rule.sigmas, rows.s.dtype, rows.s.device)
    n_rows, gauges, n = rows.s.shape
    found = rows.s.new_zeros(n_rows * gauges * len(sigmas) + 1)  # the last takes what is no item
    if n == 0 or not (rule.on_k or rows.beta is not None):
        return found[:-1].view(n_rows, gauges, -1)
    flat = rows._replace(
        s_star=rows.s_star.flatten(),
        s=rows.s.flatten(0, 1),
        beta=None if rows.beta is None else rows.beta.flatten(0, 1),
        a=rows.a.flatten(0, 1),
    )
    count = _reach(rule, flat, sigmas).flatten() * some.repeat_interleave(gauges * len(sigmas))
    done = torch.zeros_like(found, dtype=torch.bool)
    sizes = [size for size in _SIZES if size < n] + [n]
    for least, size in pairwise([0, *sizes]):
        mine = (count > least) & ~done[:-1]
        if size < n and size != _SIZES[-1]:
            mine &= count <= size
        item, taken = slots.pick(f"items of {size if size < n else 'more'}", mine)
        step = max(1, _ROOM // (64 * size))
        for first in range(0, len(item), step):
            at = item[first : first + step]
            p, whole = _of_items(rule, flat, sigmas, at, count[at], size)
            to = torch.where(taken[first : first + step] & whole, at, len(count))
            found.scatter_(0, to, p)
            done.scatter_(0, to, True)
    return found[:-1].view(n_rows, gauges, -1)


def _reach(
    rule: Rule, flat: Competitors, sigmas: Float[Tensor, "sigma"]
) -> Int[Tensor, "row sigma"]:
    """How many competitors, from the nearest on, can win at each sigma."""
    s_star, s = flat.s_star[:, None], flat.s
    if rule.law != UNIFORM:
        each = [_within_tails(rule.law, s_star, s, float(sigma)) for sigma in rule.sigmas]
        if flat.beta is not None:
            each = [flat.a < math.inf for _ in rule.sigmas]
        return torch.stack([x.sum(1) for x in each], 1) * (sigmas > 0)
    a = math.sqrt(3.0) * sigmas
    if flat.beta is not None:
        return torch.searchsorted(flat.a, a.expand(len(s), -1).contiguous())
    sign = torch.where(s_star > 0, 1.0, -1.0)
    bar = s_star * (1 - sign * a) / (1 + sign * a)
    found = torch.searchsorted(-s, (-bar).contiguous())
    return torch.where((s_star != 0) & (a > 0), found, 0)


def _within_tails(law: int, s_star: Tensor, s: Tensor, sigma: float) -> Bool[Tensor, "row key"]:
    """Whether a competitor, and all nearer ones, win more often than once in 1e13."""
    if law == GAUSSIAN:
        wins = s_star - s < _TAIL * sigma * torch.hypot(s_star, s)
    else:
        spread = math.sqrt(2 * math.log1p(sigma * sigma))
        ratio = torch.where(s_star > 0, s / s_star, s_star / torch.where(s != 0, s, 1.0))
        wins = (ratio > 0) & (-torch.log(ratio.clamp_min(1e-300)) < _TAIL * spread)
    wins = wins & (s > -math.inf) & (s_star != 0) & (s[:, :1] * s_star > 0)
    return (~wins).cumsum(1) == 0


def _of_items(
    rule: Rule,
    flat: Competitors,
    sigmas: Float[Tensor, "sigma"],
    item: Int[Tensor, "item"],
    count: Int[Tensor, "item"],
    size: int,
) -> tuple[Float[Tensor, "item"], Bool[Tensor, "item"]]:
    """P from the nearest ``size`` competitors, and whether no others are needed."""
    row = torch.div(item, len(sigmas), rounding_mode="floor")
    sigma = sigmas[item - row * len(sigmas)]
    able = torch.arange(size, device=item.device) < count[:, None]
    s_star, s = flat.s_star[row], flat.s[row, :size]
    whole = count <= size
    if flat.beta is None:
        if rule.law == UNIFORM:
            whole |= _deep(s_star, s, math.sqrt(3.0) * sigma)
        return laws.plain(rule.law, s_star, s, able, sigma), whole
    p = laws.biased(
        rule.law,
        s_star,
        torch.where(able, s, 0.0),
        flat.beta[row, :size],
        able,
        sigma,
        on_q=rule.on_q,
        on_k=rule.on_k,
    )
    return p, whole


def _deep(s_star: Tensor, s: Tensor, a: Float[Tensor, "item"]) -> Bool[Tensor, "item"]:
    """Whether these leave the row no chance where the last of them comes in."""
    sign = torch.where(s_star > 0, 1.0, -1.0)
    up = 1 + sign * a
    fall = (s - s[:, -1:]) * up[:, None] / torch.where(s != 0, s, 1.0)
    return (fall * (0.5 * sign / a)[:, None]).sum(1) >= _DEEP
