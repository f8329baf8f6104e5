"""The experiment's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import pandas as pd

from qkvnorm_lens.experiments.core import COLOURS, PLACEMENT_NAMES, panels
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, RUNS, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Where = Literal["upper left", "lower left", "lower right", "center right"]


def figure(table: pd.DataFrame) -> Figure:
    """Nine panels: points were measured on our blocks, lines are what a theorem predicts."""
    fig, axes = panels(3, 3, width=3.5, height=3.0)
    drawn = (
        ("turning", _turning, "theorems 1-3: B turns on its sphere"),
        ("growing", _growing, "theorem 2: B's length changes"),
        ("matching", _matching, "theorem 2: a matching head fails"),
        ("offset", _offset, "theorem 2 behind constant offsets"),
        ("freedom", _freedom, "theorems 1-3: dimensions lost"),
        ("limits", _limits, "theorems 5, 6: isotropic to sparse"),
        ("boundary", _boundary, "theorem 7: where a row collapses"),
        ("probability", _probability, "theorem 7: how often it does"),
        ("isotropic", _isotropic, "theorem 8: isotropic attention"),
    )
    for ax, (name, draw, title) in zip(axes, drawn, strict=True):
        draw(ax, table[table["panel"] == name])
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8)
        grid(ax)
    fig.suptitle("points: measured on our blocks; lines: what the theorem predicts", fontsize=10)
    return fig


def _curves(
    ax: Axes, table: pd.DataFrame, named: dict[tuple[str, str], tuple[str, str, str]]
) -> None:
    """Points and predicted lines of (placement, series), with (label, colour, marker).

    Where there are many points each curve shows others, so that equal ones can be seen.
    """
    for i, ((placement, series), (label, colour, marker)) in enumerate(named.items()):
        mine = table[(table["placement"] == placement) & (table["series"] == series)]
        size = {"x": 6, "+": 9}.get(marker, 4)
        every = (i, len(named)) if len(mine) > 3 * len(named) else None
        ax.plot(mine["x"], mine["predicted"], color=colour, linewidth=1.2)
        ax.plot(
            mine["x"],
            mine["value"],
            marker,
            color=colour,
            markersize=size,
            label=label,
            markevery=every,
        )


def _legend(ax: Axes, where: Where) -> None:
    ax.legend(loc=where, fontsize=7.5, handletextpad=0.3, borderpad=0.3, labelspacing=0.3)


def _turning(ax: Axes, table: pd.DataFrame) -> None:
    independent, orthogonal = "independent subspaces", "orthogonal subspaces"
    _curves(
        ax,
        table,
        {
            ("none", independent): ("No-Norm, independent", GREEN, "s"),
            ("qkv", independent): ("QKV-Norm, independent", ORANGE, "x"),
            ("pre", orthogonal): ("Pre-Norm, orthogonal", BLUE, "+"),
            ("pre", independent): ("Pre-Norm, independent", BLUE, "o"),
        },
    )
    ax.set_xlabel("angle of B's content (turns)")
    ax.set_ylabel("score of head A (over first)")
    ax.set_ylim(0.75, 2.65)
    _legend(ax, "upper left")


def _growing(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("none", "independent subspaces"): ("No-Norm", GREEN, "s"),
            ("qkv", "independent subspaces"): ("QKV-Norm", ORANGE, "x"),
            ("pre", "orthogonal subspaces"): ("Pre-Norm, RMSNorm", BLUE, "o"),
            ("pre", "LayerNorm, orthogonal subspaces"): ("Pre-Norm, LayerNorm", BLUE, "+"),
        },
    )
    _log2(ax)
    ax.set_xlabel("length of B's content (over first)")
    ax.set_ylabel("score of head A (over first)")
    ax.set_ylim(0, 1.1)
    _legend(ax, "lower left")


def _log2(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(plain)


def _matching(ax: Axes, table: pd.DataFrame) -> None:
    series = "attention on the match"
    _curves(
        ax,
        table,
        {
            ("none", series): ("No-Norm", GREEN, "s"),
            ("qkv", series): ("QKV-Norm", ORANGE, "x"),
            ("pre", series): ("Pre-Norm", BLUE, "o"),
        },
    )
    jump = float(table[table["series"] == "arg max jumps"]["value"].iloc[0])
    ax.axvline(jump, color=GREY, linewidth=0.9, linestyle=":")
    ax.annotate(
        "arg max\njumps", (jump, 0.5), (5, 0), textcoords="offset points", fontsize=7.5, color=GREY
    )
    _log2(ax)
    ax.set_xlabel("length of the match's content in B")
    ax.set_ylabel("attention on the match")
    _legend(ax, "lower left")


def _offset(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("pre", "B turns on its circle"): ("b turns, r = 1", GREEN, "s"),
            ("pre", "B leaves its circle"): ("r grows from 1 to 3", BLUE, "o"),
        },
    )
    ax.set_xlabel("turns of b, or (r - 1)/2")
    ax.set_ylabel("Pre-Norm's score of head A\n(over first)")
    ax.set_ylim(0.82, 1.03)
    _legend(ax, "lower left")


def _freedom(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("none", "No-Norm"): ("No-Norm: 0", GREEN, "s"),
            ("qkv", "QKV-Norm"): ("QKV-Norm: $N_s$", ORANGE, "x"),
            ("pre", "Pre-Norm, RMSNorm"): ("Pre-RMSNorm: $N_s$", BLUE, "+"),
            ("pre", "Pre-Norm, LayerNorm"): ("Pre-LayerNorm: $N_s+1$", BLUE, "o"),
        },
    )
    ax.set_xticks(sorted(table["x"].unique()))
    ax.set_ylim(-0.4, table["value"].max() + 2.2)
    ax.set_xlabel("number of subspaces $N_s$")
    ax.set_ylabel("dimensions lost, of N")
    _legend(ax, "upper left")


def _limits(ax: Axes, table: pd.DataFrame) -> None:
    """Pre-Norm's curves; the isotropic limit as dashes at the left, the sparse one at the right."""
    mine = table[table["placement"] == "pre"]
    along = {
        ("pre", site): (f"noise on {site}", colour, "o")
        for site, colour in zip("qkv", RUNS, strict=False)
    }
    _curves(ax, mine[mine["x"] <= _SHOWN], along)
    for site, colour in zip("qkv", RUNS, strict=False):
        for end, span in (("isotropic", (0.0, 0.12)), ("sparse", (0.88, 1.0))):
            limit = mine[mine["series"] == f"{site}, {end}"]["predicted"].iloc[0]
            ax.axhline(limit, *span, color=colour, linewidth=1.0, linestyle="--")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.set_xlim(0.01 / 1.5, _SHOWN * 1.5)
    ax.set_xlabel("factor on the scores (Pre-Norm)")
    ax.set_ylabel("movement of the output\nper unit of noise")
    _legend(ax, "upper left")


_SHOWN: Final = 101.0  # the factor on the scores up to which curves are drawn


def _boundary(ax: Axes, table: pd.DataFrame) -> None:
    for placement, marker in zip(("none", "pre", "qkv"), "sox", strict=True):
        mine = table[table["placement"] == placement]
        rhos = sorted((s for s in mine["series"].unique() if s[0].isdigit()), key=float)
        for rho, line in zip(rhos, ("-", "--", ":"), strict=False):
            curve = mine[mine["series"] == rho]
            colour = COLOURS[placement]
            if placement == "none":
                ax.plot(
                    curve["x"],
                    curve["predicted"],
                    line,
                    color="black",
                    linewidth=1.0,
                    label=f"ρ = {rho}",
                )
            ax.plot(curve["x"], curve["value"], marker, color=colour, markersize=3)
    for series, face in (("moved", "#E69F00"), ("stays", "#BBBBBB")):
        some = table[table["series"] == series]
        ax.plot(
            some["x"],
            some["value"],
            ".",
            color=face,
            markersize=4,
            zorder=0,
            label=f"{series} (ρ = 1.2)",
        )
    ax.set_xlim(-0.52, 0.52)
    ax.set_ylim(-0.52, 0.8)
    ax.set_xlabel("$k_*$, noise on the attended key")
    ax.set_ylabel("$k_t$, noise on the other key")
    _legend(ax, "lower right")


def _probability(ax: Axes, table: pd.DataFrame) -> None:
    shown = table.assign(
        x=100 * table["x"], value=100 * table["value"], predicted=100 * table["predicted"]
    )
    for placement, marker in zip(("none", "pre", "qkv"), "sox", strict=True):
        mine = shown[shown["placement"] == placement]
        for series, line in (("key noise", "-"), ("query noise", "--")):
            curve = mine[mine["series"] == series]
            label = PLACEMENT_NAMES[placement] if series == "key noise" else None
            ax.plot(
                curve["x"],
                curve["value"],
                marker,
                color=COLOURS[placement],
                markersize=4,
                label=label,
            )
            if placement == "none":
                ax.plot(
                    curve["x"], curve["predicted"], line, color="black", linewidth=1.0, zorder=1
                )
    ax.annotate("noise on k", (30, 50), (0, 6), textcoords="offset points", fontsize=8, ha="right")
    ax.annotate("noise on q", (30, 0), (0, 5), textcoords="offset points", fontsize=8, ha="right")
    ax.set_xlabel("RMS of the noise, σ (%)")
    ax.set_ylabel("draws that collapse the row (%)")
    _legend(ax, "center right")


def _isotropic(ax: Axes, table: pd.DataFrame) -> None:
    shown = table.assign(x=100 * table["x"])
    mine = shown[shown["placement"] == "pre"]
    styles = zip(mine["series"].unique(), RUNS, "os^x", strict=False)
    _curves(ax, mine, {("pre", s): (s, colour, marker) for s, colour, marker in styles})
    ax.set_xlabel("RMS of the key noise, σ (%), Pre-Norm")
    ax.set_ylabel("movement of the output\n(over the RMS of m)")
    _legend(ax, "upper left")
