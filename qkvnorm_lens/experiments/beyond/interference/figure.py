"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.interference.measure import MOVED, SPARED, measured, of
from qkvnorm_lens.plots.charts import GREY, RUNS

RATES: Final = {
    "really": (MOVED, SPARED[False], True, "o"),
    "really, first token spared": (MOVED, SPARED[True], True, "s"),
    "independent noise": ("predicted_content", SPARED[False], False, "o"),
    "shuffled factors": ("permuted_content", SPARED[False], False, "s"),
}
_UNDER: Final[dict[str, Any]] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}


def figure(table: pd.DataFrame) -> core.Figure:
    """Really moved against predicted, by head; both by group; what the keys' lengths decide."""
    from matplotlib.patches import Patch

    named = core.by_group(measured(table))
    if not named:
        return _empty(table)
    fig, axes = core.panels(1, 3, width=3.6, height=3.1 + 0.25 * len(named))
    _draw_heads(axes[0], named)
    _draw_rates(axes[1], named)
    _draw_shares(axes[2], named)
    colours = [Patch(color=RUNS[i % len(RUNS)], label=group) for i, (group, _) in enumerate(named)]
    core.legend_below(fig, handles=colours, ncols=4, frameon=False)
    return fig


def _empty(table: pd.DataFrame) -> core.Figure:
    fig, axes = core.panels(1, 1, width=5.0, height=1.5)
    names = ", ".join(core.groups(table))
    axes[0].text(0.5, 0.5, f"No norm in front of the attention:\n{names}", ha="center", va="center")
    axes[0].set_axis_off()
    return fig


def _draw_heads(ax: core.Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
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
    core.percents(ax, "xy", min(1.5 * max(top, 1), 150))
    labels = {"xlabel": "predicted for independent noise (%)", "ylabel": "really moved (%)"}
    core.finish(ax, "content rows, by head (larger: more rows)", size=9, **labels)


def _draw_rates(ax: core.Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Shares of a group's sparse content rows with 95% intervals over seeds."""
    for i, (_, mine) in enumerate(named):
        colour = RUNS[i % len(RUNS)]
        for j, (name, (column, first, filled, marker)) in enumerate(RATES.items()):
            found = core.group_share(of(mine, "model", first=first), column)
            at = i + 0.18 * (j - (len(RATES) - 1) / 2)
            style = {"marker": marker, "markerfacecolor": colour if filled else "white"}
            core.error_bar(ax, at, found, across=True, color=colour, markersize=4.5, **style)
            if not i:
                face = GREY if filled else "white"
                ax.plot([], [], marker, color=GREY, mfc=face, markersize=4.5, label=name)
    _rows(ax, len(named))
    core.percents(ax, "x", 150)
    core.key(ax, **_UNDER)
    core.finish(ax, "by model", size=9, xlabel="content rows that move (%)")


def _rows(ax: core.Axes, n: int) -> None:
    ax.set_yticks(range(n), [""] * n)
    ax.set_ylim(n - 0.5, -0.5)


def _draw_shares(ax: core.Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """What remains of the scores' variance with lengths alone, a dot per head."""
    rng = np.random.default_rng(0)
    bar: dict[str, Any] = {"color": "black", "markeredgewidth": 1.5}
    for i, (_, mine) in enumerate(named):
        heads = of(mine, "head")
        at = i + 0.5 * (rng.random(len(heads)) - 0.5)
        colour = RUNS[i % len(RUNS)]
        ax.plot(100 * heads["length_share"], at, ".", color=colour, markersize=4, alpha=0.6)
        whole = core.group_mean(of(mine, "model"), "length_share")
        ax.plot(100 * whole.value, i, "|", markersize=16, **bar)
    _rows(ax, len(named))
    ax.set_xlim(left=0)
    ax.plot([], [], ".", color=GREY, markersize=4, label="a head")
    ax.plot([], [], "|", markersize=10, label="the model", **bar)
    core.key(ax, **_UNDER)
    label = "score variance with keys' lengths alone (%)"
    core.finish(ax, "lengths against directions", size=9, xlabel=label)
