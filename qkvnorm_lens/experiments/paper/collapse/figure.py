"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLAIN,
    by_group,
    label,
    legend_below,
    panels,
    pick,
    placement_of,
)
from qkvnorm_lens.plots.charts import GREY, Axis, Chart, Line, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = ((PLAIN, "-", "loose, exact"), ("without sinks", "--", "loose, exact, sinks left out"))


def figure(table: pd.DataFrame) -> Figure:
    """A panel for each group of models: exact lines, sampled points, strict, without sinks."""
    named = by_group(table)
    columns = min(3, len(named))
    size = (-(-len(named) // columns), columns)
    height = 2.9 if columns > 1 else 3.9  # the legend below takes a line for each entry
    fig, axes = panels(*size, height=height, share_y=True)
    charts = [_chart(*each, first=i % columns == 0) for i, each in enumerate(named)]
    draw(charts, axes[: len(charts)], "matplotlib", size)
    for ax in axes[len(charts) :]:
        ax.remove()
    legend_below(fig, axes[0], ncols=columns)
    return fig


def _chart(group: str, mine: pd.DataFrame, *, first: bool) -> Chart:
    """A line for each model; only the first one's are named."""
    whole, lines = pick(mine, layer=-1), []
    colour = COLOURS[placement_of(mine)]
    for i, model in enumerate(dict.fromkeys(whole["model"])):
        hidden = "_" * (i > 0)

        def line(
            quantity: str,
            variant: str,
            name: str,
            model: str = model,
            hidden: str = hidden,
            **more: Any,
        ) -> Line:
            rows = pick(whole, model=model, quantity=quantity, variant=variant)
            rows = rows.sort_values("sigma")
            x, y = (100 * rows[c].to_numpy(dtype=float) for c in ("sigma", "value"))
            if more.get("bars"):
                more["error"] = 200 * rows["se"].to_numpy(dtype=float)
            return Line(x, y, hidden + name, **{"colour": colour, "width": 1, **more})

        lines += [line("loose", variant, name, dash=dash) for variant, dash, name in EXACT]
        name = "loose, sampled (2 s.e. over draws)"
        lines.append(line("loose", "sampled", name, dash="none", marker=3, bars=True))
        lines.append(line("strict", PLAIN, "strict, sampled", dash=":", colour="black"))
    return Chart(
        Axis("RMS of the noise, σ (%)", "log", 0.9, 60, ticks="log"),
        Axis("sparse rows that collapse (%)" * first, "log", 0.01, 100, ticks="plain"),
        title=label(group, placement_of(mine)),
        lines=lines,
        levels=[(1, GREY)],
        legend=None,
    )
