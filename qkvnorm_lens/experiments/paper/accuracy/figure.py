"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    groups,
    label,
    legend_below,
    panels,
)
from qkvnorm_lens.experiments.paper.accuracy.measure import KINDS, PUBLISHED, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Points: seeds; bars: 95% intervals of their mean; crosses: published (another scale)."""
    fig, axes = panels(1, 2, width=4.2, height=3.4, share_y=True)
    named = (("per_token", "per token, ] counted"), ("per_token_without_end", "without ]"))
    for ax, (column, title) in zip(axes, named, strict=True):
        _draw(ax, table, column)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.grid(visible=True, axis="y", linewidth=0.5, alpha=0.5)
    axes[0].set_ylabel("accuracy (%)")
    legend_below(fig, axes[0])
    return fig


def _draw(ax: Axes, table: pd.DataFrame, column: str) -> None:
    names = groups(table)
    for i, group in enumerate(names):
        mine = table[table["group"] == group]
        placement = mine["placement"].iloc[0]
        at = np.arange(len(KINDS)) + (i - (len(names) - 1) / 2) * 0.11
        means = [over_seeds(table, group, kind, column) for kind in KINDS]
        marker = "o" if group.startswith("study") else "s"
        ax.errorbar(
            at,
            [100 * m.value for m in means],
            yerr=[100 * np.nan_to_num(m.half) for m in means],
            color=COLOURS[placement],
            marker=marker,
            markersize=4,
            linestyle="none",
            capsize=2,
            label=label(group, placement),
        )
        for x, kind in zip(at, KINDS, strict=True):
            seeds = 100 * mine[mine["kind"] == kind][column]
            ax.plot([x] * len(seeds), seeds, ".", color=COLOURS[placement], alpha=0.4, markersize=5)
    if column == "per_token":
        for placement, numbers in PUBLISHED.items():
            ax.plot(
                np.arange(len(KINDS)) + 0.42,
                [100 * numbers[kind] for kind in KINDS],
                "x",
                color=COLOURS[placement],
                label=f"{PLACEMENT_NAMES[placement]}, published (Baseline)",
            )
