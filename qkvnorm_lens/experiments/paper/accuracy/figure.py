"""The experiment's figure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, PUBLISHED, over_seeds


def figure(table: pd.DataFrame) -> core.Figure:
    """Points: seeds; bars: 95% intervals of their mean; crosses: published (another scale)."""
    fig, axes = core.panels(1, 2, width=4.2, height=3.4, share_y=True)
    named = (("per_token", "per token, ] counted"), ("per_token_without_end", "without ]"))
    for ax, (column, title) in zip(axes, named, strict=True):
        _draw(ax, table, column)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.grid(visible=True, axis="y", linewidth=0.5, alpha=0.5)
    axes[0].set_ylabel("accuracy (%)")
    core.legend_below(fig, axes[0])
    return fig


def _draw(ax: core.Axes, table: pd.DataFrame, column: str) -> None:
    named = core.by_group(table)
    places = np.arange(len(KINDS))
    for i, (group, mine) in enumerate(named):
        placement = mine["placement"].iloc[0]
        colour, name = core.COLOURS[placement], core.label(group, placement)
        at = places + (i - (len(named) - 1) / 2) * 0.11
        means = [over_seeds(table, group, kind, column) for kind in KINDS]
        value, sides = (100 * np.array([getattr(m, x) for m in means]) for x in ("value", "sides"))
        style = "o" if group.startswith("study") else "s"
        ax.errorbar(at, value, sides.T, fmt=style, ms=4, capsize=2, c=colour, label=name)
        for x, kind in zip(at, KINDS, strict=True):
            seeds = 100 * mine[mine["kind"] == kind][column]
            ax.plot([x] * len(seeds), seeds, ".", color=colour, alpha=0.4, markersize=5)
    if column == "per_token":
        for placement, known in PUBLISHED.items():
            name = f"{core.PLACEMENT_NAMES[placement]}, published (Baseline)"
            shown = [100 * known[kind] for kind in KINDS]
            ax.plot(places + 0.42, shown, "x", color=core.COLOURS[placement], label=name)
