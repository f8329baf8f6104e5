"""The exact curve of the most fragile rows, and the sigma at which it reaches a rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from hooks.collapse.settings import ProbeSettings
from hooks.collapse.table import RowTable
from hooks.kernels import LAW_CODES, table_rates
from hooks.noise import collapse_probability, get_law

_LARGEST = 1e6  # where a law has no limit: its rates have long settled there
_STEPS = 80
_TOLERANCE = 1e-7
_CLOSE = 1e-3  # relative width of a trustworthy answer where competitors were left out


def rate_of_rows(
    table: RowTable,
    settings: ProbeSettings,
    sigma: Float[np.ndarray, "row"],
    rows: Int[np.ndarray, "row"],
) -> Float[np.ndarray, "row"]:
    """Collapse probability of rows of the table (see :meth:`CollapseReport.exact_rate`)."""
    out = np.zeros(len(rows))

    def part(at: np.ndarray) -> None:
        p = np.zeros(len(at))
        table_rates(
            LAW_CODES[settings.law],
            table.s_star,
            table.start,
            table.s,
            table.beta,
            rows[at].astype(np.int64),
            sigma[at].astype(np.float64),
            "q" in settings.on,
            "k" in settings.on,
            p,
        )
        out[at] = p

    pieces = np.array_split(np.arange(len(rows)), max(1, torch.get_num_threads()))
    with ThreadPoolExecutor(len(pieces)) as pool:
        list(pool.map(part, pieces))
    return out


def _bound_of_left_out(
    table: RowTable, settings: ProbeSettings, sigma: Float[np.ndarray, "group"]
) -> Float[np.ndarray, "group"]:
    """Upper bound of the probability that one competitor that the table does not list wins."""
    cutoff, law = float(table.cutoff), get_law(settings.law)
    uniform = law.name == "uniform"
    able = math.sqrt(3) * sigma > cutoff if uniform else sigma > 0
    if len(table.beta):  # distance orders who is able to win, not how probably
        return able.astype(float)
    if not able.any():
        return np.zeros_like(sigma)
    near = torch.full((len(sigma), 1), (1 - cutoff) / (1 + cutoff), dtype=torch.float64)
    p = collapse_probability(
        torch.ones(len(sigma), dtype=torch.float64), near, torch.from_numpy(sigma.copy()), law
    )
    return np.asarray(p)


def solve_sigma_at(
    table: RowTable,
    settings: ProbeSettings,
    rate: float,
    group: Int[np.ndarray, "row"],
    keep: Bool[np.ndarray, "row"],
    counts: Int[np.ndarray, "group"],
    left_out: Int[np.ndarray, "group"],
) -> Float[np.ndarray, "group"]:
    """Per group of rows, the sigma at which the pooled collapse probability reaches ``rate``.

    ``left_out`` counts the competitors able to win that did not fit into the table: the rate is at
    most what they add, each at the cutoff.
    """
    n_groups = len(counts)

    def pooled(sigma: np.ndarray, upper: bool) -> np.ndarray:
        """Mean collapse probability of each group at its own sigma."""
        mine = np.flatnonzero(keep & (sigma[group] > 0))
        p = rate_of_rows(table, settings, sigma[group[mine]], mine)
        total = np.bincount(group[mine], p, n_groups)
        if upper:
            total = total + left_out * _bound_of_left_out(table, settings, sigma)
        mean: np.ndarray = np.minimum(total / np.maximum(counts, 1), 1)
        return mean

    low = _solve(lambda s: pooled(s, False), rate, counts, settings)
    if not left_out.any():
        return low
    high = _solve(lambda s: pooled(s, True), rate, counts, settings)
    with np.errstate(invalid="ignore"):
        apart = (low != high) & ~(np.isnan(low) | (low - high <= _CLOSE * high))
    if apart.any():
        at = int(np.flatnonzero(apart)[0])
        raise ValueError(
            f"sigma_at({rate:g}): wanted an answer within {_CLOSE:.0e}; got between "
            f"{high[at]:.6g} and {low[at]:.6g}, because the table keeps only the "
            f"{len(table.a)} nearest competitors: probe again with more (keep=)"
        )
    return low


def _solve(
    rates: Callable[[np.ndarray], np.ndarray],
    rate: float,
    counts: Int[np.ndarray, "group"],
    settings: ProbeSettings,
) -> Float[np.ndarray, "group"]:
    """Bracketed root of sqrt(rate(sigma)) - sqrt(rate): nearly a line, as P ~ (a - a_c)^2."""
    law = get_law(settings.law)
    limit = _LARGEST if math.isinf(law.limit) else law.limit
    end = limit if law.limit_included else limit * (1 - 1e-12)

    def miss(sigma: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(rates(sigma)) - math.sqrt(rate))

    # The whole grid costs as much as a few steps of the search and brackets every group at once.
    grid = [s for s in settings.sigmas if 0 < s < end] + [end]
    lo, hi = np.zeros(len(counts)), np.full(len(counts), end)
    f_lo, f_hi = np.full(len(counts), -math.sqrt(rate)), np.full(len(counts), -1.0)
    open_ = counts > 0
    for sigma in sorted(grid):
        if not open_.any():
            break
        f = miss(np.where(open_, sigma, 0.0))
        found = open_ & (f >= 0)
        hi[found], f_hi[found] = sigma, f[found]
        open_ &= ~found
        lo[open_], f_lo[open_] = sigma, f[open_]
    out = np.where(counts > 0, np.where(open_, math.inf, hi), math.nan)
    active = (counts > 0) & ~open_
    for step in range(_STEPS):
        active &= (hi - lo) > _TOLERANCE * hi
        if not active.any():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            x = (lo * f_hi - hi * f_lo) / (f_hi - f_lo)
        width = hi - lo
        # A step that hugs one end leaves the bracket wide: stay off the ends, bisect now and then.
        x = np.clip(np.nan_to_num(x), lo + 1e-3 * width, hi - 1e-3 * width)
        x = np.where(step % 4 == 3, (lo + hi) / 2, x)
        f = miss(np.where(active, x, 0.0))
        up, down = active & (f >= 0), active & (f < 0)
        near = active & (np.abs(f) < 1e-12)
        hi[up], f_hi[up] = x[up], f[up]
        lo[down], f_lo[down] = x[down], f[down]
        f_lo[up] *= 0.5  # Illinois: the end that stays counts less each time
        f_hi[down] *= 0.5
        lo[near], hi[near] = x[near], x[near]
    solved = (counts > 0) & ~open_
    return np.where(solved, hi, out)


def error_of_crossing(
    sigmas: Sequence[float],
    sums: Float[np.ndarray, "sigma group"],
    errors: Float[np.ndarray, "sigma group"],
    rate: float,
    counts: Int[np.ndarray, "group"],
) -> Float[np.ndarray, "group"]:
    """Per group, the standard error of :func:`first_crossing` from those of the rates.

    NaN where no sigma reaches the rate.
    """
    x, before, at, part = _crossing(sigmas, sums, rate, counts)
    group = np.arange(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(np.vstack([np.zeros(len(counts)), sums / np.maximum(counts, 1)]))
        of_root = np.vstack([np.full(len(counts), np.nan), errors]) / (2 * root)
        below, above = of_root[before, group], of_root[at, group]
        error = np.where(root[before, group] > 0, below + part * (above - below), above)
        slope = (root[at, group] - root[before, group]) / (x[at] - x[before])
        return np.where((at > 0) & (counts > 0), error / slope, math.nan)


def first_crossing(
    sigmas: Sequence[float],
    sums: Float[np.ndarray, "sigma group"],
    rate: float,
    counts: Int[np.ndarray, "group"],
) -> Float[np.ndarray, "group"]:
    """Per group, where its rate first reaches ``rate``, from sums of probabilities on a grid.

    The root of the rate is taken as a line between two sigmas, the first of them 0. inf where none
    reaches it, NaN without rows.
    """
    x, before, at, part = _crossing(sigmas, sums, rate, counts)
    with np.errstate(invalid="ignore"):
        found = x[before] + part * (x[at] - x[before])
    return np.where(counts == 0, math.nan, np.where(at > 0, found, math.inf))


def _crossing(
    sigmas: Sequence[float], sums: np.ndarray, rate: float, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """0 and the sigmas; of each group the two around the crossing, and how far between it lies."""
    x = np.array([0.0, *sigmas])
    y = np.sqrt(np.vstack([np.zeros(len(counts)), sums / np.maximum(counts, 1)]))
    wanted = math.sqrt(rate)
    at = np.argmax(y >= wanted, axis=0)  # 0 where there is none: y begins at 0
    before, group = np.maximum(at - 1, 0), np.arange(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (wanted - y[before, group]) / (y[at, group] - y[before, group])
    return x, before, at, part
