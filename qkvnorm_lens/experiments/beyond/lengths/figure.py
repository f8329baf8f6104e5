"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.lengths.measure import FROZEN, measured, of
from qkvnorm_lens.plots.charts import RUNS, log_ticks

_STYLES: Final = dict(zip(FROZEN, ("o-", "s--", "^-", "v:"), strict=True))


def figure(table: pd.DataFrame) -> core.Figure:
    """By layer, of each group's first model: lengths, shares, rows that move, and the output."""
    named = core.by_group(measured(table))
    if not named:
        fig, axes = core.panels(1, 1, width=5.0, height=1.2)
        axes[0].text(0.5, 0.5, "No norm in front of the attention", ha="center", va="center")
        axes[0].set_axis_off()
        return fig
    fig, axes = core.panels(len(named), 4, width=3.0, height=2.6)
    for row, (group, mine) in enumerate(named):
        one = mine[mine["model"] == mine["model"].iloc[0]]
        _draw(axes[4 * row : 4 * row + 4], group, one)
    core.legend_below(fig, axes[2], ncols=4, title="frozen of a token's length", title_fontsize=8)
    return fig


def _draw(axes: list[core.Axes], group: str, mine: pd.DataFrame) -> None:
    layers = of(mine, "all", layers=True)
    x = layers["layer"].to_numpy()
    size, share, moved, output = axes
    for column, name, style in (
        ("first_length", "first token", "o-"),
        ("longest_length", "longest other", "s--"),
    ):
        size.plot(x, layers[column], style, color=RUNS[0], markersize=3, label=name)
    size.set_yscale("log")
    for column, name, style in (
        ("first_share", "of the first token", "o-"),
        ("share", "of the others", "s--"),
    ):
        share.plot(x, 100 * layers[column], style, color=RUNS[1], markersize=3, label=name)
    share.set_ylim(0, 103)
    for i, (frozen, style) in enumerate(_STYLES.items()):
        some = of(mine, frozen, layers=True)
        options: dict[str, Any] = {"color": RUNS[i % len(RUNS)], "markersize": 3, "linewidth": 1.0}
        moved.plot(x, 100 * some["moved_content"], style, label=frozen, **options)
        output.plot(x, np.maximum(some["kl"].astype(float), 1e-6), style, **options)
    moved.set_ylim(-3, 103)
    output.set_yscale("log")
    log_ticks(size.yaxis)
    for ax in axes:
        core.whole_numbers(ax)
        ax.set_xlim(x.min() - 0.5, x.max() + 0.5)
    for ax in (size, share):
        core.key(ax, fontsize=7)
    title: dict[str, Any] = {"size": 9, "xlabel": "layer"}
    core.finish(size, group, ylabel="length / median", **title)
    core.finish(share, "squared length", ylabel="outlier dimensions (%)", **title)
    core.finish(moved, "content rows", ylabel="that move (%)", **title)
    core.finish(output, "output", ylabel="KL (nats per token)", **title)
