"""The experiment's figure."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.positions.measure import CELLS, GAPS, LEAST, cell_name
from qkvnorm_lens.plots.charts import GREY, RUNS


def figure(table: pd.DataFrame) -> core.Figure:
    """Learning curves, accuracy at the end, symmetry gaps, and how alike neighbours are."""
    fig, axes = core.panels(2, 2, width=4.6, height=3.5)
    names = core.groups(table)
    colours = dict(zip(names, RUNS, strict=False))
    _draw_curves(axes[0], table, colours)
    _draw_accuracy(axes[1], table, names, colours)
    _draw_gaps(axes[2], table, names)
    _draw_nearer(axes[3], table, colours)
    for ax in axes[1:3]:
        ax.set_xticks(range(len(names)), [CELLS.get(name, name) for name in names], fontsize=7)
        ax.set_xlim(-0.5, len(names) - 0.5)
    return fig


def _draw_curves(ax: core.Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    for group, colour in colours.items():
        for _, run in core.pick(table, quantity="loss", group=group).groupby("model"):
            ax.plot(run["at"], run["value"].clip(lower=1e-5), color=colour, linewidth=0.9)
        ax.plot([], [], color=colour, label=cell_name(group))
    labels: dict[str, Any] = {
        "xlabel": "training steps of 128 sums",
        "ylabel": "loss (nats per token)",
    }
    core.finish(ax, "learning, a line for each seed", yscale="log", **labels)
    core.key(ax)


def _draw_accuracy(
    ax: core.Axes, table: pd.DataFrame, names: list[str], colours: dict[str, str]
) -> None:
    for quantity, marker, shift in (("per token", "o", -0.15), ("exact", "s", 0.15)):
        for x, group in enumerate(names):
            seeds = core.numbers(table, quantity, group=group)
            style: dict[str, Any] = {
                "marker": marker,
                "color": colours.get(group, GREY),
                "markersize": 5,
            }
            core.error_bar(ax, x + shift, core.share(seeds), capsize=3, **style)
            ax.plot([x + shift + 0.07] * len(seeds), [100 * s for s in seeds], ".", color=GREY)
        ax.plot([], [], marker, color=GREY, label=quantity)
    core.key(ax, loc="lower left")
    title = "new sums; bars: 95% intervals, dots: seeds"
    core.finish(ax, title, ylim=(-3, 105), ylabel="accuracy at the end (%)")


def _draw_gaps(ax: core.Axes, table: pd.DataFrame, names: list[str]) -> None:
    for i, (variant, (name, marker)) in enumerate(GAPS.items()):
        style: dict[str, Any] = {"color": RUNS[i], "markersize": 4}
        for x, group in enumerate(names):
            seeds = core.numbers(table, "tv", variant=variant, group=group)
            at = x + 0.16 * (i - 1.5)
            ax.plot([at] * len(seeds), [max(s, LEAST) for s in seeds], marker, **style)
        ax.plot([], [], marker, label=name, **style)
    ax.set(yscale="log", ylim=(LEAST / 2, 3e3))  # room for the legend
    ax.set_yticks([10.0**e for e in range(-8, 1, 2)])
    core.key(ax, loc="upper center", ncols=2)
    title = "symmetry gap: the digit behind “=”"
    core.finish(ax, title, ylabel="total variation of the next token")


def _draw_nearer(ax: core.Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    for group, colour in colours.items():
        for _, run in core.pick(table, quantity="nearer", group=group).groupby("model"):
            ax.plot(run["at"] + 1, 100 * run["value"], color=colour, marker="o", markersize=3)
    ax.axhline(50, color=GREY, linewidth=0.9, linestyle="--")
    core.whole_numbers(ax)
    ax.set_xlabel("blocks passed (0: embedding)")
    title = "are neighbours alike? (dashed: no)"
    core.finish(ax, title, ylabel="pairs, the nearer more alike (%)")
