"""The experiment's figure."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qkvnorm_lens.experiments.beyond.caches.measure import NAMES, by_layer, recipes
from qkvnorm_lens.experiments.core import Figure, legend_below, panels
from qkvnorm_lens.plots.charts import GREY, RUNS, grid


def figure(table: pd.DataFrame) -> Figure:
    """Predicted against isolated KL, a point per layer; KL of recipes against their bits."""
    fig, axes = panels(1, 2, width=4.4, height=3.8)
    layers, judged = by_layer(table), recipes(table)
    for i, (name, mine) in enumerate(layers.groupby("format", sort=False)):
        some = mine[(mine["isolated"] > 0) & (mine["risk"] > 0)]
        colour = RUNS[i % len(RUNS)]
        axes[0].plot(some["isolated"], some["risk"], ".", c=colour, label=str(name), alpha=0.7)
    known = layers[(layers["isolated"] > 0) & (layers["risk"] > 0)][["isolated", "risk"]]
    if len(known):
        ends = [known.min().min(), known.max().max()]
        axes[0].plot(ends, ends, color=GREY, linewidth=0.8, zorder=0)
    axes[0].set(xscale="log", yscale="log", xlabel="isolated KL (nats per token)")
    axes[0].set_ylabel("cache risk (nats per token)")
    shown = ("risk", "isolated", "uniform", "ends", "mse", "entropy")
    for i, name in enumerate(shown):
        means = judged[judged["choice"] == name].groupby("budget")["kl"].mean()
        if len(means):
            line: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1}
            axes[1].plot(means.index, means, c=RUNS[i], label=NAMES[name], **line)
    axes[1].set(yscale="log", xlabel="bits per stored number", ylabel="KL on other text (nats)")
    for ax in axes:
        grid(ax)
    axes[1].legend(fontsize=7, frameon=False)
    legend_below(fig, axes[0], ncols=5, frameon=False)
    return fig
