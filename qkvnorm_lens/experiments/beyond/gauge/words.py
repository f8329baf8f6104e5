"""What the experiment found, in words and as claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.gauge.measure import SIGMAS, at_level


def values(
    table: pd.DataFrame, group: str, quantity: str, sigma: float, variant: str = core.PLAIN
) -> core.Mean:
    """A group's rate with its interval over seeds."""
    return core.share(core.numbers(table, quantity, group=group, sigma=sigma, variant=variant))


def own_level(table: pd.DataFrame, group: str) -> float:
    """The group's mean score level."""
    chosen = core.pick(table, group=group, quantity="own level", variant=core.PLAIN)
    return float(chosen["level"].mean())


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Own level, centred gauge and a common level side by side; pairs of groups."""
    sigma = 0.1
    names = [g for g in core.groups(table) if np.isfinite(own_level(table, g))]
    if not names:
        yield "No sparse rows: there is no rate."
        return
    common = float(np.exp(np.mean([math.log(max(own_level(table, g), 1.0)) for g in names])))
    head = ["models", "seeds", "score level", "rate at its own level", "without sinks"]
    head += ["centred gauge", f"all at level {common:.3g}"]
    rows = []
    for group in names:
        own = values(table, group, "own level", sigma)
        cells = [
            group,
            str(own.n),
            f"{own_level(table, group):.3g}",
            own.percent(3),
            values(table, group, "own level", sigma, "without sinks").percent(3),
            values(table, group, "centred gauge", sigma).percent(3),
            at_level(table, group, sigma, common).percent(3),
        ]
        rows.append(cells)
    yield f"Loose collapse at σ = {100 * sigma:g}%, percent of sparse rows:\n"
    yield core.markdown(head, rows)
    yield (
        "\nScore level: mean q.k part of an attended score. Centred gauge: each row's mean visible "
        f"q.k part taken away. At level {common:.3g} (the levels' geometric mean): every row moved "
        "by one constant, so that the model's level is that; patterns stay what they are.\n"
    )
    yield from _pairs(table)


def _pairs(table: pd.DataFrame) -> Iterator[str]:
    """What remains of the difference between the placements when the level is the same."""
    study = [g for g in core.groups(table) if g.startswith(core.STUDY)]
    for a, b, sigma in itertools.product(study, study, SIGMAS):
        if a < b:
            x, y = (values(table, g, "own level", sigma).percent(3) for g in (a, b))
            moved = at_level(table, a, sigma, own_level(table, b)).percent(3)
            centred = [values(table, g, "centred gauge", sigma).percent(3) for g in (a, b)]
            yield (
                f"- σ = {100 * sigma:g}%: {a} {x}, {b} {y}; {a} moved to the level of {b}: "
                f"{moved}; centred: {' and '.join(centred)}."
            )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Nothing was published on it; what our models say."""
    names = [g for g in core.groups(table) if g.startswith(core.STUDY)]
    if len(names) < 2:
        return
    levels = ", ".join(f"{g.removeprefix(core.STUDY)} {own_level(table, g):.3g}" for g in names)
    rates = ", ".join(
        f"{g.removeprefix(core.STUDY)} {values(table, g, 'own level', 0.1).percent(3)} "
        f"(centred {values(table, g, 'centred gauge', 0.1).percent(3)})"
        for g in names
    )
    yield core.Claim(
        "Collapse at σ = 10% by placement, and in the centred gauge",
        "rates of models compared without their score level",
        f"score levels: {levels}; rates in percent: {rates}",
        "-",
        "rates of two models can't be compared without the level of their scores: adding a "
        "constant to a row's scores changes its rate and nothing else",
    )
