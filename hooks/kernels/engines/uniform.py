"""The probability that a row's arg max moves under uniform norm noise, many rows at a time.

As in :mod:`hooks.kernels.integrals`, P = E_{X_*}[1 - H(X_*)], where y runs downwards from the
highest point that a competitor reaches and H(y) = prod_t (1 - g_t (y - d_t)) over d_t < y. Here H
is integrated by Gauss-Legendre's rule on panels between which competitors come in (many: between
every few of them) and, among these, H falls by no more than a factor of e.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.kernels import LEGENDRE_W, LEGENDRE_X
from hooks.kernels.engines.slots import constant

_DEEP = 15  # H < exp(-15), and less beyond: what is cut off is below 1e-7
_EVEN = 16  # panels of one width, among the others
_NEAREST, _EVENLY = 128, 256  # competitors at which panels end: the nearest, and of the others
FEW = 8  # competitors up to which all panels between them are exact
_FEW_NODES, _NODES = 5, 4  # exact for as many as FEW, and to 1e-10 of a panel
_ROOM = 1 << 21  # numbers in the largest intermediate tensor


def staying(
    g: Float[Tensor, "item competitor"],
    d: Float[Tensor, "item competitor"],
    width: Float[Tensor, "item"],
) -> Float[Tensor, "item"]:
    """Integral of H over 0 < y < width; d ascends, g is 0 for what is no competitor."""
    if g.shape[1] <= FEW:
        edges = torch.cat([torch.zeros_like(width)[:, None], d, width[:, None]], 1)
        edges = torch.minimum(edges.clamp_min(0), width[:, None])
        return _gauss(g, d, edges, _FEW_NODES)
    steep, moment = g.cumsum(1), (g * d).cumsum(1)
    depth = d * steep - moment  # at each d; those after it add nothing there
    targets = torch.arange(1.0, _DEEP + 1, dtype=g.dtype, device=g.device)
    after = torch.searchsorted(depth, targets.expand(len(d), -1).contiguous(), right=False)
    before = (after - 1).clamp_min(0)
    slope = steep.gather(1, before).clamp_min(torch.finfo(g.dtype).tiny)
    deep = (targets + moment.gather(1, before)) / slope
    width = torch.minimum(width, deep[:, -1])[:, None].clamp_min(0)
    near, far = d[:, :_NEAREST], d[:, _NEAREST:]
    far = far[:, :: max(1, -(-far.shape[1] // _EVENLY))]
    even = torch.linspace(0, 1, _EVEN + 1, dtype=g.dtype, device=g.device) * width
    edges = torch.cat([near, far, deep[:, :-1], even], 1)
    edges = torch.minimum(edges.clamp_min(0), width).sort(1).values
    return _gauss(g, d, edges, _NODES)


def _gauss(g: Tensor, d: Tensor, edges: Tensor, nodes: int) -> Float[Tensor, "item"]:
    """Integral of H over the panels between ascending edges."""
    x, w = (constant(r[nodes, :nodes], g.dtype, g.device) for r in (LEGENDRE_X, LEGENDRE_W))
    span = edges.diff(dim=1)
    y = (edges[:, :-1, None] + span[:, :, None] * x).flatten(1)
    weight = (span[:, :, None] * w).flatten(1)
    step = max(1, _ROOM // max(1, y.numel()))  # competitors at a time
    h = torch.ones_like(y)
    for t in range(0, g.shape[1], step):
        beyond = (y[:, :, None] - d[:, None, t : t + step]).clamp_min_(0)
        h *= (1 - beyond.mul_(g[:, None, t : t + step])).clamp_min_(0).prod(2)
    return (h * weight).sum(1)


def plain(
    s_star: Float[Tensor, "item"],
    s: Float[Tensor, "item competitor"],
    a: Float[Tensor, "item"],
) -> Float[Tensor, "item"]:
    """P without a bias; competitors descend, -inf for none; half-width a <= 1.

    Only competitors with the sign of s_* can win, and they share the factor 1 + a or 1 - a at
    which they reach furthest up.
    """
    sign = torch.where(s_star > 0, 1.0, -1.0)
    half = a * s_star.abs()
    low, up = s_star - half, 1 + sign * a
    reach = s * up[:, None]
    able = (reach > low[:, None]) & (s * sign[:, None] > 0)
    top = torch.where(able[:, 0], reach[:, 0], low)
    width = top - low
    d = torch.where(able, top[:, None] - reach, width[:, None])
    g = torch.where(able, (0.5 * sign / a)[:, None] / torch.where(able, s, 1.0), 0.0)
    lost = (width - staying(g, d, width)) / (2 * half)
    return torch.where(able[:, 0], lost.clamp_min(0), 0.0)


def shifted(
    s_star: Float[Tensor, "item"],
    s: Float[Tensor, "item competitor"],
    shift: Float[Tensor, "item competitor"],
    able: Tensor,
    a: Float[Tensor, "item"],
) -> Float[Tensor, "item"]:
    """P with biases at one factor of the query: X_t is uniform about s_t - shift_t."""
    half = a * s_star.abs()
    low, high = s_star - half, s_star + half
    middle, reach = s - shift, a[:, None] * s.abs()
    able = able & (middle + reach > low[:, None])
    some = able.any(1)
    begin = torch.where(able, middle - reach, low[:, None]).amax(1)
    begin = torch.maximum(begin, low)
    upper = torch.where(able, middle + reach, low[:, None])
    g = torch.where(able & (reach > 0), 0.5 / torch.where(reach > 0, reach, 1.0), 0.0)
    # X_* does not move: one product.
    still = (1 - g * (upper - low[:, None]).clamp_min(0)).clamp(0, 1).prod(1)
    still = 1 - torch.where(begin > low, 0.0, still)
    top = torch.minimum(upper.amax(1), high)
    g = torch.where(upper > begin[:, None], g, 0.0)
    width = (top - begin).clamp_min(0)
    d = torch.where(g > 0, top[:, None] - upper, width[:, None])
    d, order = d.sort(1)
    inside = staying(g.gather(1, order), d, width)
    twice = torch.where(half > 0, 2 * half, 1.0)
    moving = (top - low - inside).clamp_min(0) / twice
    certain = (torch.minimum(begin, high) - low) / twice
    moving = torch.where(begin >= top, certain, moving)
    return torch.where(some, torch.where(half > 0, moving, still), 0.0)
