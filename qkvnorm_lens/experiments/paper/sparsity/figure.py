"""The experiment's figure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.sparsity.measure import KINDS
from qkvnorm_lens.plots.charts import BLUE, GREY, ORANGE, new_figure, plain

_LEAST = 0.01  # percent: the histograms' lower end


def figure(table: pd.DataFrame) -> core.Figure:
    """Above: histograms of row maxima; below: attention of the head with most sparse rows."""
    kinds = _kinds(table[table["what"] == "histogram"])
    named = core.by_group(table[table["what"] == "map"])
    rows = -(-len(named) // 4)
    columns = -(-len(named) // rows) if rows else 0
    fig = new_figure((3.1 * max(columns, 3), 3.0 + 3.0 * rows))
    heights = [1, rows] if rows else [1]
    above, *below = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    axes = above.subplots(1, len(kinds), squeeze=False).ravel()
    for ax, (title, chosen) in zip(axes, kinds.items(), strict=True):
        _draw_histograms(ax, chosen)
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("rows in 0.02 of the maximum (%)")
    for part in below:
        cells = part.subplots(rows, columns, squeeze=False).ravel()
        for ax, (group, mine) in zip(cells, named, strict=False):
            _draw_map(ax, mine[mine["rank"] == 0], group)
        for ax in cells[len(named) :]:
            ax.set_axis_off()
    return fig


def _kinds(bins: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Study models, other addition models, language models: those that are there."""
    study, others, language = core.kinds_of_models(bins)
    named = {
        "study models": study,
        "other addition models" if len(study) else "addition models": others,
        "language models": language,
    }
    return {title: rows for title, rows in named.items() if len(rows)}


def _draw_histograms(ax: core.Axes, bins: pd.DataFrame) -> None:
    """Share of rows by maximum; a group's models added up, sinks of language models apart."""
    for group, mine in core.by_group(bins):
        placement = core.placement_of(mine)
        whole = (core.label(group, placement), core.COLOURS[placement], mine)
        content, sinks = (mine[mine["kind"] == kind] for kind in KINDS)
        apart = (
            (f"{group}: other tokens", BLUE, content),
            (f"{group}: first token (sinks)", ORANGE, sinks),
        )
        for name, colour, chosen in apart if core.is_language(mine) else (whole,):
            count = chosen.groupby(np.floor(chosen["low"] * 50 + 1e-6))["rows"].sum().to_numpy()
            edges = np.linspace(0, 1, len(count) + 1)
            shares = 100 * count / mine["rows"].sum()
            ax.stairs(shares, edges, color=colour, linewidth=1.3, label=name)
    for edge in (0.70, 0.95):
        ax.axvline(edge, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(_LEAST, 100)
    ax.yaxis.set_major_formatter(plain)
    core.key(ax, loc="upper left")
    core.finish(ax, xlim=(0, 1), xlabel="largest attention of a row")


def _draw_map(ax: core.Axes, cells: pd.DataFrame, group: str) -> None:
    """One head's attention, queries down, keys across."""
    query, key = cells["query"].astype(int), cells["key"].astype(int)
    size = int(max(query.max(), key.max())) + 1
    picture = np.full((size, size), np.nan)
    picture[query, key] = cells["weight"]
    ax.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = dict(zip(query, cells["query_token"], strict=True))
    tokens = [str(names[i])[1:-1] for i in range(size)]
    font, turned = 7 if size <= 22 else 4.5, 0 if max(map(len, tokens)) < 2 else 90
    ax.set_xticks(range(size), tokens, fontsize=font, rotation=turned)
    ax.set_yticks(range(size), tokens, fontsize=font)
    ax.tick_params(length=0)
    ax.set_xlabel("key", fontsize=8)
    ax.set_ylabel("query", fontsize=8)
    ax.set_title(f"{group} {cells['label'].iloc[0]}", fontsize=9)
