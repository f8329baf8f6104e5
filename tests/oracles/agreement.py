"""Do an exact and a sampled collapse report agree? A test of a whole family of cells at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from hooks import CollapseReport

MIN_EVENTFUL_DRAWS = 10  # fewer, and the mean over draws is far from normal


@dataclass(frozen=True)
class Agreement:
    """Largest |t| over the family, its 99% bound, and what the family holds."""

    worst: float
    bound: float
    cells: int
    pooled: int
    events: float

    @property
    def holds(self) -> bool:
        return self.worst <= self.bound


def compare(exact: CollapseReport, sampled: CollapseReport, name: str = "loose") -> Agreement:
    """t statistics of (sampled - exact) per sigma and layer, errors over draws.

    A draw is the unit: rows of a head share the keys' noise. Cells with too few draws in which
    anything happened are pooled over layers, per sigma; the bound is Bonferroni's at 99%.
    """
    np.testing.assert_array_equal(exact.rows, sampled.rows)
    draws = getattr(sampled, f"{name}_draws").sum((-2, -1))  # [sigma, draw, layer] events
    wanted = getattr(exact, name).sum((-3, -2, -1))  # [sigma, layer] expected events
    n_draws = draws.shape[1]
    eventful = (draws > 0).sum(1) >= MIN_EVENTFUL_DRAWS
    statistics = []
    pooled = 0
    for i in range(len(wanted)):
        columns = [draws[i, :, j] - wanted[i, j] for j in np.flatnonzero(eventful[i])]
        rare = ~eventful[i]
        rest = draws[i][:, rare].sum(1)
        if (rest > 0).sum() >= MIN_EVENTFUL_DRAWS:
            columns.append(rest - wanted[i, rare].sum())
            pooled += 1
        else:  # next to nothing happened: next to nothing was to be expected
            assert wanted[i, rare].sum() * n_draws < 10 * MIN_EVENTFUL_DRAWS
        statistics += [c.mean() / (c.std(ddof=1) / np.sqrt(n_draws)) for c in columns]
    bound = float(stats.t.ppf(1 - 0.005 / len(statistics), n_draws - 1))
    return Agreement(
        worst=float(np.abs(statistics).max()),
        bound=bound,
        cells=len(statistics) - pooled,
        pooled=pooled,
        events=float(draws.sum()),
    )
