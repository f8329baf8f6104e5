"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import PLACEMENT_NAMES, error_bar, panels
from qkvnorm_lens.experiments.paper.accuracy import KINDS
from qkvnorm_lens.experiments.related.centring.measure import gain, gains, placements_in
from qkvnorm_lens.plots.charts import BLUE, GREY, ORANGE, grid, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Training loss with and without the fix; differences in accuracy, seed by seed."""
    placements = placements_in(table)
    fig, axes = panels(1, len(placements) + 1, width=3.4, height=3.1)
    for ax, placement in zip(axes, placements, strict=False):
        _curves(ax, table, placement)
    axes[0].set_ylabel("training loss (nats per token)")
    axes[0].legend(fontsize=8, frameon=False)
    _differences(axes[-1], table, placements)
    for ax in axes:
        grid(ax)
    return fig


def _curves(ax: Axes, table: pd.DataFrame, placement: str) -> None:
    curves = table[(table["placement"] == placement) & (table["what"] == "curve")]
    for fix, colour, name in ((0, BLUE, "A"), (1, ORANGE, "A - U (the fix)")):
        mine = curves[curves["fix"] == fix]
        for _, seed in mine.groupby("seed"):
            ax.plot(seed["step"], seed["value"], color=colour, linewidth=0.6, alpha=0.5)
        by = mine.groupby("step")["value"].mean()
        ax.plot(by.index, by, color=colour, linewidth=1.8, label=name)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    ax.set_xlabel("step")
    ax.set_title(PLACEMENT_NAMES[placement], fontsize=10)


def _differences(ax: Axes, table: pd.DataFrame, placements: list[str]) -> None:
    for i, placement in enumerate(placements):
        marker = "os"[i % 2]
        at = np.arange(len(KINDS)) + 0.24 * (i - (len(placements) - 1) / 2)
        for x, kind in zip(at, KINDS, strict=True):
            found = gain(table, placement, "accuracy", kind)
            name = PLACEMENT_NAMES[placement] if kind == KINDS[0] else None
            error_bar(ax, x, found, marker=marker, color="k", capsize=3, label=name)
            change = gains(table, placement, "accuracy", kind)
            ax.plot([x + 0.08] * len(change), 100 * change, ".", color=GREY)
    ax.axhline(0, color=GREY, linewidth=0.9)
    ax.set_xticks(range(len(KINDS)), [k.replace(" ", "\n", 1) for k in KINDS], fontsize=8)
    ax.set_ylabel("accuracy, fix minus none (points)")
    ax.set_title("what the fix changes", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
