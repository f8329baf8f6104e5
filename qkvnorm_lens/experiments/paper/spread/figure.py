"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.spread.measure import VECTORS, rows_of
from qkvnorm_lens.plots.charts import GREY, plain

MEANING: Final = {"stream": "embeddings", "k": "keys", "v": "values"}
MARKERS: Final = {"stream": "o", "k": "s", "v": "^"}
PUBLISHED: Final = 0.20  # Baseline Pre-Norm; 0.30 for Alternate and Large
_DOTTED: Final[dict[str, Any]] = {"color": GREY, "linewidth": 0.8, "linestyle": ":", "zorder": 0}
_TICKS: Final = (0.01, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 10, 100, 1000)
_FEW_TICKS: Final = (0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100, 1000)


def figure(table: pd.DataFrame) -> core.Figure:
    """A panel per group: 5% to 95% of the weight, by layer and head; one of all bands."""
    named = core.by_group(table)
    n = len(named) + 1
    rows = -(-n // 4)
    columns = -(-n // rows)
    fig, axes = core.panels(rows, columns, width=3.1, height=2.9)
    for i, (ax, (group, mine)) in enumerate(zip(axes, named, strict=False)):
        _draw_group(ax, mine)
        ax.set_title(core.label(group, core.placement_of(mine)), fontsize=9)
        if i % columns == 0:
            ax.set_ylabel("norm over the head's median")
    _draw_bands(axes[len(named)], named)
    for ax in axes[len(named) + 1 :]:
        ax.set_axis_off()
    core.legend_below(fig, axes[0], ncols=4 if columns > 2 else 2, frameon=False)
    return fig


def _draw_group(ax: core.Axes, mine: pd.DataFrame) -> None:
    """Layers as broad bars, heads as thin ones beside each other, the first token as a cross."""
    from matplotlib.ticker import NullFormatter

    colour = core.COLOURS[core.placement_of(mine)]
    layers, heads = rows_of(mine, "stream", "layer"), rows_of(mine, "stream", "head")
    depth = layers.groupby("layer")[["low", "high", "first_norm"]].mean()
    bar: dict[str, Any] = {"width": 0.9, "alpha": 0.25, "label": "90% of a layer's weight"}
    ax.bar(depth.index, depth["high"] - depth["low"], bottom=depth["low"], color=colour, **bar)
    at = heads["layer"] + 0.8 * ((heads["head"] + 0.5) / (int(heads["head"].max()) + 1) - 0.5)
    thin: dict[str, Any] = {
        "linewidth": 0.8 if len(heads) < 60 else 0.4,
        "label": "90% of a head's",
    }
    ax.vlines(at, heads["low"], heads["high"], color=colour, **thin)
    ax.plot(depth.index, depth["first_norm"], "kx", markersize=5, label="first token")
    ax.axhline(1 - PUBLISHED, label="±20%, published (Baseline Pre-Norm)", **_DOTTED)
    ax.axhline(1 + PUBLISHED, **_DOTTED)
    ax.set_yscale("log")
    shown = np.r_[0.7, 1.4, depth["first_norm"], heads["low"], heads["high"]]
    low, high = np.nanmin(shown) / 1.1, np.nanmax(shown) * 1.1
    ax.set_ylim(low, high)
    ax.set_yticks([t for t in (_FEW_TICKS if high / low > 30 else _TICKS) if low <= t <= high])
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(NullFormatter())
    core.whole_numbers(ax)
    core.finish(ax, xlabel="layer")


def _draw_bands(ax: core.Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Half-width of the band of each group, for embeddings, keys and values."""
    for row, (_, mine) in enumerate(named):
        for i, of in enumerate(VECTORS):
            band = core.group_mean(rows_of(mine, of, "model"), "band")
            style = {"marker": MARKERS[of], "color": core.COLOURS[core.placement_of(mine)]}
            core.error_bar(ax, row + 0.22 * (i - 1), band, across=True, markersize=4, **style)
    for of in VECTORS:
        ax.plot([], [], MARKERS[of], color=GREY, markersize=4, label=MEANING[of])
    ax.axvline(100 * PUBLISHED, **_DOTTED)
    ax.set_yticks(range(len(named)), [group for group, _ in named], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    core.key(ax, loc="best")
    core.finish(ax, xlabel="90% within ± (%)")
