"""The experiment's figure."""

from __future__ import annotations

from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import PLAIN, traits
from qkvnorm_lens.plots.charts import RUNS, plain

PANELS: Final = {
    "rows that are sparse (%)": ("sparse share", PLAIN),
    "sparse rows that are sinks (%)": ("sink share", PLAIN),
    "score level": ("score level", PLAIN),
    "content rows that collapse at σ = 10% (%)": ("loose", "content"),
    "sparse rows, centred gauge, σ = 10% (%)": ("loose", "centred gauge"),
    "content rows, interference (%)": ("interference", PLAIN),
    "lengths: 90% within ± (%)": ("spread", "stream"),
    "attention to the first token (%)": ("first token's attention", PLAIN),
}
_COLUMNS: Final = 4


def figure(table: pd.DataFrame) -> core.Figure:
    """A panel for each quantity, a line for each model, by relative depth."""
    fig, axes = core.panels(-(-len(PANELS) // _COLUMNS), _COLUMNS, width=3.0, height=2.7)
    looks = _looks(table)
    for i, (ax, (name, where)) in enumerate(zip(axes, PANELS.items(), strict=True)):
        for group, mine in core.by_group(table):
            colour, line = looks[group]
            rows = traits.by_layer(mine, *where)
            for j, (_, one) in enumerate(rows.groupby("model", sort=False)):
                depth = one["layer"] / max(one["layer"].max(), 1)
                value = one["value"] * (1 if "%" not in name else 100)
                said = group if not j else None
                ax.plot(depth, value, line, color=colour, label=said, linewidth=1, marker=".",
                        markersize=3)  # fmt: skip
        where_at = "depth (first to last layer)" if i >= len(axes) - _COLUMNS else ""
        core.finish(ax, name, size=8, xlabel=where_at)
        _scale(ax, name)
    core.legend_below(fig, axes[0], ncols=4, frameon=False)
    return fig


def _scale(ax: core.Axes, name: str) -> None:
    """Rates and levels of models differ by orders of magnitude; shares do not."""
    if "collapse" in name or "gauge" in name:
        core.percents(ax, "y", 100)
    elif name == "score level":
        ax.set_yscale("symlog", linthresh=10)
        ax.yaxis.set_major_formatter(plain)
    elif name.startswith("lengths"):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(plain)
    else:
        ax.set_ylim(bottom=0)


def _looks(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour by placement and line by kind of model; other people's models have colours left."""
    others = iter(RUNS[i] for i in (6, 4, 5) * len(core.groups(table)))
    looks = {}
    for group, mine in core.by_group(table):
        placement = core.placement_of(mine)
        colour = core.COLOURS[placement] if placement else next(others)
        looks[group] = (colour, "-" if core.is_language(mine) else "--")
    return looks
