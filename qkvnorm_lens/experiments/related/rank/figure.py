"""The experiment's figure."""

from __future__ import annotations

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.rank.measure import SHOWN, STATES, ends, stream
from qkvnorm_lens.plots.charts import GREY, RUNS, grid


def figure(table: pd.DataFrame) -> core.Figure:
    """A row per kind of model, a column per measure; trained and at random start, by depth."""
    names = ("study models", "other addition models", "language models")
    every = zip(names, core.kinds_of_models(table), strict=True)
    kinds = [(title, mine) for title, mine in every if len(mine)]
    fig, axes = core.panels(len(kinds), len(SHOWN), width=2.5, height=2.3)
    for row, (title, mine) in enumerate(kinds):
        for column, (name, said) in enumerate(SHOWN.items()):
            ax = axes[row * len(SHOWN) + column]
            _draw(ax, mine, name)
            ax.set_ylabel(said, fontsize=9)
            if not column:
                ax.set_title(title, fontsize=10, loc="left")
            if row == len(kinds) - 1:
                ax.set_xlabel("depth (blocks)")
    core.legend_below(fig, *axes[:: len(SHOWN)], ncols=4, frameon=False)
    return fig


def _draw(ax: core.Axes, table: pd.DataFrame, measure: str) -> None:
    """Means over seeds: lines, dashed at random start; each seed's end as a dot."""
    others = iter((RUNS[6], *RUNS[3:6], GREY))
    for group, mine in core.by_group(table):
        placement = core.placement_of(mine)
        colour = core.COLOURS[placement] if placement else next(others, GREY)
        for state, line in zip(STATES, ("-", "--"), strict=True):
            some = stream(mine, state)
            if some.empty:
                continue
            by_depth = some.groupby("depth")[measure].mean()
            said = f"{core.PLACEMENT_NAMES[placement] or group}, {state}"
            ax.plot(by_depth.index, by_depth, line, color=colour, linewidth=1.4, label=said)
            if len(set(mine["model"])) > 1:
                last = ends(mine, state)
                ax.plot(last["depth"], last[measure], ".", color=colour, markersize=4)
    ax.set_ylim(0, 1.03 if measure in ("relative_mu", "mean_cosine") else None)
    core.whole_numbers(ax)
    grid(ax)
