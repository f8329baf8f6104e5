"""The experiment's figure."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import PLAIN
from qkvnorm_lens.plots.charts import GREY, Axis, Chart, Line, draw

LINES = (
    ("loose", PLAIN, "loose, exact", {"dash": "-"}),
    ("loose", "without sinks", "loose, exact, sinks left out", {"dash": "--"}),
    (
        "loose",
        "sampled",
        "loose, sampled (2 s.e. over draws)",
        {"dash": "none", "marker": 3, "bars": True},
    ),
    ("strict", PLAIN, "strict, sampled", {"dash": ":", "colour": "black"}),
)


def figure(table: pd.DataFrame) -> core.Figure:
    """A panel for each group of models: exact lines, sampled points, strict, without sinks."""
    named = core.by_group(table)
    columns = min(3, len(named))
    size = (-(-len(named) // columns), columns)
    height = 2.9 if columns > 1 else 3.9  # the legend below takes a line for each entry
    fig, axes = core.panels(*size, height=height, share_y=True)
    charts = [_chart(*each, first=i % columns == 0) for i, each in enumerate(named)]
    draw(charts, axes[: len(charts)], "matplotlib", size)
    for ax in axes[len(charts) :]:
        ax.remove()
    core.legend_below(fig, axes[0], ncols=columns)
    return fig


def _chart(group: str, mine: pd.DataFrame, *, first: bool) -> Chart:
    """A line for each model; only the first one's are named."""
    whole, lines = core.pick(mine, layer=-1), []
    colour = core.COLOURS[core.placement_of(mine)]
    for i, model in enumerate(dict.fromkeys(whole["model"])):
        for quantity, variant, name, style in LINES:
            rows = core.pick(whole, model=model, quantity=quantity, variant=variant)
            x, y, error = rows.sort_values("sigma")[["sigma", "value", "se"]].to_numpy(float).T
            look: dict[str, Any] = {"colour": colour, "width": 1, **style}
            if "bars" in look:
                look["error"] = 200 * error
            lines.append(Line(100 * x, 100 * y, "_" * (i > 0) + name, **look))
    return Chart(
        Axis("RMS of the noise, σ (%)", "log", 0.9, 60, ticks="log"),
        Axis("sparse rows that collapse (%)" * first, "log", 0.01, 100, ticks="plain"),
        title=core.label(group, core.placement_of(mine)),
        lines=lines,
        levels=[(1, GREY)],
        legend=None,
    )
