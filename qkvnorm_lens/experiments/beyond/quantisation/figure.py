"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from qkvnorm_lens.experiments.core import COLOURS, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from qkvnorm_lens.experiments.beyond.quantisation.measure import (
    LEAST_ROWS,
    TOLERATED,
    heads,
    schemes,
)


def figure(table: pd.DataFrame) -> Figure:
    """A panel per scheme: heads by the share predicted from their norm error, and really moved."""
    each = heads(table)
    each = each[each["rows"] >= LEAST_ROWS]
    named = schemes(table)
    columns = 3
    fig, axes = panels(-(-len(named) // columns), columns, width=3.4, height=3.1)
    for i, (ax, scheme) in enumerate(zip(axes, named, strict=False)):
        _draw(ax, each[each["scheme"] == scheme])
        ax.set_title(scheme, fontsize=10)
        if i % columns == 0:
            ax.set_ylabel("sparse rows moved (%)")
        if i >= len(named) - columns:
            ax.set_xlabel("predicted from the norm error (%)")
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _draw(ax: Axes, each: pd.DataFrame) -> None:
    """Points: the whole error; rings: the norm error alone, which lies near the diagonal."""
    from qkvnorm_lens.plots.charts import grid, plain

    known = {"pre": "Pre-Norm", "qkv": "QKV-Norm", "none": "No-Norm", "": "language models"}
    for placement, name in known.items():
        mine = each[each["placement"] == placement]
        if not len(mine):
            continue
        x, colour = 100 * mine["predicted_share"], COLOURS[placement]
        ax.plot(
            x,
            100 * mine["moved_norm_share"],
            "o",
            markerfacecolor="none",
            color=colour,
            alpha=0.5,
            markersize=4,
            markeredgewidth=0.6,
            label=f"{name}, norm error alone",
        )
        ax.plot(
            x,
            100 * mine["moved_share"],
            ".",
            color=colour,
            alpha=0.7,
            markersize=5,
            label=f"{name}, whole error",
        )
    ax.plot([0, 100], [0, 100], color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.1, 1, 10, 100])
        axis.set_major_formatter(plain)
    ax.set_xlim(-0.03, 100)
    ax.set_ylim(-0.03, 100)
    ax.axhline(100 * TOLERATED, color="#777777", linewidth=0.6, zorder=0)
    grid(ax)
