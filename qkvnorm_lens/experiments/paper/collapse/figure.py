"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from qkvnorm_lens.experiments.core import COLOURS, PLAIN, groups, label, panels, pick
from qkvnorm_lens.plots.charts import log_ticks, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """A panel for each group of models: exact lines, sampled points, strict, without sinks."""
    names = groups(table)
    columns = min(3, len(names))
    fig, axes = panels(-(-len(names) // columns), columns, height=2.9, share_y=True)
    for ax, group in zip(axes, names, strict=False):
        _draw(ax, table[table["group"] == group])
        ax.set_title(label(group, table[table["group"] == group]["placement"].iloc[0]), fontsize=9)
    for ax in axes[len(names) :]:
        ax.remove()
    for i, ax in enumerate(axes[: len(names)]):
        if i % columns == 0:
            ax.set_ylabel("sparse rows that collapse (%)")
        ax.set_xlabel("RMS of the noise, σ (%)")
    handles = {h.get_label(): h for ax in axes[: len(names)] for h in _handles(ax)}
    fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, fontsize=8)
    return fig


def _handles(ax: Axes) -> list[Any]:
    return list(ax.get_legend_handles_labels()[0])


def _draw(ax: Axes, mine: pd.DataFrame) -> None:
    colour = COLOURS[mine["placement"].iloc[0]]
    whole = mine[mine["layer"] == -1]
    for i, model in enumerate(dict.fromkeys(whole["model"])):
        one = whole[whole["model"] == model]
        first = i == 0

        def curve(quantity: str, variant: str, one: pd.DataFrame = one) -> pd.DataFrame:
            return pick(one, quantity=quantity, variant=variant).sort_values("sigma")

        for variant, style, name in (
            (PLAIN, "-", "loose, exact"),
            ("without sinks", "--", "loose, exact, sinks left out"),
        ):
            c = curve("loose", variant)
            ax.plot(
                100 * c["sigma"],
                100 * c["value"],
                style,
                color=colour,
                linewidth=1,
                label=name if first else None,
            )
        c = curve("loose", "sampled")
        ax.errorbar(
            100 * c["sigma"],
            100 * c["value"],
            yerr=200 * c["se"].fillna(0),
            fmt="o",
            markersize=3,
            color=colour,
            markerfacecolor="none",
            linewidth=1,
            label="loose, sampled (2 s.e. over draws)" if first else None,
        )
        c = curve("strict", PLAIN)
        ax.plot(
            100 * c["sigma"],
            100 * c["value"],
            ":",
            color="black",
            linewidth=1,
            label="strict, sampled" if first else None,
        )
    ax.axhline(1, color="grey", linewidth=0.7)
    ax.set_xscale("log")
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlim(0.9, 60)
    ax.set_ylim(0.01, 100)
    log_ticks(ax.xaxis)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(visible=True, linewidth=0.4, alpha=0.6)
