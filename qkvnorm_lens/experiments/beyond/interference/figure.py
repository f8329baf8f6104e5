"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.beyond.interference.measure import MOVED, SPARED, measured, of
from qkvnorm_lens.experiments.core import by_group, error_bar, group_mean, groups, panels
from qkvnorm_lens.plots.charts import GREY, RUNS, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATES: Final = {
    "really": (MOVED, SPARED[False], True, "o"),
    "really, first token spared": (MOVED, SPARED[True], True, "s"),
    "independent noise": ("predicted_content", SPARED[False], False, "o"),
    "shuffled factors": ("permuted_content", SPARED[False], False, "s"),
}


def figure(table: pd.DataFrame) -> Figure:
    """Really moved against predicted, by head; both by group; what the keys' lengths decide."""
    from matplotlib.patches import Patch

    known = measured(table)
    if not len(known):
        return _empty(table)
    named = by_group(known)
    fig, axes = panels(1, 3, width=3.6, height=3.1 + 0.25 * len(named))
    _draw_heads(axes[0], named)
    _draw_rates(axes[1], named)
    _draw_shares(axes[2], named)
    colours = [Patch(color=RUNS[i % len(RUNS)], label=group) for i, (group, _) in enumerate(named)]
    fig.legend(handles=colours, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _empty(table: pd.DataFrame) -> Figure:
    fig, axes = panels(1, 1, width=5.0, height=1.5)
    names = ", ".join(groups(table))
    axes[0].text(0.5, 0.5, f"No norm in front of the attention:\n{names}", ha="center", va="center")
    axes[0].set_axis_off()
    return fig


def _draw_heads(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """A circle per head, larger for more sparse content rows."""
    top = 0.0
    for i, (_, mine) in enumerate(named):
        heads = of(mine, "head").dropna(subset=["moved_content", "predicted_content"])
        x, y = (100 * heads[name].to_numpy(float) for name in ("predicted_content", MOVED))
        content = (heads["rows"] - heads["sinks"]).to_numpy(float)
        size = 6 + 90 * content / max(content.max(initial=1.0), 1.0)
        ax.scatter(x, y, s=size, color=RUNS[i % len(RUNS)], alpha=0.5, linewidth=0.5)
        top = max(top, *x, *y, 0.0)
    line = np.linspace(0, 100, 2000)
    ax.plot(line, line, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for name in ("x", "y"):
        getattr(ax, f"set_{name}scale")("symlog", linthresh=0.1, linscale=0.5)
        getattr(ax, f"set_{name}ticks")([0, 0.1, 1, 10, 100])
        getattr(ax, f"{name}axis").set_major_formatter(plain)
        getattr(ax, f"set_{name}lim")(-0.03, min(1.5 * max(top, 1), 150))
    ax.set_xlabel("predicted for independent noise (%)")
    ax.set_ylabel("really moved (%)")
    ax.set_title("content rows, by head (larger: more rows)", fontsize=9)
    grid(ax)


def _draw_rates(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Shares of a group's sparse content rows with 95% intervals over seeds."""
    for i, (_, mine) in enumerate(named):
        colour = RUNS[i % len(RUNS)]
        for j, (name, (column, first, filled, marker)) in enumerate(RATES.items()):
            found = group_mean(of(mine, "model", first=first), column)
            at = i + 0.18 * (j - (len(RATES) - 1) / 2)
            style = {"marker": marker, "markerfacecolor": colour if filled else "white"}
            error_bar(ax, at, found, across=True, color=colour, markersize=4.5, **style)
            if not i:
                ax.plot([], [], marker, color=GREY, markersize=4.5, label=name)
                ax.lines[-1].set_markerfacecolor(GREY if filled else "white")
    ax.set_yticks(range(len(named)), [""] * len(named))
    ax.set_ylim(len(named) - 0.5, -0.5)
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_xlim(-0.03, 150)
    ax.set_xticks([0, 0.1, 1, 10, 100])
    ax.xaxis.set_major_formatter(plain)
    ax.set_xlabel("content rows that move (%)")
    ax.set_title("by model", fontsize=9)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    grid(ax)


def _draw_shares(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """What remains of the scores' variance with lengths alone, a dot per head."""
    rng = np.random.default_rng(0)
    for i, (_, mine) in enumerate(named):
        heads = of(mine, "head")
        at = i + 0.5 * (rng.random(len(heads)) - 0.5)
        colour = RUNS[i % len(RUNS)]
        ax.plot(100 * heads["length_share"], at, ".", color=colour, markersize=4, alpha=0.6)
        whole = group_mean(of(mine, "model"), "length_share")
        ax.plot(100 * whole.value, i, "|", color="black", markersize=16, markeredgewidth=1.5)
    ax.set_yticks(range(len(named)), [""] * len(named))
    ax.set_ylim(len(named) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("score variance with keys' lengths alone (%)")
    ax.set_title("lengths against directions", fontsize=9)
    ax.plot([], [], ".", color=GREY, markersize=4, label="a head")
    ax.plot([], [], "|", color="black", markersize=10, markeredgewidth=1.5, label="the model")
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    grid(ax)
