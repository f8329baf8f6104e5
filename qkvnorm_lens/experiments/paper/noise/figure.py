"""The experiment's figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.noise.rows import (
    LABELS,
    ROWS,
    SHIELDED,
    VECTORS,
    Condition,
    kept_mean,
    main_targets,
)
from qkvnorm_lens.plots.charts import RUNS, Axis, Band, Chart, Line, draw


def figure(table: pd.DataFrame) -> core.Figure:
    """Accuracy kept against sigma: above by vectors, below by rows of q and k.

    A column for each placement (solid: the group of most seeds, with the 95% interval over them;
    dotted: the others), and for each of other people's models. A single model's interval is over
    prompts.
    """
    main = main_targets(table)
    columns = _columns(main)
    n = len(columns)
    fig, axes = core.panels(2, n, width=min(3.6, 10.2 / n), height=2.9, share_y=True)
    charts = [
        _chart(main, title * above, ordered, conditions, y="accuracy kept (% of clean)" * (i == 0))
        for above, conditions in ((True, (*VECTORS, SHIELDED)), (False, ROWS))
        for i, (title, ordered) in enumerate(columns)
    ]
    draw(charts, axes, "matplotlib", (2, n))
    fig.supxlabel("RMS of the relative change of norms, σ (%)", fontsize=10)
    _legend(axes[:n], "noise on")
    _legend(axes[n:], "noise on q and k of")
    return fig


def _columns(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Title and groups of each column, the group of most seeds first."""
    out = []
    for placement in (p for p in ("none", "pre", "qk", "qkv") if (table["placement"] == p).any()):
        mine = table[table["placement"] == placement]
        seeds = mine.groupby("group")["model"].nunique()
        ordered = sorted(core.groups(mine), key=lambda g: -seeds[g])
        named = ", ".join(ordered) if len(ordered) < 3 else f"{len(ordered)} groups"
        out.append((f"{core.PLACEMENT_NAMES[placement]}\n({named})", ordered))
    return out + [(group, [group]) for group in core.groups(table[table["placement"] == ""])]


def _legend(row: list[core.Axes], title: str) -> None:
    """In the first panel of a row, with what any panel of the row shows."""
    found: dict[str, Any] = {}
    for ax in row:
        handles, labels = ax.get_legend_handles_labels()
        found |= {name: h for h, name in zip(handles, labels, strict=True) if name not in found}
    row[0].legend(found.values(), found.keys(), fontsize=8, title=title, title_fontsize=8)


def _chart(
    table: pd.DataFrame,
    title: str,
    ordered: list[str],
    conditions: tuple[Condition, ...],
    *,
    y: str,
) -> Chart:
    lines, bands = [], []
    for colour, condition in zip(RUNS, conditions, strict=False):
        for i, group in enumerate(ordered):
            mine = condition.of(core.pick(table, group=group))
            if mine.empty:
                continue
            sigmas = sorted(s for s in mine["sigma"].unique() if s > 0)
            points = [kept_mean(mine, s) for s in sigmas]
            x = 100 * np.asarray(sigmas)
            value, low, high = 100 * np.asarray([(p.value, p.low, p.high) for p in points]).T
            if i:
                lines.append(Line(x, value, "_", colour, dash=":", width=1.0))
                continue
            dash = "--" if condition is SHIELDED else "-"
            lines.append(Line(x, value, LABELS[condition], colour, dash=dash, width=1.6, marker=3))
            bands.append(Band(x, low, high, "_", colour, opacity=0.15))
    across, up = Axis("", "log", ticks="log"), Axis(y, low=-3, high=108)
    return Chart(across, up, title, lines, bands, legend=None)
