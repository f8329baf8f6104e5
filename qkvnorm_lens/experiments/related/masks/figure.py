"""The experiment's figure."""

from __future__ import annotations

import math
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.related.masks.words import LOCAL, WITHOUT_CENTRE, N, runs
from qkvnorm_lens.plots.charts import GREY, RUNS

_DASHES: Final = {"causal": "-", "window 4": "--"}
_SETTINGS: Final = {
    "temperature": ("temperature 1/64", "attention", "temperature 64"),
    "norm": ("attention", "RMSNorm", "LayerNorm", "RMSNorm, random values"),
    "residual and MLP": (
        "attention",
        "residual",
        "MLP",
        "residual, MLP",
        "residual, MLP, RMSNorm",
    ),
}
_HELD: Final = {
    "leaning": ("o", RUNS[0], "leaning on the first", -0.12),
    "solved, complete": ("s", RUNS[1], "W_V solved, complete", 0.0),
    "solved, causal": ("^", RUNS[2], "W_V solved, causal", 0.12),
    "two tokens": ("D", RUNS[6], "two tokens, d = 2", 0.12),
}


def figure(table: pd.DataFrame) -> core.Figure:
    """Relative mu by layer: by mask, with bounds; other settings; equilibria by rank."""
    fig, axes = core.panels(2, 3, width=3.0, height=3.6)
    _draw_masks(axes[0], table, LOCAL["two-way windows"], "two-way windows")
    _draw_masks(axes[1], table, (*LOCAL["one-way windows"], WITHOUT_CENTRE), "one-way windows")
    for ax, (title, settings) in zip(axes[2:5], _SETTINGS.items(), strict=True):
        _draw_settings(ax, table, settings, title)
    _draw_held(axes[5], core.pick(table, row="equilibrium"))
    for i in (0, 3):
        axes[i].set_ylabel("distance from the mean token\nμ(X) / |X|")
    return fig


def _finish(ax: core.Axes, title: str, right: float) -> None:
    ax.set_yscale("log")
    ax.set_xscale("symlog", linthresh=4, linscale=0.6)
    ax.set_xticks([0, 1, 4, 16, 64, 256], ["0", "1", "4", "16", "64", "256"])
    ax.minorticks_off()
    ends: dict[str, Any] = {"xlim": (0, 1.1 * right), "ylim": (1e-11, 3)}
    core.finish(ax, title, xlabel="layers of attention", **ends)
    _below(ax)


def _below(ax: core.Axes) -> None:
    """The legend, where no line runs."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.18)}
    core.key(ax, **place, ncols=2, columnspacing=1.0, handlelength=1.6)


def _draw_masks(ax: core.Axes, table: pd.DataFrame, masks: tuple[str, ...], title: str) -> None:
    for mask, colour in zip(masks, RUNS, strict=False):
        curve = core.pick(table, row="curve", setting="attention", mask=mask)
        radius = float(runs(table, "attention", mask)["radius"].iloc[0])
        reach = f"radius {radius:.0f}" if math.isfinite(radius) else "no centre"
        ax.plot(curve["layer"], curve["value"], color=colour, label=f"{mask}, {reach}")
        # The bound is on mu, which starts near |X| = sqrt(N); shown in the same units.
        bound = curve["bound"] / math.sqrt(N)
        ax.plot(curve["layer"], bound, color=colour, linestyle=":")
    ax.plot([], [], ":", color=GREY, label="bound on μ, over |X₀|")
    _finish(ax, title, float(table["layers"].max()))


def _draw_settings(
    ax: core.Axes, table: pd.DataFrame, settings: tuple[str, ...], title: str
) -> None:
    plain = "temperature 1" if title == "temperature" else "attention alone"
    for setting, colour in zip(settings, RUNS, strict=False):
        for mask, dash in _DASHES.items():
            curve = core.pick(table, row="curve", setting=setting, mask=mask)
            name = plain if setting == "attention" else setting
            label = name if dash == "-" else None
            ax.plot(curve["layer"], curve["value"], dash, color=colour, label=label)
    for mask, dash in _DASHES.items():
        ax.plot([], [], dash, color=GREY, label=mask)
    _finish(ax, title, float(table["layers"].max()))


def _draw_held(ax: core.Axes, mine: pd.DataFrame) -> None:
    most = float(mine["rank"].max())
    ax.plot([0.5, most + 0.5], [0.5, most + 0.5], color=GREY, linewidth=0.8, zorder=0)
    for name, (marker, colour, label, shift) in _HELD.items():
        some = mine[mine["setting"] == name]
        ax.plot(some["rank"] + shift, some["near_rank"], marker, color=colour, label=label)
    ranks = range(1, int(most) + 1)
    ax.set(xticks=ranks, yticks=ranks, xlabel="rank of the equilibrium")
    ax.set_ylabel(f"rank after {int(mine['layers'].max())} layers\nfrom 0.1% off")
    _below(ax)
    core.finish(ax, "equilibria under RMSNorm")
