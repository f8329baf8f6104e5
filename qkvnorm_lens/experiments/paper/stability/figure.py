"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import COLOURS, PLACEMENT_NAMES, legend_below, panels
from qkvnorm_lens.plots.charts import GREY, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Loss after the run against the learning rate, a panel for each width; crosses: failed."""
    widths = sorted(table["width"].unique().tolist())
    fig, axes = panels(1, len(widths), width=3.6, height=3.2, share_y=True)
    known = float(table["frequencies"].iloc[0])
    top = 1.4 * known
    low = 0.9 * min(float(table["loss"].min()), known)
    for ax, width in zip(axes, widths, strict=True):
        _draw(ax, table[table["width"] == width], top)
        ax.axhline(known, color=GREY, linewidth=0.9, linestyle="--")
        ax.set_title(f"width {width}", fontsize=10)
        ax.set_xlabel("learning rate")
        ax.set_ylim(low, top + 0.04 * (top - low))
    axes[0].set_ylabel("loss at the end (nats per token)")
    axes[0].annotate(
        "knows only frequencies",
        (axes[0].get_xlim()[0], known),
        (4, 3),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )
    legend_below(fig, axes[0], ncols=4)
    return fig


def _draw(ax: Axes, table: pd.DataFrame, top: float) -> None:
    """A line through the seeds' means; what lies above the axis, or is no number, at its top."""
    placements = list(dict.fromkeys(table["placement"]))
    for i, placement in enumerate(placements):
        mine = table[table["placement"] == placement].assign(
            shown=lambda t: t["loss"].fillna(np.inf).clip(upper=top)
        )
        shift = 1.06 ** (i - (len(placements) - 1) / 2)  # side by side
        colour = COLOURS[placement]
        means = mine.groupby("rate")["shown"].mean()
        ax.plot(shift * means.index, means, color=colour, linewidth=1.3)
        for failed, marker, size in ((0, "o", 4), (1, "x", 7)):
            some = mine[mine["failed"] == failed]
            ax.plot(
                shift * some["rate"],
                some["shown"],
                marker,
                color=colour,
                markersize=size,
                label=f"{PLACEMENT_NAMES[placement]}{', failed' if failed else ''}",
            )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.minorticks_off()
    grid(ax)
