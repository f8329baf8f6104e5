"""The experiment's figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.plots.charts import GREY, plain


def figure(table: pd.DataFrame) -> core.Figure:
    """Loss after the run against the learning rate, a panel for each width; crosses: failed."""
    widths = sorted(table["width"].unique().tolist())
    fig, axes = core.panels(1, len(widths), width=3.6, height=3.2, share_y=True)
    known = float(table["frequencies"].iloc[0])
    top = 1.4 * known
    low = 0.9 * min(float(table["loss"].min()), known)
    for ax, width in zip(axes, widths, strict=True):
        _draw(ax, table[table["width"] == width], top)
        ax.axhline(known, color=GREY, linewidth=0.9, linestyle="--")
        ends = (low, top + 0.04 * (top - low))
        core.finish(ax, f"width {width}", xlabel="learning rate", ylim=ends)
    axes[0].set_ylabel("loss at the end (nats per token)")
    place: dict[str, Any] = {
        "xytext": (4, 3),
        "textcoords": "offset points",
        "fontsize": 8,
        "color": GREY,
    }
    axes[0].annotate("knows only frequencies", (axes[0].get_xlim()[0], known), **place)
    core.legend_below(fig, axes[0], ncols=4)
    return fig


def _draw(ax: core.Axes, table: pd.DataFrame, top: float) -> None:
    """A line through the seeds' means; what lies above the axis, or is no number, at its top."""
    shown = table.assign(shown=table["loss"].fillna(np.inf).clip(upper=top))
    placements = list(dict.fromkeys(table["placement"]))
    for i, placement in enumerate(placements):
        mine = shown[shown["placement"] == placement]
        shift = 1.06 ** (i - (len(placements) - 1) / 2)  # side by side
        colour, name = core.COLOURS[placement], core.PLACEMENT_NAMES[placement]
        means = mine.groupby("rate")["shown"].mean()
        ax.plot(shift * means.index, means, color=colour, linewidth=1.3)
        for failed, marker, size, said in ((0, "o", 4, ""), (1, "x", 7, ", failed")):
            some = mine[mine["failed"] == failed]
            style: dict[str, Any] = {"color": colour, "markersize": size, "label": name + said}
            ax.plot(shift * some["rate"], some["shown"], marker, **style)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.minorticks_off()
