"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core

PUBLISHED: Final = {"Baseline": 0.11, "Alternate": 0.075, "Large": 0.055}


def disagreement(table: pd.DataFrame) -> pd.DataFrame:
    """(sampled - exact) / standard error over draws, for every model and sigma with draws.

    Where no draw moved a row, or all did the same, the error is taken from the rows: it is then
    that of independent rows, which is too small if anything.
    """
    whole = table[table["layer"] == -1]
    keys = ["model", "sigma"]
    exact, counted = (
        core.pick(whole, quantity="loose", variant=variant).set_index(keys)
        for variant in (core.PLAIN, "sampled")
    )
    sampled = counted[["value", "se"]].rename(columns={"value": "value_sampled"})
    both = exact[["value", "rows"]].join(sampled)
    both = both[both["rows"] > 0]
    gap = both["value_sampled"] - both["value"]
    independent = np.sqrt(both["value"] * (1 - both["value"]) / both["rows"])
    error = both["se"].where(both["se"] > 0, independent).astype(float)
    z = (gap / error).where(error > 0, np.where(gap.abs() < 1e-12, 0.0, np.inf))
    return pd.DataFrame({"gap": gap, "error": error, "z": z}).reset_index()


def _fact(table: pd.DataFrame, group: str, quantity: str, variant: str = core.PLAIN) -> core.Mean:
    found = core.numbers(table, quantity, group=group, variant=variant)
    over = core.share if quantity.endswith("share") else core.mean
    return over([v for v in found if math.isfinite(v)])


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Thresholds by group, and whether sampling agrees with the exact curve."""
    head = ["models", "seeds", "rows sparse", "sinks among them", "score level"]
    head += ["σ at 1%", "without sinks", "strict"]
    rows = []
    for group, mine in core.by_group(table):
        cells = [
            group,
            str(mine["seed"].nunique()),
            _fact(table, group, "sparse share").percent(),
            _fact(table, group, "sink share").percent(),
            _fact(table, group, "score level").words(".3g", ".2g"),
            *(
                _percent(table, group, "sigma at 1%", variant)
                for variant in (core.PLAIN, "without sinks", "strict")
            ),
        ]
        rows.append(cells)
    z = disagreement(table)
    worst = z.iloc[int(z["z"].abs().to_numpy().argmax())] if len(z) else None
    yield core.markdown(head, rows) + "\n"
    yield (
        "All in percent but the score level (the mean q.k part of an attended score); with "
        "95% intervals over seeds; never: not within the uniform law (σ up to 57.7%)."
    )
    if worst is not None:
        yield (
            f"Sampled and exact: {len(z)} points, {(z['z'].abs() > 2).mean():.1%} of them more "
            f"than 2 standard errors apart, the furthest {abs(worst['z']):.1f} "
            f"({worst['model']}, σ = {100 * worst['sigma']:g}%). Points of one model share their "
            "draws, so they are not independent."
        )


def _percent(table: pd.DataFrame, group: str, quantity: str, variant: str = core.PLAIN) -> str:
    chosen = core.pick(table, group=group, quantity=quantity, variant=variant)
    values = chosen["value"].to_numpy(dtype=float)
    never = int(np.isinf(values).sum())
    if never == len(values) or not len(values):
        return "never" if never else "-"
    if never:  # the others' mean alone would be too low
        least = ", ".join(f"{100 * v:.1f}" for v in sorted(values[np.isfinite(values)]))
        return f"{least}; never in {never} of {len(values)}"
    return _fact(table, group, quantity, variant).percent()


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """The published thresholds beside ours."""
    published = ", ".join(f"{100 * v:g}% ({k})" for k, v in PUBLISHED.items())
    for group, mine in core.by_group(table):
        if core.placement_of(mine) != "pre":
            continue
        ours = _percent(table, group, "sigma at 1%")
        sigma = _fact(table, group, "sigma at 1%")
        yield core.Claim(
            f"Pre-Norm: σ at which 1% of sparse rows collapse ({group})",
            published,
            f"{ours}% (score level {_fact(table, group, 'score level').value:.3g})",
            core.decide(core.within(sigma, min(PUBLISHED.values()), max(PUBLISHED.values()))),
            "the number depends on the score level (see gauge), which the paper does not give, "
            "and on the model: its three differ twofold, not in the order of their size, and "
            "ours are smaller than all of them",
            core.power(sigma, min(PUBLISHED.values()), max(PUBLISHED.values())),
        )
