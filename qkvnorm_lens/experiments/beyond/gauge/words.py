"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.beyond.gauge.measure import SIGMAS, at_level
from qkvnorm_lens.experiments.core import (
    PLAIN,
    STUDY,
    Claim,
    Mean,
    groups,
    markdown,
    mean,
    numbers,
    pick,
)


def values(
    table: pd.DataFrame, group: str, quantity: str, sigma: float, variant: str = PLAIN
) -> Mean:
    """A group's rate with its interval over seeds."""
    return mean(numbers(table, quantity, group=group, sigma=sigma, variant=variant))


def own_level(table: pd.DataFrame, group: str) -> float:
    """The group's mean score level."""
    chosen = pick(table, group=group, quantity="own level", variant=PLAIN)
    return float(chosen["level"].mean())


def text(table: pd.DataFrame) -> str:
    """Own level, centred gauge and a common level side by side; pairs of groups."""
    sigma = 0.1
    names = [g for g in groups(table) if np.isfinite(own_level(table, g))]
    if not names:
        return "No sparse rows: there is no rate."
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
    lines = [
        f"Loose collapse at σ = {100 * sigma:g}%, percent of sparse rows:",
        "",
        markdown(head, rows),
        "",
        f"Score level: mean q.k part of an attended score. Centred gauge: each row's mean visible "
        f"q.k part taken away. At level {common:.3g} (the levels' geometric mean): every row moved "
        "by one constant, so that the model's level is that; patterns stay what they are.",
        "",
        *_pairs(table),
    ]
    return "\n".join(lines)


def _pairs(table: pd.DataFrame) -> list[str]:
    """What remains of the difference between the placements when the level is the same."""
    out = []
    study = [g for g in groups(table) if g.startswith(STUDY)]
    for a in study:
        for b in study:
            if a >= b:
                continue
            for sigma in SIGMAS:
                at_own = values(table, a, "own level", sigma), values(table, b, "own level", sigma)
                moved = at_level(table, a, sigma, own_level(table, b))
                centred = tuple(values(table, g, "centred gauge", sigma) for g in (a, b))
                out.append(
                    f"σ = {100 * sigma:g}%: {a} {at_own[0].percent(3)}, "
                    f"{b} {at_own[1].percent(3)}; "
                    f"{a} moved to the level of {b}: {moved.percent(3)}; centred: "
                    f"{centred[0].percent(3)} and {centred[1].percent(3)}."
                )
    return ["- " + line for line in out]


def claims(table: pd.DataFrame) -> list[Claim]:
    """Nothing was published on it; what our models say."""
    names = [g for g in groups(table) if g.startswith(STUDY)]
    if len(names) < 2:
        return []
    levels = ", ".join(f"{g.removeprefix(STUDY)} {own_level(table, g):.3g}" for g in names)
    rates = ", ".join(
        f"{g.removeprefix(STUDY)} {values(table, g, 'own level', 0.1).percent(3)} "
        f"(centred {values(table, g, 'centred gauge', 0.1).percent(3)})"
        for g in names
    )
    return [
        Claim(
            "Collapse at σ = 10% by placement, and in the centred gauge",
            "rates of models compared without their score level",
            f"score levels: {levels}; rates in percent: {rates}",
            "-",
            "rates of two models can't be compared without the level of their scores: adding a "
            "constant to a row's scores changes its rate and nothing else",
        )
    ]
