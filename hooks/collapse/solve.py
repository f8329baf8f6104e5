"""The exact curve of the most fragile rows, and the sigma at which it reaches a rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
_CLOSE = 1e-3  # relative width of an answer that needs nothing but the table
_NEAR = 1.5  # bounds of a trustworthy answer from the grid, over each other


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


@dataclass(frozen=True)
class Groups:
    """Rows pooled together: heads, layers, or the model.

    ``of`` is the group of each row of the table, ``keep`` whether it counts; ``counts`` are all
    rows of each group, ``left_out`` the competitors able to win that the table does not list, and
    ``sums`` the sums of the rows' probabilities at the settings' sigmas.
    """

    of: Int[np.ndarray, "row"]
    keep: Bool[np.ndarray, "row"]
    counts: Int[np.ndarray, "group"]
    left_out: Int[np.ndarray, "group"]
    sums: Float[np.ndarray, "sigma group"]


def solve_sigma_at(
    table: RowTable, settings: ProbeSettings, rate: float, groups: Groups
) -> Float[np.ndarray, "group"]:
    """Per group of rows, the sigma at which the pooled collapse probability reaches ``rate``.

    The table's rows give a lower bound of the rate, and an upper one with each competitor that it
    does not list at its cutoff. Where both give one sigma, that is the answer. Elsewhere the rate
    is the table's own and, on top, what it lacks at the sigmas of the grid, whose root is taken as
    a line between them.

    Raises:
        ValueError: the grid is too wide for that, or the rates on it are sampled.
    """

    def listed(sigma: np.ndarray) -> np.ndarray:
        """Sum of each group's probabilities at its own sigma, of what the table lists."""
        mine = np.flatnonzero(groups.keep & (sigma[groups.of] > 0))
        p = rate_of_rows(table, settings, sigma[groups.of[mine]], mine)
        total: np.ndarray = np.bincount(groups.of[mine], p, len(groups.counts))
        return total

    def solved(counts: np.ndarray, more: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Where the table's rows and ``more`` reach the rate; NaN where ``counts`` is 0."""

        def pooled(sigma: np.ndarray) -> np.ndarray:
            total = listed(sigma) + more(sigma)
            mean: np.ndarray = np.minimum(total / np.maximum(counts, 1), 1)
            return mean

        return _solve(pooled, rate, counts, settings)

    def most(sigma: np.ndarray) -> np.ndarray:
        bound: np.ndarray = groups.left_out * _bound_of_left_out(table, settings, sigma)
        return bound

    low = solved(groups.counts, np.zeros_like)
    if not groups.left_out.any():
        return low
    high = solved(groups.counts, most)
    with np.errstate(invalid="ignore"):
        apart = (low != high) & ~(np.isnan(low) | (low - high <= _CLOSE * high))
    if not apart.any():
        return low
    if settings.method != "exact":  # sums over draws less exact ones are mostly noise
        raise ValueError(
            f"sigma_at({rate:g}): wanted a table with more competitors (keep=), or method='exact', "
            f"whose rates stand in for them; got a table of the {len(table.a)} nearest and rates "
            "from draws"
        )
    counts = np.where(apart, groups.counts, 0)
    rest = _Rest(table, settings, listed, most, groups)
    line, first, last = (solved(counts, x) for x in (rest.line, rest.most, rest.least))
    first, last = np.fmax(first, high), np.fmin(last, low)
    wide = apart & (np.minimum(last, get_law(settings.law).limit) > _NEAR * first)
    if wide.any():
        at = int(np.flatnonzero(wide)[0])
        raise ValueError(
            f"sigma_at({rate:g}): wanted bounds within {_NEAR:g} times each other; got "
            f"{first[at]:.6g} and {last[at]:.6g}, because the table keeps only the "
            f"{len(table.a)} nearest competitors and the sigmas are few: probe again with more of "
            "either (keep=, sigmas=)"
        )
    return np.where(apart, np.clip(line, first, last), low)


class _Rest:
    """What the table lacks of each group's sum, from the grid: a line between sigmas, or bounds.

    Bounds where it does not turn between them. Beyond the last sigma it is at least what it is
    there, and the line goes on.
    """

    def __init__(
        self,
        table: RowTable,
        settings: ProbeSettings,
        listed: Callable[[np.ndarray], np.ndarray],
        most: Callable[[np.ndarray], np.ndarray],
        groups: Groups,
    ) -> None:
        n = len(groups.counts)
        # Below its cutoff the table lacks nothing, where factors have bounds.
        whole = float(table.cutoff) / math.sqrt(3) if settings.law == "uniform" else 0.0
        self.x, self.y = [whole], [np.zeros(n)]
        for at in np.argsort(settings.sigmas):
            sigma = np.full(n, settings.sigmas[at])
            if sigma[0] > whole:
                self.x.append(settings.sigmas[at])
                self.y.append(np.clip(groups.sums[at] - listed(sigma), 0, most(sigma)))
        self._most = most

    def _around(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each group, the values below and above its sigma, and how far between it lies."""
        x, y, group = np.asarray(self.x), np.stack(self.y), np.arange(len(sigma))
        above = np.minimum(np.searchsorted(x, sigma), len(x) - 1)
        below = np.maximum(above - 1, 0)
        width = np.where(above > below, x[above] - x[below], 1.0)
        part = np.maximum((sigma - x[below]) / width, 0)
        return y[below, group], y[above, group], part

    def line(self, sigma: np.ndarray) -> np.ndarray:
        """The root is a line between two sigmas."""
        below, above, part = self._around(sigma)
        root: np.ndarray = np.sqrt(below) + part * (np.sqrt(above) - np.sqrt(below))
        rest: np.ndarray = np.minimum(np.maximum(root, 0) ** 2, self._most(sigma))
        return rest

    def least(self, sigma: np.ndarray) -> np.ndarray:
        """The lesser of two."""
        below, above, part = self._around(sigma)
        return np.where(part >= 1, above, np.minimum(below, above))

    def most(self, sigma: np.ndarray) -> np.ndarray:
        """The greater of two; beyond the last, what the table's cutoff allows."""
        below, above, part = self._around(sigma)
        inside = np.where(part == 0, below, np.maximum(below, above))
        return np.where(sigma > self.x[-1], self._most(sigma), inside)


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
