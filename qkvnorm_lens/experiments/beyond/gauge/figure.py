"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.beyond.gauge.measure import LEVELS, SAMPLED, SIGMAS, at_level
from qkvnorm_lens.experiments.core import COLOURS, groups, label, legend_below, panels, pick
from qkvnorm_lens.plots.charts import log_ticks, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Rate against score level for each sigma; marks: models at their own level, lines: moved."""
    fig, axes = panels(1, len(SIGMAS), height=3.6)
    for ax, sigma in zip(axes, SIGMAS, strict=True):
        for i, group in enumerate(groups(table)):
            mine = table[(table["group"] == group) & (table["sigma"] == sigma)]
            placement = mine["placement"].iloc[0]
            name = label(group, placement)
            style = ("-", "--", ":", "-.")[i % 4]
            own = pick(mine, quantity="own level", variant=SAMPLED)
            at = sorted({*LEVELS, *(x for x in own["level"] if x > 0)})
            levels = [(x, at_level(table, group, sigma, x).value) for x in at]
            line = [(x, y) for x, y in levels if np.isfinite(y)]
            if not line:
                continue
            xs, ys = zip(*line, strict=True)
            ax.plot(xs, [100 * y for y in ys], style, color=COLOURS[placement], linewidth=1.1)
            ax.plot(
                own["level"],
                100 * own["value"],
                "osD^v"[i % 5],
                markersize=5,
                color=COLOURS[placement],
                label=name,
            )
        ax.set_title(f"σ = {100 * sigma:g}%", fontsize=10)
        ax.set_xscale("log")
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(1e-3, 100)
        ax.yaxis.set_major_formatter(plain)
        log_ticks(ax.xaxis)
        ax.set_xticks([2, 5, 20, 50, 200], ["2", "5", "20", "50", "200"])
        ax.set_xlabel("score level (mean attended q·k)")
        ax.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes[0].set_ylabel("sparse rows that collapse (%)")
    legend_below(
        fig,
        axes[-1],
        title="marks: at their own level; lines: all rows moved by one constant",
        title_fontsize=8,
    )
    return fig
