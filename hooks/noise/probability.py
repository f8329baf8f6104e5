"""Closed forms: at what norm noise a row's arg max moves, and how probably.

A row attends to token * with score w_* = s_* + b_*, its competitors have w_t = s_t + b_t <= w_*,
where s is the q.k part of a score and b what is added to it (zero unless the architecture has ALiBi
or relative position biases). Norm noise gives

    w'_t = f_q f_t s_t + b_t,        f = 1 + kappa, independent factors

(exactly, not to first order), so the row goes to t iff
f_q (f_t s_t - f_* s_*) > b_* - b_t =: beta_t.
Source: Menary et al. 2024, theorem 7, extended from first order to exact and to added biases.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.arguments import brief, check_booleans, check_kind, check_tensor
from hooks.noise.laws import Law, check_sigma

_NODES = 10  # Gauss-Legendre nodes per panel: exact for polynomials of degree 19
_MANY = 16  # up to this many linear factors a panel's rule is exact; beyond, panels get finer
_SMOOTH = ("gaussian", "lognormal")  # their knots are no corners, but steps of a grid
_TURNS = 96  # nearest competitors whose turns split panels, where there are many
_ROUNDS, _PARTS = 8, 8  # times that the steepest panel is split, and into how many
_DEEPEST = -22.0  # of the product's logarithm: what lies deeper adds nothing
_DYADIC = 12  # extra panels towards an end where many competitors together fall steeply
_Q_PANELS = 12  # panels of the outer integral over f_q
_BUDGET = 1 << 18  # elements of the largest intermediate tensor


def critical_half_width(
    s_star: Float[Tensor, "rows"],
    s: Float[Tensor, "rows competitors"],
    beta: Float[Tensor, "rows competitors"] | None = None,
    *,
    noise_on_q: bool = True,
    noise_on_k: bool = True,
) -> Float[Tensor, "rows competitors"]:
    """Smallest a such that factors in [1 - a, 1 + a] can move a row from * to t.

    Without a bias, and with noise on k,

        a_t = (s_* - s_t) / (|s_*| + |s_t|),

    which is (rho - 1) / (rho + 1) with rho = s_*/s_t where both are positive. It is at least 1
    ("never": no factor may turn negative) where s_* > 0 >= s_t. Without a bias, query noise alone
    moves nothing. With a bias the condition f_q (s_t - s_* + a (|s_*| + |s_t|)) > beta is quadratic
    in a.

    Args:
        s_star: q.k part of the attended token's score.
        s: q.k parts of the competitors' scores.
        beta: b_* - b_t, or None where nothing is added to the scores.
        noise_on_q, noise_on_k: whether the query and the keys are noised.

    Returns:
        The critical half-width of each competitor, ``inf`` where a <= 1 never suffices. The row's
        is the minimum over its competitors; for uniform noise the critical sigma is a / sqrt(3).
        It needs no law: it is a certificate from clean scores.
    """
    _check_rows(s_star, s, beta=beta)
    noise_on_q, noise_on_k = check_booleans(noise_on_q=noise_on_q, noise_on_k=noise_on_k)
    gap = s - s_star[:, None]
    reach = s.abs() + s_star.abs()[:, None]
    never = torch.full_like(gap, math.inf)
    if beta is None:
        a = -gap / reach if noise_on_k else never
    elif not noise_on_k:
        a = _critical_q_alone(gap, beta) if noise_on_q else never
    elif not noise_on_q:
        a = (beta - gap) / reach
    else:
        a = _critical_qk(gap, reach, beta)
    # 0/0: two scores that are exactly zero stay equal whatever the factors.
    return torch.where((a < 1) & ~torch.isnan(a), a, never)


def _check_rows(s_star: Any, s: Any, *, beta: Any) -> None:
    """Refuse scores whose shapes are not those of rows and their competitors."""
    check_tensor("s_star", s_star, (None,), "[row]")
    n = len(s_star)
    check_tensor("s", s, (n, None), f"[row, competitor] of {n} rows")
    if beta is not None:
        check_tensor("beta", beta, tuple(s.shape), f"of the shape of s, {list(s.shape)}")


def _check_sigma(sigma: Any, law: Any, n: int) -> None:
    check_kind("law", law, Law, "a law, such as hooks.LAWS['uniform']")
    check_tensor("sigma", sigma, (n,), f"[row] of {n} rows")
    for end in (sigma.min(), sigma.max()) if n else ():
        rounded = float(end) / (1 + 1e-6)  # 0.2 in float32 is above 0.2
        check_sigma(rounded, law)


def _critical_q_alone(gap: Tensor, beta: Tensor) -> Tensor:
    grows = beta / gap - 1  # beta > 0 < gap: the query must grow
    shrinks = 1 - beta / gap  # beta < 0 > gap: the query must shrink
    never = torch.full_like(gap, math.inf)
    a = torch.where((beta > 0) & (gap > 0), grows, never)
    return torch.where((beta < 0) & (gap < 0), shrinks, a)


def _critical_qk(gap: Tensor, reach: Tensor, beta: Tensor) -> Tensor:
    # (1 + a)(gap + a reach) = beta where beta >= 0, (1 - a)(gap + a reach) = beta below.
    rising = reach + gap
    up = (-rising + (rising**2 + 4 * reach * (beta - gap)).clamp_min(0).sqrt()) / (2 * reach)
    falling = reach - gap
    # The smaller root, in the form that does not cancel.
    root = (falling**2 - 4 * reach * (beta - gap)).clamp_min(0).sqrt()
    down = 2 * (beta - gap) / (falling + root)
    return torch.where(beta >= 0, up, down)


def collapse_probability(
    s_star: Float[Tensor, "rows"],
    s: Float[Tensor, "rows competitors"],
    sigma: Float[Tensor, "rows"],
    law: Law,
    *,
    valid: Bool[Tensor, "rows competitors"] | None = None,
    beta: Float[Tensor, "rows competitors"] | None = None,
    noise_on_q: bool = True,
    noise_on_k: bool = True,
) -> Float[Tensor, "rows"]:
    """Probability that independent norm noise moves the arg max of a row.

    Without a bias

        P = 1 - E_{f_*}[ prod_t P(f_t s_t <= f_* s_*) ],

    for one competitor and uniform noise max(0, a(1 + rho) - (rho - 1))^2 / (8 rho a^2); with a bias
    the outer expectation is also over f_q, and f_* s_* becomes f_* s_* + beta_t / f_q. Evaluated
    by Gauss-Legendre panels between the points where an integrand changes its form: exact to
    rounding for a few competitors, below 1e-8 otherwise.

    Args:
        s_star, s, beta, noise_on_q, noise_on_k: as in :func:`critical_half_width`.
        sigma: RMS of the relative change, per row; 0 gives 0.
        law: law of the factors.
        valid: False for padding among the competitors.
    """
    _check_rows(s_star, s, beta=beta)
    _check_sigma(sigma, law, len(s_star))
    given: Any = valid
    if given is not None and not (isinstance(given, Tensor) and given.dtype == torch.bool):
        raise TypeError(f"valid: wanted a boolean tensor [row, competitor]; got {brief(valid)}")
    if valid is not None and valid.shape != s.shape:
        raise ValueError(f"valid: wanted shape {list(s.shape)}; got shape {list(valid.shape)}")
    noise_on_q, noise_on_k = check_booleans(noise_on_q=noise_on_q, noise_on_k=noise_on_k)
    s_star, s, sigma = (x.to(torch.float64) for x in (s_star, s, sigma))
    valid = torch.ones_like(s, dtype=torch.bool) if valid is None else valid
    beta = None if beta is None else beta.to(torch.float64)
    out = torch.zeros_like(s_star)
    if s.shape[1] == 0 or not (noise_on_k or (noise_on_q and beta is not None)):
        return out
    a_star = critical_half_width(
        s_star, s, beta, noise_on_q=noise_on_q, noise_on_k=noise_on_k
    ).masked_fill(~valid, math.inf)
    alive = (sigma > 0) & valid.any(1)
    if law.name == "uniform":
        alive &= a_star.amin(1) < math.sqrt(3) * sigma
    elif beta is None:
        alive &= a_star.amin(1) < math.inf  # beyond it lies less than 1e-6 of any law's mass
    rows = alive.nonzero().squeeze(1)
    if not noise_on_k:
        assert beta is not None
        out[rows] = _q_alone(s_star[rows], s[rows], sigma[rows], law, valid[rows], beta[rows])
        return out
    if law.name == "uniform":  # competitors that cannot win leave the product
        valid = valid & (a_star < math.sqrt(3) * sigma[:, None])
    counts = valid.sum(1)
    # Rows of like size together: the padding of a block is at most twofold.
    most = int(counts[rows].max()) if len(rows) else 1
    for size in (1 << power for power in range((most - 1).bit_length() + 1)):
        block = rows[(counts[rows] <= size) & (counts[rows] > size // 2)]
        per_row = _elements_per_row(size, law, beta is not None, noise_on_q)
        for part in block.split(max(1, _BUDGET // per_row)):
            # Nearest first; never-winning competitors of an unbounded law before padding.
            near = a_star[part].clamp(max=2).masked_fill(~valid[part], math.inf)
            first = near.topk(min(size, s.shape[1]), dim=1, largest=False).indices
            near_s, near_valid = s[part].gather(1, first), valid[part].gather(1, first)
            near_beta = None if beta is None else beta[part].gather(1, first)
            stays = _stays if near_beta is None or not noise_on_q else _stays_under_q
            out[part] = 1 - stays(s_star[part], near_s, sigma[part], law, near_valid, near_beta)
    return out


def _elements_per_row(size: int, law: Law, biased: bool, noise_on_q: bool) -> int:
    knots = 2 if law.name == "uniform" else 15
    turns = min(size, _TURNS)
    ends = knots if biased or law.name != "uniform" else 1
    splits = turns * ends if biased or law.name not in _SMOOTH else 0
    panels = knots + splits + (_DYADIC + _ROUNDS * (_PARTS - 1) if size > _MANY else 0)
    outer = (_Q_PANELS + 4 * size) * _NODES if biased and noise_on_q else 1
    return panels * _NODES * size * outer


def _q_alone(
    s_star: Tensor, s: Tensor, sigma: Tensor, law: Law, valid: Tensor, beta: Tensor
) -> Tensor:
    # The row stays while f_q (s_t - s_*) <= beta_t for all t: an interval of f_q.
    gap = s - s_star[:, None]
    bound = beta / gap
    upper = torch.where(valid & (gap > 0), bound, math.inf).amin(1)
    lower = torch.where(valid & (gap < 0), bound, -math.inf).amax(1)
    inside = law.cdf(upper, sigma) - law.cdf(lower, sigma)
    return (1 - inside).clamp(0, 1)


def _stays_under_q(
    s_star: Tensor, s: Tensor, sigma: Tensor, law: Law, valid: Tensor, beta: Tensor | None
) -> Tensor:
    """E_{f_q} of :func:`_stays`, with beta_t / f_q for beta_t."""
    assert beta is not None
    edges = _query_edges(s_star, s, sigma, law, valid, beta)
    f_q, weight = _panels(edges)
    weight = weight * law.density(f_q, sigma[:, None])
    n_q, n_t = f_q.shape[1], s.shape[1]

    def spread(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, n_q, *x.shape[1:]).reshape(-1, *x.shape[1:])

    shifted = (beta[:, None, :] / f_q[:, :, None]).reshape(-1, n_t)
    stays = _stays(spread(s_star), spread(s), spread(sigma), law, spread(valid), shifted)
    return (stays.reshape(-1, n_q) * weight).sum(1) / weight.sum(1)


def _query_edges(
    s_star: Tensor, s: Tensor, sigma: Tensor, law: Law, valid: Tensor, beta: Tensor
) -> Tensor:
    """Points f_q between which the inner expectation is smooth.

    An even grid and, for laws with corners, the points where a competitor's corner meets one of the
    maximum's: there it becomes able, or certain, to win.
    """
    own = law.knots(sigma)
    lo, hi = own[:, :1], own[:, -1:]
    each = -(-_Q_PANELS // (own.shape[1] - 1))
    pieces = torch.arange(each, dtype=own.dtype, device=own.device) / each
    fine = own[:, :-1, None] + own.diff(dim=1)[:, :, None] * pieces
    edges = [fine.flatten(1), hi]
    if law.name not in _SMOOTH:
        corners = (
            own[:, None, :, None] * s[:, :, None, None] - (own * s_star[:, None])[:, None, None, :]
        )
        turns = (beta[:, :, None, None] / corners).flatten(1)
        usable = turns.isfinite() & valid.repeat_interleave(own.shape[1] ** 2, dim=1)
        edges.append(torch.where(usable, turns, lo).clamp(lo, hi))
    return torch.cat(edges, 1).sort(1).values


def _stays(
    s_star: Tensor, s: Tensor, sigma: Tensor, law: Law, valid: Tensor, beta: Tensor | None
) -> Tensor:
    """E_{f_*} of the product over competitors of P(f_t s_t <= f_* s_* + beta_t)."""
    own = law.knots(sigma)
    edges = [own]
    if beta is not None or law.name not in _SMOOTH:
        # f_* at which a competitor's distribution function changes its form. Under the uniform law
        # and without a bias only one of the support's two ends can do that inside the support.
        ends = own
        if beta is None and law.name == "uniform":
            ends = torch.where(s_star > 0, own[:, -1], own[:, 0])[:, None]
        near, shift = s[:, :_TURNS], 0 if beta is None else beta[:, :_TURNS, None]
        turns = (ends[:, None, :] * near[:, :, None] - shift) / s_star[:, None, None]
        usable = valid[:, :_TURNS, None] & turns.isfinite()
        turns = torch.where(usable, turns, own[:, :1, None])
        edges.append(turns.flatten(1))
    grid = torch.cat(edges, 1).clamp(own[:, :1], own[:, -1:]).sort(1).values
    n_t, nodes = s.shape[1], _NODES
    if n_t > _MANY:
        # Where many competitors act at once their product falls within a fraction of a panel.
        span = 0.5 ** torch.arange(1, _DYADIC + 1, dtype=grid.dtype, device=grid.device)
        active = _active_end(s_star, s, valid, own, beta)
        far = torch.where(s_star > 0, own[:, 0], own[:, -1])  # where f_* s_* is least
        towards = active[:, None] + (far - active)[:, None] * span
        grid = torch.cat([grid, towards.clamp(own[:, :1], own[:, -1:])], 1).sort(1).values
        for _ in range(_ROUNDS):
            grid = _split_the_steepest(grid, s_star, s, sigma, law, valid, beta)
    elif law.name == "uniform":
        nodes = n_t // 2 + 1  # a product of n_t linear factors: exact
    f, weight = _panels(grid, nodes)
    weight = weight * law.density(f, sigma[:, None])
    stays = _each_stays(f, s_star, s, sigma, law, valid, beta).prod(2)
    # The law's truncated tail is normalised away.
    return (stays * weight).sum(1) / weight.sum(1)


def _each_stays(
    f: Tensor,
    s_star: Tensor,
    s: Tensor,
    sigma: Tensor,
    law: Law,
    valid: Tensor,
    beta: Tensor | None,
) -> Tensor:
    """P(f_t s_t <= f_* s_* + beta_t) for each competitor at each f_*, ``[row, f, competitor]``."""
    if law.name == "uniform" and not bool((valid & (s == 0)).any()):
        return _clipped_lines(f, s_star, s, sigma, valid, beta)
    threshold = (f * s_star[:, None])[:, :, None]
    if beta is not None:
        threshold = threshold + beta[:, None, :]
    return _not_winning(threshold, s[:, None, :], valid[:, None, :], sigma, law)


def _split_the_steepest(
    edges: Tensor,
    s_star: Tensor,
    s: Tensor,
    sigma: Tensor,
    law: Law,
    valid: Tensor,
    beta: Tensor | None,
) -> Tensor:
    """The edges, and some within each row's panel over which the product's logarithm falls most.

    A crowd of competitors far below the nearest ones makes it fall within a fraction of a panel.
    """
    log = _each_stays(edges, s_star, s, sigma, law, valid, beta).clamp_min(1e-300).log().sum(2)
    steepness = log.clamp_min(_DEEPEST).diff(dim=1).abs()
    at = torch.where(edges.diff(dim=1) > 0, steepness, -1.0).argmax(1, keepdim=True)
    low, high = edges.gather(1, at), edges.gather(1, at + 1)
    share = torch.arange(1, _PARTS, dtype=edges.dtype, device=edges.device) / _PARTS
    return torch.cat([edges, low + (high - low) * share], 1).sort(1).values


def _clipped_lines(
    f: Tensor, s_star: Tensor, s: Tensor, sigma: Tensor, valid: Tensor, beta: Tensor | None
) -> Tensor:
    """:func:`_not_winning` of the uniform law, a clipped line in f_*, in three passes."""
    a = math.sqrt(3) * sigma[:, None]
    slope = s_star[:, None] / (2 * a * s)
    level = 0.5 - 0.5 / a + (0 if beta is None else beta / (2 * a * s))
    slope, level = torch.where(s > 0, slope, -slope), torch.where(s > 0, level, 1 - level)
    slope, level = slope.masked_fill(~valid, 0.0), level.masked_fill(~valid, 1.0)
    lines = torch.baddbmm(level[:, None, :], f[:, :, None], slope[:, None, :])
    return lines.clamp_(0, 1)


def _not_winning(threshold: Tensor, s: Tensor, valid: Tensor, sigma: Tensor, law: Law) -> Tensor:
    """P(f_t s_t <= threshold) for each competitor, 1 for padding."""
    wide = sigma.reshape(-1, *(1,) * (s.ndim - 1))
    below = law.cdf(threshold / s, wide)
    stays = torch.where(s > 0, below, 1 - below)
    stays = torch.where(s == 0, (threshold >= 0).to(stays.dtype), stays)
    return torch.where(valid, stays, 1.0)


def _active_end(
    s_star: Tensor, s: Tensor, valid: Tensor, own: Tensor, beta: Tensor | None
) -> Tensor:
    """The f_* next to which the product leaves 1: the nearest competitor's last turn."""
    shift = 0 if beta is None else beta
    lo, hi = own[:, :1], own[:, -1:]
    best = torch.where(s > 0, hi * s, lo * s) - shift
    turn = torch.where(valid, best, -math.inf).amax(1) / s_star
    turn = torch.where(turn.isfinite(), turn, own[:, 0])
    return turn.clamp(own[:, 0], own[:, -1])


@lru_cache
def _gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2, w / 2


def _panels(
    edges: Float[Tensor, "rows edges"], nodes: int = _NODES
) -> tuple[Float[Tensor, "rows nodes"], Float[Tensor, "rows nodes"]]:
    """Nodes and weights of a composite Gauss-Legendre rule between ascending edges."""
    x, w = (
        torch.as_tensor(a, dtype=edges.dtype, device=edges.device) for a in _gauss_legendre(nodes)
    )
    width = edges.diff(dim=1)[:, :, None]
    return (edges[:, :-1, None] + width * x).flatten(1), (width * w).flatten(1)
