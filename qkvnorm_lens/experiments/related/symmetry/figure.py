"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import by_group, panels
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
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = dict(zip(VARIANTS, ("#000000", BLUE, ORANGE, GREEN), strict=True))
MARKERS: Final = dict(zip(VARIANTS, "osD^", strict=True))
LEAST: Final = 1e-8  # of the figure's logarithmic axes


def deepest(table: pd.DataFrame) -> str:
    """The group of the model with most layers."""
    rows = trained(table)
    return str(rows.nlargest(1, "layers")["group"].iloc[0]) if len(rows) else ""


def figure(table: pd.DataFrame) -> Figure:
    """Total variation by model, of random models by depth; one by layer; neighbours of all."""
    fig, axes = panels(2, 2, width=4.6, height=3.5)
    _draw_models(axes[0], trained(table))
    _draw_constructed(axes[1], table)
    group = deepest(table)
    layers = table[(table["group"] == group) & (table["by"] == "layer")]
    _draw_depth(axes[2], layers, group)
    _draw_neighbours(axes[3], table)
    _legend(fig, table)
    return fig


def _legend(fig: Figure, table: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[v], marker=MARKERS[v], markersize=4, linewidth=1.2, label=v)
        for v in VARIANTS
        if (table["variant"] == v).any()
    ]
    handles.append(
        Line2D([], [], color=GREY, marker="_", markersize=10, linestyle="none", label="rounding")
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _draw_models(ax: Axes, table: pd.DataFrame) -> None:
    named = by_group(table[table["by"] == "variant"])
    for row, (_, mine) in enumerate(named):
        for i, variant in enumerate(VARIANTS):
            of = mine[mine["variant"] == variant]
            if not len(of):
                continue
            y = row + 0.18 * (i - 1.5)
            colour = COLOURS[variant]
            ax.plot(of["floor_tv"].clip(lower=LEAST), [y] * len(of), "|", color=GREY, markersize=6)
            ax.plot(of["tv"].clip(lower=LEAST), [y] * len(of), MARKERS[variant], color=colour,
                    markersize=3.5)  # fmt: skip
    ax.set_yticks(range(len(named)), [group for group, _ in named], fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(LEAST / 2, 2)
    ax.set_xlabel("total variation of the next token (0 to 1)")
    ax.set_title("models, earlier tokens permuted", fontsize=10)
    grid(ax)


def _draw_constructed(ax: Axes, table: pd.DataFrame) -> None:
    """Squares: mask, diamonds: none; filled: with skip connections, open: without."""
    rows = constructed(table)
    for variant in ("as is", "mask removed"):
        for i, skip in enumerate(SKIPS):
            mine = rows[(rows["variant"] == variant) & (rows["skip"] == skip)]
            for j, placement in enumerate(PLACEMENTS):
                of = mine[mine["placement"] == placement]
                at = np.array([LAYERS.index(n) for n in of["layers"]])
                x = at + 0.12 * (j - 1) + 0.04 * (2 * i - 1)
                ax.plot(x, of["floor_tv"].clip(lower=LEAST), "_", color=GREY, markersize=5)
                ax.plot(
                    x,
                    of["tv"].clip(lower=LEAST),
                    MARKERS[variant],
                    color=COLOURS[variant],
                    markerfacecolor=COLOURS[variant] if skip == "both" else "white",
                    markersize=4,
                )
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 2)
    ax.set_xticks(range(len(LAYERS)), [str(n) for n in LAYERS])
    ax.set_xlabel("layers (from left: No-, Pre-, QKV-Norm)")
    ax.set_ylabel("total variation of the next token")
    ax.set_title("random, without positions (open: no skips)", fontsize=10)
    grid(ax)


def _draw_depth(ax: Axes, layers: pd.DataFrame, group: str) -> None:
    """Change of one group's stream, by blocks passed."""
    from matplotlib.ticker import MaxNLocator

    for variant in VARIANTS:
        mine = layers[layers["variant"] == variant]
        if not len(mine):
            continue
        depth = mine.groupby("layer")[["stream", "floor_stream"]].mean()
        x = depth.index.to_numpy() + 1
        ax.plot(x, depth["floor_stream"].clip(lower=LEAST), color=GREY, linewidth=0.7)
        ax.plot(
            x,
            depth["stream"].clip(lower=LEAST),
            color=COLOURS[variant],
            marker=MARKERS[variant],
            markersize=3,
            linewidth=1.1,
        )
    ax.set_yscale("log")
    ax.set_ylim(LEAST / 2, 3)
    ax.set_xlabel("blocks passed (0: embedding)")
    ax.set_ylabel("change of the stream, |y − y′| / |y|")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"{group}: the last position's stream", fontsize=10)
    grid(ax)


def _draw_neighbours(ax: Axes, table: pd.DataFrame) -> None:
    """A point for each model, behind its last block; a row for each group, random ones by kind."""
    rows = [(name, mine) for name, mine in by_group(trained(table))]
    rows += [(f"random, {words}", mine) for words, mine in random_kinds(table)]
    for row, (_, mine) in enumerate(rows):
        for i, variant in enumerate(VARIANTS):
            x = nearer_stream(mine, variant).dropna().to_numpy()
            y = np.full(len(x), row + 0.18 * (i - 1.5))
            ax.plot(100 * x, y, MARKERS[variant], color=COLOURS[variant], markersize=3.5)
    ax.axvline(50, color=GREY, linewidth=0.9, linestyle="--")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 102)
    ax.set_xlabel("pairs, the nearer position more alike (%)\n50: distance says nothing")
    ax.set_title("are neighbours alike? behind the last block", fontsize=10)
    grid(ax)
