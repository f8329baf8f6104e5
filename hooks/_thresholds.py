"""Numbers and words drawn from a CollapseReport: the sigma of a rate, and the summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from hooks.laws import get_law
from hooks.probability import collapse_probability, critical_half_width

if TYPE_CHECKING:
    from hooks.results import CollapseReport

_LARGEST = 1e6  # where a law has no limit: its rates have long settled there
_STEPS = 80
_TOLERANCE = 1e-7
_CLOSE = 1e-3  # relative width of a trustworthy answer where competitors were left out
_ROWS_AT_ONCE = 4096
_MIN_ROWS = 20  # a head with fewer sparse rows is not named in the summary


def rate_of_rows(
    report: CollapseReport,
    sigma: Float[np.ndarray, "row"],
    rows: Int[np.ndarray, "row"],
    with_rest: bool,
) -> Float[np.ndarray, "row"]:
    """Collapse probability of rows of the table (see :meth:`CollapseReport.exact_rate`)."""
    table = report.table
    out = np.zeros(len(rows))
    reach = math.sqrt(3) * sigma if report.settings.law == "uniform" else math.inf
    within = np.flatnonzero(table.half_width[rows] <= reach)
    for part in np.array_split(within, len(within) // _ROWS_AT_ONCE + 1):
        picked = rows[part]
        s, beta = table.competitors(picked)
        p = _probability(report, table.s_star[picked], s, beta, sigma[part])
        if with_rest and table.rest[picked].any():
            each = _bound_of_left_out(report, table.s_star[picked], s, beta, sigma[part])
            p = np.minimum(p + each * table.rest[picked], 1)
        out[part] = p
    return out


def _probability(
    report: CollapseReport,
    s_star: np.ndarray,
    s: np.ndarray,
    beta: np.ndarray | None,
    sigma: np.ndarray,
) -> np.ndarray:
    valid = ~np.isnan(s)
    p = collapse_probability(
        torch.tensor(s_star, dtype=torch.float64),
        torch.tensor(np.where(valid, s, 0.0)),
        torch.tensor(sigma, dtype=torch.float64),
        get_law(report.settings.law),
        valid=torch.tensor(valid),
        beta=None if beta is None else torch.tensor(beta),
        noise_on_q="q" in report.settings.on,
        noise_on_k="k" in report.settings.on,
        quick=True,
    )
    return np.asarray(p)


def _bound_of_left_out(
    report: CollapseReport,
    s_star: np.ndarray,
    s: np.ndarray,
    beta: np.ndarray | None,
    sigma: np.ndarray,
) -> np.ndarray:
    """At most this probably does one competitor win that is further away than those listed."""
    last = s[:, -1:]
    if beta is None:
        return _probability(report, s_star, last, None, sigma)
    far = critical_half_width(
        torch.tensor(s_star, dtype=torch.float64),
        torch.tensor(last),
        torch.tensor(beta[:, -1:]),
        noise_on_q="q" in report.settings.on,
        noise_on_k="k" in report.settings.on,
    )[:, 0].numpy()
    # With a bias distance orders who is able to win, not how probably.
    reach = math.sqrt(3) * sigma if report.settings.law == "uniform" else np.ones_like(sigma)
    return (far < reach).astype(float)


def solve_sigma_at(
    report: CollapseReport,
    rate: float,
    group: Int[np.ndarray, "row"],
    keep: Bool[np.ndarray, "row"],
    counts: Int[np.ndarray, "group"],
) -> Float[np.ndarray, "group"]:
    """Per group of rows, the sigma at which the pooled collapse probability reaches ``rate``."""
    n_groups = len(counts)

    def pooled(sigma: np.ndarray, upper: bool) -> np.ndarray:
        """Mean collapse probability of each group at its own sigma."""
        mine = np.flatnonzero(keep & (sigma[group] > 0))
        p = report.exact_rate(sigma[group[mine]], mine, with_rest=upper)
        total = np.bincount(group[mine], p, n_groups)
        mean: np.ndarray = total / np.maximum(counts, 1)
        return mean

    low = _solve(lambda s: pooled(s, False), rate, counts, report)
    if not report.table.rest.any():
        return low
    high = _solve(lambda s: pooled(s, True), rate, counts, report)
    with np.errstate(invalid="ignore"):
        apart = (low != high) & ~(np.isnan(low) | (np.abs(low - high) <= _CLOSE * low))
    if apart.any():
        at = int(np.flatnonzero(apart)[0])
        raise ValueError(
            f"sigma_at({rate:g}): wanted an answer within {_CLOSE:.0e}; got between "
            f"{high[at]:.6g} and {low[at]:.6g}, because each row keeps only its "
            f"{int(np.diff(report.table.start).max())} nearest competitors: "
            "probe again with more (competitors=)"
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
        return "\n".join([*lines, str(model["sites"])])
    sinks = int(report.rows[..., 1].sum())
    lines.append(
        f"{sparse} of {examined} rows are sparse ({threshold}), {percent(sinks / sparse)} of these "
        "attend to the first token (sinks)."
    )
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
    lines.append(str(model["sites"]))
    return "\n".join(lines)


def _threshold_sentence(report: CollapseReport) -> str:
    if not {"k", "q"} & set(report.settings.on) or not len(report.table):
        return "No row can collapse: this noise never moves an arg max in its own layer."
    try:
        everything, content = report.sigma_at(0.01), report.sigma_at(0.01, content=True)
    except ValueError as error:  # too few competitors kept: say so rather than guess
        return str(error)
    assert isinstance(everything, float)
    assert isinstance(content, float)
    if math.isinf(everything):
        return "1% of sparse rows never collapse within this law."
    return (
        f"1% of sparse rows collapse at sigma = {percent(everything)} "
        f"(sinks left out: {percent(content)})."
    )


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
