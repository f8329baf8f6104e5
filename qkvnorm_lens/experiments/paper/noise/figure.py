"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import PLACEMENT_NAMES, groups, panels
from qkvnorm_lens.experiments.paper.noise.rows import (
    LABELS,
    ROWS,
    SHIELDED,
    VECTORS,
    Condition,
    kept_mean,
    main_targets,
)
from qkvnorm_lens.plots.charts import RUNS, grid, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy kept against sigma: above by vectors, below by rows of q and k.

    A column for each placement (solid: the group of most seeds, with the 95% interval over them;
    dotted: the others), and for each of other people's models. A single model's interval is over
    prompts.
    """
    main = main_targets(table)
    columns = _columns(main)
    fig, axes = panels(
        2, len(columns), width=min(3.6, 10.2 / len(columns)), height=2.9, share_y=True
    )
    for i, (title, ordered) in enumerate(columns):
        above, below = axes[i], axes[len(columns) + i]
        _draw(above, main, ordered, (*VECTORS, SHIELDED))
        _draw(below, main, ordered, ROWS)
        above.set_title(title, fontsize=10)
    fig.supxlabel("RMS of the relative change of norms, σ (%)", fontsize=10)
    for ax, title in ((axes[0], "noise on"), (axes[len(columns)], "noise on q and k of")):
        _legend(ax, axes, title)
        ax.set_ylabel("accuracy kept (% of clean)")
    return fig


def _columns(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Title and groups of each column, the group of most seeds first."""
    out = []
    for placement in (p for p in ("none", "pre", "qkv") if (table["placement"] == p).any()):
        mine = table[table["placement"] == placement]
        seeds = mine.groupby("group")["model"].nunique()
        ordered = sorted(groups(mine), key=lambda g: -seeds[g])
        named = ", ".join(ordered) if len(ordered) < 3 else f"{len(ordered)} groups"
        out.append((f"{PLACEMENT_NAMES[placement]}\n({named})", ordered))
    return out + [(group, [group]) for group in groups(table[table["placement"] == ""])]


def _legend(ax: Axes, axes: list[Axes], title: str) -> None:
    """In the first panel of a row, with what any panel of the row shows."""
    half = len(axes) // 2
    row = axes[:half] if ax is axes[0] else axes[half:]
    found: dict[str, Any] = {}
    for each in row:
        handles, labels = each.get_legend_handles_labels()
        found |= {name: h for h, name in zip(handles, labels, strict=True) if name not in found}
    ax.legend(found.values(), found.keys(), fontsize=8, title=title, title_fontsize=8)


def _draw(
    ax: Axes, table: pd.DataFrame, ordered: list[str], conditions: tuple[Condition, ...]
) -> None:
    for j, condition in enumerate(conditions):
        style = "--" if condition is SHIELDED else "-"
        for i, group in enumerate(ordered):
            mine = condition.of(table[table["group"] == group])
            if mine.empty:
                continue
            sigmas = sorted(s for s in mine["sigma"].unique() if s > 0)
            points = [kept_mean(mine, s) for s in sigmas]
            x = 100 * np.asarray(sigmas)
            y = np.asarray([100 * p.value for p in points])
            half = np.asarray([100 * p.half for p in points])
            ax.plot(
                x,
                y,
                style if i == 0 else ":",
                color=RUNS[j],
                linewidth=1.6 if i == 0 else 1.0,
                marker="o" if i == 0 else None,
                markersize=3,
                label=LABELS[condition] if i == 0 else None,
            )
            if i == 0:
                ax.fill_between(x, y - half, y + half, color=RUNS[j], alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_ylim(-3, 108)
    log_ticks(ax.xaxis)
    grid(ax)
