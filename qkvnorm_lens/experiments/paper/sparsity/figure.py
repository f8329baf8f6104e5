"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import COLOURS, STUDY, by_group, is_language, label, placement_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from qkvnorm_lens.experiments.paper.sparsity.measure import KINDS

_LEAST = 0.01  # percent: the histograms' lower end


def figure(table: pd.DataFrame) -> Figure:
    """Above: histograms of row maxima; below: attention of the head with most sparse rows."""
    from qkvnorm_lens.plots.charts import new_figure

    bins = table[table["what"] == "histogram"]
    kinds = _kinds_of_models(bins)
    named = by_group(table[table["what"] == "map"])
    rows = -(-len(named) // 4)
    columns = -(-len(named) // rows) if rows else 0
    fig = new_figure((3.1 * max(columns, 3), 3.0 + 3.0 * rows))
    heights = [1, rows] if rows else [1]
    above, *below = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    axes = list(above.subplots(1, len(kinds), squeeze=False).ravel())
    for ax, (title, chosen) in zip(axes, kinds.items(), strict=True):
        _draw_histograms(ax, chosen)
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("rows in 0.02 of the maximum (%)")
    for part in below:
        cells = list(part.subplots(rows, columns, squeeze=False).ravel())
        for ax, (group, mine) in zip(cells, named, strict=False):
            _draw_map(ax, mine[mine["rank"] == 0], group)
        for ax in cells[len(named) :]:
            ax.set_axis_off()
    return fig


def _kinds_of_models(bins: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Study models, other addition models, language models: those that are there."""
    study = bins["group"].str.startswith(STUDY)
    language = bins["placement"].fillna("") == ""
    found = {
        "study models": bins[study],
        "other addition models" if study.any() else "addition models": bins[~study & ~language],
        "language models": bins[language],
    }
    return {title: rows for title, rows in found.items() if len(rows)}


def _draw_histograms(ax: Axes, bins: pd.DataFrame) -> None:
    """Share of rows by maximum; a group's models added up, sinks of language models apart."""
    from qkvnorm_lens.plots.charts import BLUE, ORANGE, grid, plain

    for group, mine in by_group(bins):
        apart = is_language(mine)
        lines = [(k, mine[mine["kind"] == k]) for k in KINDS] if apart else [("", mine)]
        for kind, chosen in lines:
            count = chosen.groupby(np.floor(chosen["low"] * 50 + 1e-6))["rows"].sum().to_numpy()
            colour = {"": COLOURS[placement_of(mine)], "content": BLUE, "sink": ORANGE}[kind]
            name = {"content": f"{group}: other tokens", "sink": f"{group}: first token (sinks)"}
            ax.stairs(
                100 * count / mine["rows"].sum(),
                np.linspace(0, 1, len(count) + 1),
                color=colour,
                linewidth=1.3,
                label=name.get(kind, label(group, placement_of(mine))),
            )
    for edge in (0.70, 0.95):
        ax.axvline(edge, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(_LEAST, 100)
    ax.yaxis.set_major_formatter(plain)
    ax.set_xlim(0, 1)
    ax.set_xlabel("largest attention of a row")
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    grid(ax)


def _draw_map(ax: Axes, cells: pd.DataFrame, group: str) -> None:
    """One head's attention, queries down, keys across."""
    query, key = cells["query"].astype(int), cells["key"].astype(int)
    size = int(max(query.max(), key.max())) + 1
    picture = np.full((size, size), np.nan)
    picture[query, key] = cells["weight"]
    ax.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = dict(zip(query, cells["query_token"], strict=True))
    tokens = [str(names[i])[1:-1] for i in range(size)]
    font = 7 if size <= 22 else 4.5
    ax.set_xticks(
        range(size), tokens, fontsize=font, rotation=0 if max(map(len, tokens)) < 2 else 90
    )
    ax.set_yticks(range(size), tokens, fontsize=font)
    ax.tick_params(length=0)
    ax.set_xlabel("key", fontsize=8)
    ax.set_ylabel("query", fontsize=8)
    ax.set_title(f"{group} {cells['label'].iloc[0]}", fontsize=9)
