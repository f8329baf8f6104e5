"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from qkvnorm_lens.experiments.core import error_bar, groups, mean, numbers, panels
from qkvnorm_lens.experiments.related.positions.measure import CELLS, GAPS, LEAST, cell_name
from qkvnorm_lens.plots.charts import GREY, RUNS, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Learning curves, accuracy at the end, symmetry gaps, and how alike neighbours are."""
    fig, axes = panels(2, 2, width=4.6, height=3.5)
    names = groups(table)
    colours = dict(zip(names, RUNS, strict=False))
    _draw_curves(axes[0], table, colours)
    _draw_accuracy(axes[1], table, names, colours)
    _draw_gaps(axes[2], table, names)
    _draw_nearer(axes[3], table, colours)
    ticks = [CELLS.get(name, name) for name in names]
    for ax in axes[1:3]:
        ax.set_xticks(range(len(names)), ticks, fontsize=7)
        ax.set_xlim(-0.5, len(names) - 0.5)
    return fig


def _draw_curves(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    losses = table[table["quantity"] == "loss"]
    for group, colour in colours.items():
        mine = losses[losses["group"] == group]
        for _, run in mine.groupby("model"):
            ax.plot(run["at"], run["value"].clip(lower=1e-5), color=colour, linewidth=0.9)
        ax.plot([], [], color=colour, label=cell_name(group))
    ax.set_yscale("log")
    ax.set_xlabel("training steps of 128 sums")
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("learning, a line for each seed", fontsize=10)
    ax.legend(fontsize=7, frameon=False)
    grid(ax)


def _draw_accuracy(
    ax: Axes, table: pd.DataFrame, names: list[str], colours: dict[str, str]
) -> None:
    shown = (("per token", "o", -0.15), ("exact", "s", 0.15))
    for quantity, marker, shift in shown:
        for x, group in enumerate(names):
            seeds = numbers(table, quantity, group=group)
            style: dict[str, Any] = {"marker": marker, "color": colours.get(group, GREY)}
            error_bar(ax, x + shift, mean(seeds), capsize=3, markersize=5, **style)
            ax.plot([x + shift + 0.07] * len(seeds), [100 * s for s in seeds], ".", color=GREY)
        ax.plot([], [], marker, color=GREY, label=quantity)
    ax.set_ylim(-3, 105)
    ax.set_ylabel("accuracy at the end (%)")
    ax.set_title("new sums; bars: 95% intervals, dots: seeds", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="lower left")
    grid(ax)


def _draw_gaps(ax: Axes, table: pd.DataFrame, names: list[str]) -> None:
    for i, (variant, (name, marker)) in enumerate(GAPS.items()):
        for x, group in enumerate(names):
            seeds = numbers(table, "tv", variant=variant, group=group)
            at = x + 0.16 * (i - 1.5)
            ax.plot(
                [at] * len(seeds),
                [max(s, LEAST) for s in seeds],
                marker,
                color=RUNS[i],
                markersize=4,
            )
        ax.plot([], [], marker, color=RUNS[i], markersize=4, label=name)
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 3e3)  # room for the legend
    ax.set_yticks([10.0**e for e in range(-8, 1, 2)])
    ax.set_ylabel("total variation of the next token")
    ax.set_title("symmetry gap: the digit behind “=”", fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    grid(ax)


def _draw_nearer(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    nearer = table[table["quantity"] == "nearer"]
    for group, colour in colours.items():
        for _, run in nearer[nearer["group"] == group].groupby("model"):
            ax.plot(run["at"] + 1, 100 * run["value"], color=colour, marker="o", markersize=3)
    ax.axhline(50, color=GREY, linewidth=0.9, linestyle="--")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("blocks passed (0: embedding)")
    ax.set_ylabel("pairs, the nearer more alike (%)")
    ax.set_title("are neighbours alike? (dashed: no)", fontsize=10)
    grid(ax)
