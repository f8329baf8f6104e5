"""The experiment's figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from qkvnorm_lens.experiments.core import panels
from qkvnorm_lens.experiments.related.masks.words import LOCAL, WITHOUT_CENTRE, N, runs
from qkvnorm_lens.plots.charts import GREY, RUNS, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(table: pd.DataFrame) -> Figure:
    """Relative mu by layer: by mask, with bounds; other settings; equilibria by rank."""
    fig, axes = panels(2, 3, width=3.0, height=3.6)
    _draw_masks(axes[0], table, LOCAL["two-way windows"], "two-way windows")
    _draw_masks(axes[1], table, (*LOCAL["one-way windows"], WITHOUT_CENTRE), "one-way windows")
    temperatures = ("temperature 1/64", "attention", "temperature 64")
    _draw_settings(axes[2], table, temperatures, "temperature")
    norms = ("attention", "RMSNorm", "LayerNorm", "RMSNorm, random values")
    _draw_settings(axes[3], table, norms, "norm")
    others = ("attention", "residual", "MLP", "residual, MLP", "residual, MLP, RMSNorm")
    _draw_settings(axes[4], table, others, "residual and MLP")
    _draw_held(axes[5], table)
    for i in (0, 3):
        axes[i].set_ylabel("distance from the mean token\nμ(X) / |X|")
    return fig


def _curve(table: pd.DataFrame, setting: str, mask: str) -> pd.DataFrame:
    mine = table[(table["row"] == "curve") & (table["setting"] == setting)]
    return mine[mine["mask"] == mask]


def _axis(ax: Axes, title: str, right: float) -> None:
    ax.set_yscale("log")
    ax.set_xscale("symlog", linthresh=4, linscale=0.6)
    ax.set_xticks([0, 1, 4, 16, 64, 256], ["0", "1", "4", "16", "64", "256"])
    ax.set_xlim(0, 1.1 * right)
    ax.set_ylim(1e-11, 3)
    ax.minorticks_off()
    ax.set_xlabel("layers of attention")
    ax.set_title(title, fontsize=10)
    grid(ax)


def _below(ax: Axes) -> None:
    """The legend, where no line runs."""
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.18),
        ncols=2,
        fontsize=7,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.6,
    )


def _draw_masks(ax: Axes, table: pd.DataFrame, masks: tuple[str, ...], title: str) -> None:
    for mask, colour in zip(masks, RUNS, strict=False):
        curve = _curve(table, "attention", mask)
        radius = float(runs(table, "attention", mask)["radius"].iloc[0])
        reach = f"radius {radius:.0f}" if math.isfinite(radius) else "no centre"
        ax.plot(curve["layer"], curve["value"], color=colour, label=f"{mask}, {reach}")
        # The bound is on mu, which starts near |X| = sqrt(N); shown in the same units.
        ax.plot(curve["layer"], curve["bound"] / math.sqrt(N), color=colour, linestyle=":")
    ax.plot([], [], ":", color=GREY, label="bound on μ, over |X₀|")
    _axis(ax, title, float(table["layers"].max()))
    _below(ax)


def _draw_settings(ax: Axes, table: pd.DataFrame, settings: tuple[str, ...], title: str) -> None:
    for setting, colour in zip(settings, RUNS, strict=False):
        for mask, line in (("causal", "-"), ("window 4", "--")):
            curve = _curve(table, setting, mask)
            name = "attention alone" if setting == "attention" else setting
            if title == "temperature":
                name = {"attention": "temperature 1"}.get(setting, setting)
            ax.plot(
                curve["layer"],
                curve["value"],
                line,
                color=colour,
                label=name if line == "-" else None,
            )
    for mask, line in (("causal", "-"), ("window 4", "--")):
        ax.plot([], [], line, color=GREY, label=mask)
    _axis(ax, title, float(table["layers"].max()))
    _below(ax)


def _draw_held(ax: Axes, table: pd.DataFrame) -> None:
    mine = table[table["row"] == "equilibrium"]
    most = float(mine["rank"].max())
    ax.plot([0.5, most + 0.5], [0.5, most + 0.5], color=GREY, linewidth=0.8, zorder=0)
    styles = {
        "leaning": ("o", RUNS[0], "leaning on the first", -0.12),
        "solved, complete": ("s", RUNS[1], "W_V solved, complete", 0.0),
        "solved, causal": ("^", RUNS[2], "W_V solved, causal", 0.12),
        "two tokens": ("D", RUNS[6], "two tokens, d = 2", 0.12),
    }
    for name, (marker, colour, label, shift) in styles.items():
        some = mine[mine["setting"] == name]
        ax.plot(some["rank"] + shift, some["near_rank"], marker, color=colour, label=label)
    layers = int(mine["layers"].max())
    ax.set_xticks(range(1, int(most) + 1))
    ax.set_yticks(range(1, int(most) + 1))
    ax.set_xlabel("rank of the equilibrium")
    ax.set_ylabel(f"rank after {layers} layers\nfrom 0.1% off")
    ax.set_title("equilibria under RMSNorm", fontsize=10)
    _below(ax)
    grid(ax)
