"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    by_group,
    error_bar,
    group_mean,
    label,
    panels,
    placement_of,
)
from qkvnorm_lens.experiments.paper.spread.measure import VECTORS, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEANING: Final = {"stream": "embeddings", "k": "keys", "v": "values"}
MARKERS: Final = {"stream": "o", "k": "s", "v": "^"}
PUBLISHED: Final = 0.20  # Baseline Pre-Norm; 0.30 for Alternate and Large


def figure(table: pd.DataFrame) -> Figure:
    """A panel per group: 5% to 95% of the weight, by layer and head; one of all bands."""
    named = by_group(table)
    n = len(named) + 1
    rows = -(-n // 4)
    columns = -(-n // rows)
    fig, axes = panels(rows, columns, width=3.1, height=2.9)
    for ax, (group, mine) in zip(axes, named, strict=False):
        _draw_group(ax, mine)
        ax.set_title(label(group, placement_of(mine)), fontsize=9)
    for i, ax in enumerate(axes[: len(named)]):
        if i % columns == 0:
            ax.set_ylabel("norm over the head's median")
    _draw_bands(axes[len(named)], named)
    for ax in axes[len(named) + 1 :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    across = 4 if columns > 2 else 2
    fig.legend(handles, names, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    return fig


def _draw_group(ax: Axes, mine: pd.DataFrame) -> None:
    """Layers as broad bars, heads as thin ones beside each other, the first token as a cross."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    from qkvnorm_lens.plots.charts import grid, plain

    colour = COLOURS[placement_of(mine)]
    layers, heads = rows_of(mine, "stream", "layer"), rows_of(mine, "stream", "head")
    depth = layers.groupby("layer")[["low", "high", "first_norm"]].mean()
    ax.bar(
        depth.index,
        depth["high"] - depth["low"],
        bottom=depth["low"],
        width=0.9,
        color=colour,
        alpha=0.25,
        label="90% of a layer's weight",
    )
    n_heads = int(heads["head"].max()) + 1
    at = heads["layer"] + 0.8 * ((heads["head"] + 0.5) / n_heads - 0.5)
    thin = 0.8 if len(heads) < 60 else 0.4
    ax.vlines(
        at, heads["low"], heads["high"], color=colour, linewidth=thin, label="90% of a head's"
    )
    ax.plot(depth.index, depth["first_norm"], "kx", markersize=5, label="first token")
    for i, edge in enumerate((1 - PUBLISHED, 1 + PUBLISHED)):
        name = "±20%, published (Baseline Pre-Norm)" if not i else None
        ax.axhline(edge, color="#777777", linewidth=0.8, linestyle=":", zorder=0, label=name)
    ax.set_yscale("log")
    shown = np.r_[0.7, 1.4, depth["first_norm"], heads["low"], heads["high"]]
    low, high = np.nanmin(shown) / 1.1, np.nanmax(shown) * 1.1
    ax.set_ylim(low, high)
    ticks = [0.01, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 10, 100, 1000]
    if high / low > 30:
        ticks = [0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100, 1000]
    ax.set_yticks([t for t in ticks if low <= t <= high])
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    grid(ax)


def _draw_bands(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Half-width of the band of each group, for embeddings, keys and values."""
    from qkvnorm_lens.plots.charts import grid

    for row, (_, mine) in enumerate(named):
        for i, of in enumerate(VECTORS):
            band = group_mean(rows_of(mine, of, "model"), "band")
            style = {"marker": MARKERS[of], "color": COLOURS[placement_of(mine)]}
            error_bar(ax, row + 0.22 * (i - 1), band, across=True, markersize=4, **style)
    for of in VECTORS:
        ax.plot([], [], MARKERS[of], color="#777777", markersize=4, label=MEANING[of])
    ax.axvline(100 * PUBLISHED, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yticks(range(len(named)), [group for group, _ in named], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("90% within ± (%)")
    ax.legend(fontsize=7, frameon=False, loc="best")
    grid(ax)
