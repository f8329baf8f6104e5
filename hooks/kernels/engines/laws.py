"""The probability that a row's arg max moves, many rows at a time, under any law.

As :mod:`hooks.kernels.integrals`, whose nodes over the query's factor these are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.kernels import GAUSSIAN, LEGENDRE_W, LEGENDRE_X, LOGNORMAL, UNIFORM
from hooks.kernels.engines import uniform
from hooks.kernels.engines.slots import constant

_Z_END, _Z_STEP = 8.5, 0.125  # normal variable of a factor; 1e-17 of the mass lies beyond
_Q_NODES, _Q_NEAREST = 8, 8
_Q_PANELS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0)
_ROOM = 1 << 21  # numbers in the largest intermediate tensor


def factor(law: int, z: Tensor, sigma: Tensor) -> Tensor:
    """The factor 1 + kappa of a number: uniform in (-1, 1), or standard normal."""
    if law == UNIFORM:
        return 1 + math.sqrt(3.0) * sigma * z
    if law == LOGNORMAL:
        s = torch.log1p(sigma * sigma).sqrt()
        return torch.exp(s * z - s * s / 2)
    return 1 + sigma * z


def factor_cdf(law: int, f: Tensor, sigma: Tensor) -> Tensor:
    """P(1 + kappa <= f)."""
    if law == UNIFORM:
        a = math.sqrt(3.0) * sigma
        return ((f - 1 + a) / (2 * a)).clamp(0, 1)
    if law == GAUSSIAN:
        z = (f - 1) / sigma
    else:
        s = torch.log1p(sigma * sigma).sqrt()
        z = torch.log(f.clamp_min(0)) / s + s / 2
    below: Tensor = torch.special.ndtr(z)
    return below


def normal_nodes(like: Tensor, step: float = _Z_STEP, end: float = _Z_END) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the trapezoidal rule for the normal law."""
    z = -end + step * torch.arange(int(2 * end / step) + 1, dtype=like.dtype, device=like.device)
    return z, step * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _smooth(
    law: int,
    s_star: Float[Tensor, "item"],
    s: Float[Tensor, "item competitor"],
    shift: Float[Tensor, "item competitor"] | None,
    able: Bool[Tensor, "item competitor"],
    sigma: Float[Tensor, "item"],
) -> Float[Tensor, "item"]:
    """P at one factor of the query, under a gaussian or lognormal law."""
    z, weight = normal_nodes(s)
    own = factor(law, z, sigma[:, None]) * s_star[:, None]
    stays = torch.ones_like(own)
    step = max(1, _ROOM // max(1, own.numel()))
    for t in range(0, s.shape[1], step):
        part = slice(t, t + step)
        bar, theirs = own[:, :, None], s[:, None, part]
        if shift is not None:
            bar = bar + shift[:, None, part]
        below = factor_cdf(law, bar / torch.where(theirs != 0, theirs, 1.0), sigma[:, None, None])
        below = torch.where(theirs < 0, 1 - below, below)
        below = torch.where(theirs == 0, (bar >= 0).to(below), below)
        stays *= torch.where(able[:, None, part], below, 1.0).prod(2)
    return ((1 - stays) * weight).sum(1)


def plain(
    law: int, s_star: Tensor, s: Tensor, able: Tensor, sigma: Float[Tensor, "item"]
) -> Float[Tensor, "item"]:
    """P without a bias, noise on the keys; competitors descend."""
    if law == UNIFORM:
        return uniform.plain(s_star, torch.where(able, s, -math.inf), math.sqrt(3.0) * sigma)
    return _smooth(law, s_star, s, None, able, sigma)


def _query_alone(
    law: int, s_star: Tensor, s: Tensor, beta: Tensor, able: Tensor, sigma: Tensor
) -> Float[Tensor, "item"]:
    """The row stays while f_q (s_t - s_*) <= beta_t for all t."""
    gap = s - s_star[:, None]
    turn = beta / torch.where(gap != 0, gap, 1.0)
    upper = torch.where(able & (gap > 0), turn, math.inf).amin(1)
    lower = torch.where(able & (gap < 0), turn, -math.inf).amax(1)
    above = torch.where(upper < math.inf, 1 - factor_cdf(law, upper, sigma), 0.0)
    below = torch.where(lower > -math.inf, factor_cdf(law, lower, sigma), 0.0)
    return (above + below).clamp_max(1)


def biased(
    law: int,
    s_star: Float[Tensor, "item"],
    s: Float[Tensor, "item competitor"],
    beta: Float[Tensor, "item competitor"],
    able: Bool[Tensor, "item competitor"],
    sigma: Float[Tensor, "item"],
    *,
    on_q: bool,
    on_k: bool,
) -> Float[Tensor, "item"]:
    """P with a bias; competitors nearest first."""
    if not on_k:
        return _query_alone(law, s_star, s, beta, able, sigma)
    if not on_q:
        f_q = weight = torch.ones_like(s_star)[:, None]
    elif law == UNIFORM:
        f_q, weight = _query_nodes(s_star, s, beta, able, math.sqrt(3.0) * sigma)
    else:
        z, weight = normal_nodes(s)
        f_q = factor(law, z, sigma[:, None])
        weight = torch.where(f_q > 0, weight, 0.0)
    total = torch.zeros_like(s_star)
    step = max(1, _ROOM // max(1, 64 * s.numel()))
    for k in range(0, f_q.shape[1], step):
        own = f_q[:, k : k + step]
        times = own.shape[1]
        part = [x.repeat_interleave(times, 0) for x in (s_star, s, beta, able, sigma)]
        shift = part[2] / torch.where(own > 0, own, 1.0).flatten()[:, None]
        if law == UNIFORM:
            p = uniform.shifted(part[0], part[1], shift, part[3], math.sqrt(3.0) * part[4])
        else:
            p = _smooth(law, part[0], part[1], shift, part[3], part[4])
        total += (p.view(-1, times) * weight[:, k : k + step]).sum(1)
    return total


def _query_nodes(
    s_star: Tensor, s: Tensor, beta: Tensor, able: Tensor, a: Float[Tensor, "item"]
) -> tuple[Float[Tensor, "item node"], Float[Tensor, "item node"]]:
    """Factors of the query and their weights: panels end where the nearest competitors turn."""
    panels = constant(np.array(_Q_PANELS), s.dtype, s.device)
    first, wide = (1 - a)[:, None], (2 * a)[:, None]
    near = slice(0, _Q_NEAREST)
    edges = [first + wide * panels]
    for theirs in (1 + a, 1 - a):
        for own in (1 + a, 1 - a):
            gap = s[:, near] * theirs[:, None] - (s_star * own)[:, None]
            turn = beta[:, near] / torch.where(gap != 0, gap, 1.0)
            inside = able[:, near] & (gap != 0) & (turn > first) & (turn < first + wide)
            edges.append(torch.where(inside, turn, first))
    edge = torch.cat(edges, 1).sort(1).values
    nodes = (r[_Q_NODES, :_Q_NODES] for r in (LEGENDRE_X, LEGENDRE_W))
    x, w = (constant(x, s.dtype, s.device) for x in nodes)
    span = edge.diff(dim=1)[:, :, None]
    return (edge[:, :-1, None] + span * x).flatten(1), (span * w / wide[:, :, None]).flatten(1)
