"""The experiment's figure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.gauge.measure import LEVELS, SAMPLED, SIGMAS, at_level
from qkvnorm_lens.plots.charts import log_ticks, plain


def figure(table: pd.DataFrame) -> core.Figure:
    """Rate against score level for each sigma; marks: models at their own level, lines: moved."""
    fig, axes = core.panels(1, len(SIGMAS), height=3.6)
    for ax, sigma in zip(axes, SIGMAS, strict=True):
        _draw(ax, table, sigma)
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
    title = "marks: at their own level; lines: all rows moved by one constant"
    core.legend_below(fig, axes[-1], title=title, title_fontsize=8)
    return fig


def _draw(ax: core.Axes, table: pd.DataFrame, sigma: float) -> None:
    for i, (group, mine) in enumerate(core.by_group(table)):
        placement = mine["placement"].iloc[0]
        own = core.pick(mine, sigma=sigma, quantity="own level", variant=SAMPLED)
        at = sorted({*LEVELS, *(x for x in own["level"] if x > 0)})
        rates = [at_level(table, group, sigma, x).value for x in at]
        line = [(x, 100 * rate) for x, rate in zip(at, rates, strict=True) if np.isfinite(rate)]
        if not line:
            continue
        colour, mark = core.COLOURS[placement], "osD^v"[i % 5]
        dash = ("-", "--", ":", "-.")[i % 4]
        ax.plot(*zip(*line, strict=True), dash, color=colour, linewidth=1.1)
        name = core.label(group, placement)
        ax.plot(own["level"], 100 * own["value"], mark, markersize=5, color=colour, label=name)
