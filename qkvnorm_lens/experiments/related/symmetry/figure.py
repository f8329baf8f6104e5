"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.symmetry.measure import (
    LAYERS,
    PLACEMENTS,
    SKIPS,
    VARIANTS,
    constructed,
    nearer_stream,
    random_kinds,
    trained,
)
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE

COLOURS: Final = dict(zip(VARIANTS, ("#000000", BLUE, ORANGE, GREEN), strict=True))
MARKERS: Final = dict(zip(VARIANTS, "osD^", strict=True))
LEAST: Final = 1e-8  # of the figure's logarithmic axes


def deepest(table: pd.DataFrame) -> str:
    """The group of the model with most layers."""
    rows = trained(table)
    return str(rows.nlargest(1, "layers")["group"].iloc[0]) if len(rows) else ""


def figure(table: pd.DataFrame) -> core.Figure:
    """Total variation by model, of random models by depth; one by layer; neighbours of all."""
    fig, axes = core.panels(2, 2, width=4.6, height=3.5)
    _draw_models(axes[0], core.by_group(core.pick(trained(table), by="variant")))
    _draw_constructed(axes[1], constructed(table))
    group = deepest(table)
    _draw_depth(axes[2], core.pick(table, group=group, by="layer"), group)
    _draw_neighbours(axes[3], table)
    _legend(fig, table)
    return fig


def _legend(fig: core.Figure, table: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[v], marker=MARKERS[v], markersize=4, linewidth=1.2, label=v)
        for v in VARIANTS
        if (table["variant"] == v).any()
    ]
    rounding: dict[str, Any] = {
        "marker": "_",
        "markersize": 10,
        "linestyle": "none",
        "label": "rounding",
    }
    handles.append(Line2D([], [], color=GREY, **rounding))
    core.legend_below(fig, handles=handles, ncols=5, frameon=False)


def _rows(ax: core.Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()


def _draw_models(ax: core.Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    for row, (_, mine) in enumerate(named):
        for i, variant in enumerate(VARIANTS):
            of = mine[mine["variant"] == variant]
            y, tv = [row + 0.18 * (i - 1.5)] * len(of), of["tv"].clip(lower=LEAST)
            ax.plot(of["floor_tv"].clip(lower=LEAST), y, "|", color=GREY, markersize=6)
            ax.plot(tv, y, MARKERS[variant], color=COLOURS[variant], markersize=3.5)
    _rows(ax, [group for group, _ in named])
    ax.set(xscale="log", xlim=(LEAST / 2, 2))
    ax.set_xlabel("total variation of the next token (0 to 1)")
    core.finish(ax, "models, earlier tokens permuted")


def _draw_constructed(ax: core.Axes, rows: pd.DataFrame) -> None:
    """Squares: mask, diamonds: none; filled: with skip connections, open: without."""
    for variant in ("as is", "mask removed"):
        for i, skip in enumerate(SKIPS):
            for j, placement in enumerate(PLACEMENTS):
                of = core.pick(rows, variant=variant, skip=skip, placement=placement)
                at = np.array([LAYERS.index(n) for n in of["layers"]])
                x, tv = at + 0.12 * (j - 1) + 0.04 * (2 * i - 1), of["tv"].clip(lower=LEAST)
                ax.plot(x, of["floor_tv"].clip(lower=LEAST), "_", color=GREY, markersize=5)
                colour, face = COLOURS[variant], COLOURS[variant] if skip == "both" else "white"
                ax.plot(x, tv, MARKERS[variant], color=colour, markerfacecolor=face, markersize=4)
    ax.set_xticks(range(len(LAYERS)), [str(n) for n in LAYERS])
    ax.set(yscale="log", ylim=(LEAST / 2, 2), ylabel="total variation of the next token")
    ax.set_xlabel("layers (from left: No-, Pre-, QKV-Norm)")
    core.finish(ax, "random, without positions (open: no skips)")


def _draw_depth(ax: core.Axes, layers: pd.DataFrame, group: str) -> None:
    """Change of one group's stream, by blocks passed."""
    for variant in VARIANTS:
        mine = layers[layers["variant"] == variant]
        depth = mine.groupby("layer")[["stream", "floor_stream"]].mean().clip(lower=LEAST)
        x = depth.index.to_numpy() + 1
        look: dict[str, Any] = {"color": COLOURS[variant], "marker": MARKERS[variant]}
        ax.plot(x, depth["floor_stream"], color=GREY, linewidth=0.7)
        ax.plot(x, depth["stream"], markersize=3, linewidth=1.1, **look)
    core.whole_numbers(ax)
    ax.set(yscale="log", ylim=(LEAST / 2, 3), xlabel="blocks passed (0: embedding)")
    title = f"{group}: the last position's stream"
    core.finish(ax, title, ylabel="change of the stream, |y − y′| / |y|")


def _draw_neighbours(ax: core.Axes, table: pd.DataFrame) -> None:
    """A point for each model, behind its last block; a row for each group, random ones by kind."""
    rows = core.by_group(trained(table))
    rows += [(f"random, {words}", mine) for words, mine in random_kinds(table)]
    for row, (_, mine) in enumerate(rows):
        for i, variant in enumerate(VARIANTS):
            x = nearer_stream(mine, variant).dropna().to_numpy()
            y = np.full(len(x), row + 0.18 * (i - 1.5))
            ax.plot(100 * x, y, MARKERS[variant], color=COLOURS[variant], markersize=3.5)
    ax.axvline(50, color=GREY, linewidth=0.9, linestyle="--")
    _rows(ax, [name for name, _ in rows])
    ax.set_xlabel("pairs, the nearer position more alike (%)\n50: distance says nothing")
    core.finish(ax, "are neighbours alike? behind the last block", xlim=(0, 102))
