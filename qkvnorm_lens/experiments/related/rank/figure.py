"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    STUDY,
    by_group,
    panels,
    placement_of,
)
from qkvnorm_lens.experiments.related.rank.measure import SHOWN, STATES, ends, stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """A row per kind of model, a column per measure; trained and at random start, by depth."""
    kinds = _kinds(table)
    fig, axes = panels(len(kinds), len(SHOWN), width=2.5, height=2.3)
    for row, (title, mine) in enumerate(kinds):
        for column, (name, said) in enumerate(SHOWN.items()):
            ax = axes[row * len(SHOWN) + column]
            _draw(ax, mine, name)
            ax.set_ylabel(said, fontsize=9)
            if not column:
                ax.set_title(title, fontsize=10, loc="left")
            if row == len(kinds) - 1:
                ax.set_xlabel("depth (blocks)")
    shown: dict[str, Any] = {}
    for row in range(len(kinds)):
        handles, names = axes[row * len(SHOWN)].get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    fig.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    return fig


def _kinds(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    study = table["group"].str.startswith(STUDY)
    language = table["placement"].fillna("").eq("")
    named = (
        ("study models", study),
        ("other addition models", ~study & ~language),
        ("language models", language),
    )
    return [(title, table[which]) for title, which in named if which.any()]


def _draw(ax: Axes, table: pd.DataFrame, measure: str) -> None:
    """Means over seeds: lines, dashed at random start; each seed's end as a dot."""
    from matplotlib.ticker import MaxNLocator

    from qkvnorm_lens.plots.charts import GREY, RUNS, grid

    others = iter((RUNS[6], *RUNS[3:6], GREY))
    for group, mine in by_group(table):
        placement = placement_of(mine)
        colour = COLOURS[placement] if placement else next(others, GREY)
        for state, line in zip(STATES, ("-", "--"), strict=True):
            some = stream(mine, state)
            if some.empty:
                continue
            by_depth = some.groupby("depth")[measure].mean()
            name = PLACEMENT_NAMES[placement] or group
            said = f"{name}, {state}"
            ax.plot(by_depth.index, by_depth, line, color=colour, linewidth=1.4, label=said)
            if len(set(mine["model"])) > 1:
                last = ends(mine, state)
                ax.plot(last["depth"], last[measure], ".", color=colour, markersize=4)
    ax.set_ylim(bottom=0)
    if measure in ("relative_mu", "mean_cosine"):
        ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid(ax)
