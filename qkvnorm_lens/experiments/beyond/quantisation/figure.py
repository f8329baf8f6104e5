"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.beyond.quantisation.measure import (
    LEAST_ROWS,
    TOLERATED,
    heads,
    schemes,
)
from qkvnorm_lens.experiments.core import COLOURS, Axes, Figure, legend_below, panels, percents
from qkvnorm_lens.plots.charts import GREY, grid

_COLUMNS: Final = 3
_KNOWN: Final = {
    "pre": "Pre-Norm", "qkv": "QKV-Norm", "none": "No-Norm", "qk": "QK-norm", "": "language models",
}  # fmt: skip


def figure(table: pd.DataFrame) -> Figure:
    """A panel per scheme: heads by the share predicted from their norm error, and really moved."""
    each = heads(table)
    each = each[each["rows"] >= LEAST_ROWS]
    named = schemes(table)
    fig, axes = panels(-(-len(named) // _COLUMNS), _COLUMNS, width=3.4, height=3.1)
    for i, (ax, scheme) in enumerate(zip(axes, named, strict=False)):
        _draw(ax, each[each["scheme"] == scheme])
        ax.set_title(scheme, fontsize=10)
        if i % _COLUMNS == 0:
            ax.set_ylabel("sparse rows moved (%)")
        if i >= len(named) - _COLUMNS:
            ax.set_xlabel("predicted from the norm error (%)")
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    legend_below(fig, axes[0], ncols=4, frameon=False)
    return fig


def _draw(ax: Axes, each: pd.DataFrame) -> None:
    """Points: the whole error; rings: the norm error alone, which lies near the diagonal."""
    ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 4, "markeredgewidth": 0.6}
    for placement, name in _KNOWN.items():
        mine = each[each["placement"] == placement]
        if not len(mine):
            continue
        x, colour = 100 * mine["predicted_share"], COLOURS[placement]
        alone, whole = 100 * mine["moved_norm_share"], 100 * mine["moved_share"]
        ax.plot(x, alone, "o", alpha=0.5, c=colour, label=f"{name}, norm error alone", **ring)
        ax.plot(x, whole, ".", alpha=0.7, c=colour, markersize=5, label=f"{name}, whole error")
    ax.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    percents(ax, "xy", 100)
    ax.axhline(100 * TOLERATED, color=GREY, linewidth=0.6, zorder=0)
    grid(ax)
