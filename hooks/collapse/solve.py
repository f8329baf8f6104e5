"""Numbers and words drawn from a CollapseReport: the sigma of a rate, and the summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from hooks.noise import collapse_probability, get_law
from hooks.reports import told

if TYPE_CHECKING:
    from hooks.collapse.report import CollapseReport

_LARGEST = 1e6  # where a law has no limit: its rates have long settled there
_STEPS = 80
_TOLERANCE = 1e-7
_CLOSE = 1e-3  # relative width of a trustworthy answer where competitors were left out
_MIN_ROWS = 20  # a head with fewer sparse rows is not named in the summary


def rate_of_rows(
    report: CollapseReport,
    sigma: Float[np.ndarray, "row"],
    rows: Int[np.ndarray, "row"],
) -> Float[np.ndarray, "row"]:
    """Collapse probability of rows of the table (see :meth:`CollapseReport.exact_rate`)."""
    from hooks.kernels import LAW_CODES, table_rates

    table, on = report.table, report.settings.on
    out = np.zeros(len(rows))

    def part(at: np.ndarray) -> None:
        p = np.zeros(len(at))
        table_rates(
            LAW_CODES[report.settings.law],
            table.s_star,
            table.start,
            table.s,
            table.beta,
            rows[at].astype(np.int64),
            sigma[at].astype(np.float64),
            "q" in on,
            "k" in on,
            p,
        )
        out[at] = p

    pieces = np.array_split(np.arange(len(rows)), max(1, torch.get_num_threads()))
    with ThreadPoolExecutor(len(pieces)) as pool:
        list(pool.map(part, pieces))
    return out


def _bound_of_left_out(
    report: CollapseReport, sigma: Float[np.ndarray, "group"]
) -> Float[np.ndarray, "group"]:
    """At most this probably does one competitor win that the table does not list."""
    cutoff, law = float(report.table.cutoff), get_law(report.settings.law)
    uniform = law.name == "uniform"
    able = math.sqrt(3) * sigma > cutoff if uniform else sigma > 0
    if len(report.table.beta):  # distance orders who is able to win, not how probably
        return able.astype(float)
    if not able.any():
        return np.zeros_like(sigma)
    near = torch.full((len(sigma), 1), (1 - cutoff) / (1 + cutoff), dtype=torch.float64)
    p = collapse_probability(
        torch.ones(len(sigma), dtype=torch.float64), near, torch.from_numpy(sigma.copy()), law
    )
    return np.asarray(p)


def solve_sigma_at(
    report: CollapseReport,
    rate: float,
    group: Int[np.ndarray, "row"],
    keep: Bool[np.ndarray, "row"],
    counts: Int[np.ndarray, "group"],
    left_out: Int[np.ndarray, "group"],
) -> Float[np.ndarray, "group"]:
    """Per group of rows, the sigma at which the pooled collapse probability reaches ``rate``.

    ``left_out`` counts the competitors able to win that the table had no room for: they bound the
    rate from above by what all of them add, each at the cutoff.
    """
    n_groups = len(counts)

    def pooled(sigma: np.ndarray, upper: bool) -> np.ndarray:
        """Mean collapse probability of each group at its own sigma."""
        mine = np.flatnonzero(keep & (sigma[group] > 0))
        p = report.exact_rate(sigma[group[mine]], mine)
        total = np.bincount(group[mine], p, n_groups)
        if upper:
            total = total + left_out * _bound_of_left_out(report, sigma)
        mean: np.ndarray = np.minimum(total / np.maximum(counts, 1), 1)
        return mean

    low = _solve(lambda s: pooled(s, False), rate, counts, report)
    if not left_out.any():
        return low
    high = _solve(lambda s: pooled(s, True), rate, counts, report)
    with np.errstate(invalid="ignore"):
        apart = (low != high) & ~(np.isnan(low) | (low - high <= _CLOSE * high))
    if apart.any():
        at = int(np.flatnonzero(apart)[0])
        raise ValueError(
            f"sigma_at({rate:g}): wanted an answer within {_CLOSE:.0e}; got between "
            f"{high[at]:.6g} and {low[at]:.6g}, because the table keeps only the "
            f"{len(report.table.a)} nearest competitors: probe again with more (keep=)"
        )
    return low


def _solve(
    rates: Callable[[np.ndarray], np.ndarray],
    rate: float,
    counts: Int[np.ndarray, "group"],
    report: CollapseReport,
) -> Float[np.ndarray, "group"]:
    """Bracketed root of sqrt(rate(sigma)) - sqrt(rate): nearly a line, as P ~ (a - a_c)^2."""
    law = get_law(report.settings.law)
    limit = _LARGEST if math.isinf(law.limit) else law.limit
    end = limit if law.limit_included else limit * (1 - 1e-12)

    def miss(sigma: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(rates(sigma)) - math.sqrt(rate))

    # The whole grid costs as much as a few steps of the search and brackets every group at once.
    grid = [s for s in report.settings.sigmas if 0 < s < end] + [end]
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


def percent(x: float) -> str:
    """A share as text: 7.9%, never reached, or no rows."""
    if math.isnan(x):
        return "no rows"
    if math.isinf(x):
        return "never"
    return f"{100 * x:.2g}%" if x < 0.0995 else f"{100 * x:.3g}%"


def summarise(report: CollapseReport) -> str:
    """The report in a few sentences (see :meth:`CollapseReport.summary`)."""
    settings, model = report.settings, report.model
    n_prompts, n_tokens = len(report.tokens), sum(map(len, report.tokens))
    examined, sparse = int(report.examined.sum()), report.n_sparse
    lines = [
        f"{model['name']}: {n_prompts} prompt{'s' * (n_prompts != 1)}, {n_tokens} tokens, "
        f"{len(settings.layers)} attention layers; {settings.law} noise on the norms of "
        f"{', '.join(settings.on)}, one layer at a time."
    ]
    threshold = f"max a >= {settings.sparse:g}"
    if sparse == 0:
        lines.append(
            f"No sparse row: none of the {examined} attention rows has {threshold}, so there is "
            "no single attended token to lose. That is not stability: how non-sparse attention "
            "changes is not measured here."
        )
        return "\n".join([*lines, told(model)])
    sinks = int(report.rows[..., 1].sum())
    lines.append(
        f"{sparse} of {examined} rows are sparse ({threshold}), {percent(sinks / sparse)} of these "
        "attend to the first token (sinks)."
    )
    if sparse < _MIN_ROWS:
        lines.append(f"Fewer than {_MIN_ROWS} sparse rows: too few to say how stable the model is.")
    lines.append(_threshold_sentence(report))
    named = _first_head(report)
    if named:
        lines.append(named)
    frame = report.to_frame("model")
    middle = frame.iloc[(frame["sigma"] - 0.1).abs().argmin()]
    level = frame["score_level"].iloc[0]
    lines.append(
        f"At sigma = {percent(middle['sigma'])}: {percent(middle['loose'])} of the sparse rows "
        f"collapse, {percent(middle['loose_centred'])} in the centred gauge (mean score level "
        f"{level:.3g}; rates of models with other levels compare only there)."
    )
    lines.append(told(model))
    return "\n".join(lines)


def _threshold_sentence(report: CollapseReport) -> str:
    if not len(report.table) and "k" in report.settings.on:
        return "None of them can collapse: no factors of this law move their arg max."
    if not {"k", "q"} & set(report.settings.on) or not len(report.table):
        return "No row can collapse: this noise never moves an arg max in its own layer."
    everything, content = _one_percent(report, "loose"), _one_percent(report, "loose_content")
    if everything == percent(math.inf):
        return "1% of sparse rows never collapse within this law."
    return f"1% of sparse rows collapse at sigma = {everything} (sinks left out: {content})."


def _one_percent(report: CollapseReport, rate: str) -> str:
    """The sigma at which 1% of the rows collapse or, from the grid, two between which it lies."""
    try:
        sigma = report.sigma_at(0.01, content=rate == "loose_content")
    except ValueError:  # the table has no room for those that decide it
        frame = report.to_frame("model")
        reached = frame["sigma"][frame[rate] >= 0.01]
        if not len(reached):
            return f"more than {percent(frame['sigma'].iloc[-1])}"
        below = frame["sigma"][frame["sigma"] < reached.iloc[0]]
        low = percent(below.iloc[-1]) if len(below) else "0"
        return f"{low} to {percent(reached.iloc[0])} (keep= more of the table for one number)"
    assert isinstance(sigma, float)
    return percent(sigma)


def _first_head(report: CollapseReport) -> str:
    """The head whose sparse rows go first, among those with enough of them."""
    import pandas as pd

    if not {"k", "q"} & set(report.settings.on) or not len(report.table):
        return ""
    try:
        sigma = report.sigma_at(0.01, by="head")
    except ValueError:
        return ""
    assert isinstance(sigma, pd.DataFrame)
    counts = report.rows.sum((-1, -2))
    values = np.where(counts >= _MIN_ROWS, sigma.to_numpy(), np.nan)
    if not np.isfinite(values).any():
        return ""
    layer, head = np.unravel_index(int(np.nanargmin(values)), values.shape)
    name = f"{report.model['labels'][layer]}H{head}"
    return (
        f"First head (of those with {_MIN_ROWS} sparse rows or more): {name}, 1% of its "
        f"{int(counts[layer, head])} at sigma = {percent(float(values[layer, head]))}."
    )
