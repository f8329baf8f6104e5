"""The experiment's figure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import PLACEMENT_NAMES
from qkvnorm_lens.experiments.paper.accuracy import KINDS
from qkvnorm_lens.experiments.related.centring.measure import gain, gains, placements_in
from qkvnorm_lens.plots.charts import BLUE, GREY, ORANGE, log_ticks


def figure(table: pd.DataFrame) -> core.Figure:
    """Training loss with and without the fix; differences in accuracy, seed by seed."""
    placements = placements_in(table)
    fig, axes = core.panels(1, len(placements) + 1, width=3.4, height=3.1)
    for ax, placement in zip(axes, placements, strict=False):
        _curves(ax, core.pick(table, placement=placement, what="curve"))
        core.finish(ax, PLACEMENT_NAMES[placement], xlabel="step")
    axes[0].set_ylabel("training loss (nats per token)")
    core.key(axes[0], fontsize=8)
    _differences(axes[-1], table, placements)
    return fig


def _curves(ax: core.Axes, curves: pd.DataFrame) -> None:
    for fix, colour, name in ((0, BLUE, "A"), (1, ORANGE, "A - U (the fix)")):
        mine = curves[curves["fix"] == fix]
        for _, seed in mine.groupby("seed"):
            ax.plot(seed["step"], seed["value"], color=colour, linewidth=0.6, alpha=0.5)
        by = mine.groupby("step")["value"].mean()
        ax.plot(by.index, by, color=colour, linewidth=1.8, label=name)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)


def _differences(ax: core.Axes, table: pd.DataFrame, placements: list[str]) -> None:
    for i, placement in enumerate(placements):
        at = np.arange(len(KINDS)) + 0.24 * (i - (len(placements) - 1) / 2)
        for x, kind in zip(at, KINDS, strict=True):
            found = gain(table, placement, "accuracy", kind)
            name = PLACEMENT_NAMES[placement] if kind == KINDS[0] else None
            core.error_bar(ax, x, found, marker="os"[i % 2], color="k", capsize=3, label=name)
            change = gains(table, placement, "accuracy", kind)
            ax.plot([x + 0.08] * len(change), 100 * change, ".", color=GREY)
    ax.axhline(0, color=GREY, linewidth=0.9)
    ax.set_xticks(range(len(KINDS)), [k.replace(" ", "\n", 1) for k in KINDS], fontsize=8)
    core.key(ax, fontsize=8)
    core.finish(ax, "what the fix changes", ylabel="accuracy, fix minus none (points)")
