"""What the experiment found, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.atlas.measure import NORMS
from qkvnorm_lens.experiments.core import PLAIN, traits

_PERCENT: Final = {
    "sparse rows": ("sparse share", PLAIN, 0.0),
    "sinks of these": ("sink share", PLAIN, 0.0),
    "attention to the first": ("first token's attention", PLAIN, 0.0),
    "σ at 1%": ("sigma at 1%", PLAIN, 0.0),
    "content": ("sigma at 1%", "content", 0.0),
    "loose": ("loose", PLAIN, traits.SIGMA),
    "of content": ("loose", "content", traits.SIGMA),
    "centred": ("loose", "centred gauge", traits.SIGMA),
    "strict": ("strict", PLAIN, traits.SIGMA),
    "spread": ("spread", "stream", 0.0),
    "interference": ("interference", PLAIN, 0.0),
    "first spared": ("interference", "first token spared", 0.0),
}


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """One table, a row for each model; where in depth it happens."""
    head = ["model", "norm before", "on q", "on k", "on v", *_PERCENT, "score level"]
    rows = []
    for name, mine in table.groupby("model", sort=False):
        facts = [str(mine[column].iloc[0]) for column in NORMS]
        cells = [_cell(mine, *where) for where in _PERCENT.values()]
        level = _number(mine, "score level", PLAIN, 0.0)
        rows.append([str(name), *facts, *cells, "-" if math.isnan(level) else f"{level:.3g}"])
    yield f"{core.markdown(head, rows)}\n\n{_LEGEND}\n"
    yield from _where(table)


_LEGEND: Final = (
    "Norms as the self-check finds them: one before q, k and v are made (none: there is none, or "
    "none that could be verified), and ones that follow the projections, over each head (QK-norm, "
    "QKV-Norm) or over all heads together. In percent: sparse rows (max >= 0.95) of all; sinks of "
    "these; all attention that the first token receives; the noise at which 1% of the sparse rows "
    "collapse, and of those that attend to another than the first token (never: not within the "
    "uniform law, σ up to 57.7%); collapse at σ = 10% (loose, of content rows, in the centred "
    "gauge, strict); half-width of the band that holds 90% of the lengths at the layers' inputs; "
    "content rows that move when the norm before their layer uses one scale for all tokens, with "
    "the first token frozen too and spared. Score level: mean q.k part of an attended score; rates "
    "of models with other levels compare only in the centred gauge. -: no such rows, or no such "
    "norm. Addition models read sums, the others the built-in passage."
)


def _number(mine: pd.DataFrame, quantity: str, variant: str, at: float) -> float:
    found = traits.whole(mine, quantity, variant, at)
    return float(found.iloc[0]) if len(found) else math.nan


def _cell(mine: pd.DataFrame, quantity: str, variant: str, at: float) -> str:
    value = _number(mine, quantity, variant, at)
    if math.isinf(value):
        return "never"
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _where(table: pd.DataFrame) -> Iterator[str]:
    """The layers in which a model's content rows collapse most, and depend most on lengths."""
    for name, mine in table.groupby("model", sort=False):
        said = []
        for what, quantity, variant in (
            ("collapse", "loose", "content"),
            ("interference", "interference", PLAIN),
        ):
            rows = traits.by_layer(mine, quantity, variant).dropna(subset=["value"])
            if len(rows) and rows["value"].max() > 0:
                top = rows.iloc[int(rows["value"].to_numpy().argmax())]
                among = len(np.unique(rows["layer"]))
                said.append(
                    f"{what} is largest in layer {int(top['layer'])} ({100 * top['value']:.1f}% of "
                    f"its content rows; {among} layers have such rows)"
                )
        if said:
            yield f"- {name}: {'; '.join(said)}."


def claims(table: pd.DataFrame) -> list[core.Claim]:
    """Nothing was published."""
    return []
