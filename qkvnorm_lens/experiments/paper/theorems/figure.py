"""The experiment's figure."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, RUNS, plain

PLACEMENTS: Final = dict(zip(("none", "pre", "qkv"), "sox", strict=True))
_OVER_FIRST: Final = "score of head A (over first)"
_SHOWN: Final = 101.0  # the factor on the scores up to which curves are drawn


def figure(table: pd.DataFrame) -> core.Figure:
    """Nine panels: points were measured on our blocks, lines are what a theorem predicts."""
    fig, axes = core.panels(3, 3, width=3.5, height=3.0)
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
        ax.tick_params(labelsize=8)
        core.finish(ax, title)
    fig.suptitle("points: measured on our blocks; lines: what the theorem predicts", fontsize=10)
    return fig


def _curves(ax: core.Axes, table: pd.DataFrame, *named: tuple[str, str, str, str, str]) -> None:
    """Points and predicted lines of (placement, series), with (label, colour, marker).

    Where there are many points each curve shows others, so that equal ones can be seen.
    """
    for i, (placement, series, label, colour, marker) in enumerate(named):
        mine = core.pick(table, placement=placement, series=series)
        style: dict[str, Any] = {"color": colour, "label": label}
        style["markersize"] = {"x": 6, "+": 9}.get(marker, 4)
        if len(mine) > 3 * len(named):
            style["markevery"] = (i, len(named))
        ax.plot(mine["x"], mine["predicted"], color=colour, linewidth=1.2)
        ax.plot(mine["x"], mine["value"], marker, **style)


def _legend(ax: core.Axes, where: Any) -> None:
    ax.legend(loc=where, fontsize=7.5, handletextpad=0.3, borderpad=0.3, labelspacing=0.3)


def _turning(ax: core.Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        ("none", "independent subspaces", "No-Norm, independent", GREEN, "s"),
        ("qkv", "independent subspaces", "QKV-Norm, independent", ORANGE, "x"),
        ("pre", "orthogonal subspaces", "Pre-Norm, orthogonal", BLUE, "+"),
        ("pre", "independent subspaces", "Pre-Norm, independent", BLUE, "o"),
    )
    ax.set(xlabel="angle of B's content (turns)", ylabel=_OVER_FIRST, ylim=(0.75, 2.65))
    _legend(ax, "upper left")


def _growing(ax: core.Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        ("none", "independent subspaces", "No-Norm", GREEN, "s"),
        ("qkv", "independent subspaces", "QKV-Norm", ORANGE, "x"),
        ("pre", "orthogonal subspaces", "Pre-Norm, RMSNorm", BLUE, "o"),
        ("pre", "LayerNorm, orthogonal subspaces", "Pre-Norm, LayerNorm", BLUE, "+"),
    )
    _log2(ax)
    ax.set(xlabel="length of B's content (over first)", ylabel=_OVER_FIRST, ylim=(0, 1.1))
    _legend(ax, "lower left")


def _log2(ax: core.Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(plain)


def _matching(ax: core.Axes, table: pd.DataFrame) -> None:
    series = "attention on the match"
    _curves(
        ax,
        table,
        ("none", series, "No-Norm", GREEN, "s"),
        ("qkv", series, "QKV-Norm", ORANGE, "x"),
        ("pre", series, "Pre-Norm", BLUE, "o"),
    )
    jump = float(table[table["series"] == "arg max jumps"]["value"].iloc[0])
    ax.axvline(jump, color=GREY, linewidth=0.9, linestyle=":")
    beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "color": GREY}
    ax.annotate("arg max\njumps", (jump, 0.5), fontsize=7.5, **beside)
    _log2(ax)
    ax.set(xlabel="length of the match's content in B", ylabel=series)
    _legend(ax, "lower left")


def _offset(ax: core.Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        ("pre", "B turns on its circle", "b turns, r = 1", GREEN, "s"),
        ("pre", "B leaves its circle", "r grows from 1 to 3", BLUE, "o"),
    )
    ax.set(xlabel="turns of b, or (r - 1)/2", ylim=(0.82, 1.03))
    ax.set_ylabel("Pre-Norm's score of head A\n(over first)")
    _legend(ax, "lower left")


def _freedom(ax: core.Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        ("none", "No-Norm", "No-Norm: 0", GREEN, "s"),
        ("qkv", "QKV-Norm", "QKV-Norm: $N_s$", ORANGE, "x"),
        ("pre", "Pre-Norm, RMSNorm", "Pre-RMSNorm: $N_s$", BLUE, "+"),
        ("pre", "Pre-Norm, LayerNorm", "Pre-LayerNorm: $N_s+1$", BLUE, "o"),
    )
    ax.set(xticks=sorted(table["x"].unique()), ylim=(-0.4, table["value"].max() + 2.2))
    ax.set(xlabel="number of subspaces $N_s$", ylabel="dimensions lost, of N")
    _legend(ax, "upper left")


def _limits(ax: core.Axes, table: pd.DataFrame) -> None:
    """Pre-Norm's curves; the isotropic limit as dashes at the left, the sparse one at the right."""
    mine = table[table["placement"] == "pre"]
    sites = dict(zip("qkv", RUNS, strict=False))
    along = [("pre", site, f"noise on {site}", colour, "o") for site, colour in sites.items()]
    _curves(ax, mine[mine["x"] <= _SHOWN], *along)
    for site, colour in sites.items():
        for end, span in (("isotropic", (0.0, 0.12)), ("sparse", (0.88, 1.0))):
            limit = mine[mine["series"] == f"{site}, {end}"]["predicted"].iloc[0]
            ax.axhline(limit, *span, color=colour, linewidth=1.0, linestyle="--")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.set(xlim=(0.01 / 1.5, _SHOWN * 1.5), xlabel="factor on the scores (Pre-Norm)")
    ax.set_ylabel("movement of the output\nper unit of noise")
    _legend(ax, "upper left")


def _boundary(ax: core.Axes, table: pd.DataFrame) -> None:
    line: dict[str, Any] = {"color": "black", "linewidth": 1.0}
    for placement, marker in PLACEMENTS.items():
        mine = table[table["placement"] == placement]
        rhos = sorted((s for s in mine["series"].unique() if s[0].isdigit()), key=float)
        for rho, dash in zip(rhos, ("-", "--", ":"), strict=False):
            curve = mine[mine["series"] == rho]
            if placement == "none":
                ax.plot(curve["x"], curve["predicted"], dash, label=f"ρ = {rho}", **line)
            colour = core.COLOURS[placement]
            ax.plot(curve["x"], curve["value"], marker, color=colour, markersize=3)
    for series, face in (("moved", "#E69F00"), ("stays", "#BBBBBB")):
        some, name = table[table["series"] == series], f"{series} (ρ = 1.2)"
        ax.plot(some["x"], some["value"], ".", color=face, markersize=4, zorder=0, label=name)
    ax.set(xlim=(-0.52, 0.52), xlabel="$k_*$, noise on the attended key")
    ax.set(ylim=(-0.52, 0.8), ylabel="$k_t$, noise on the other key")
    _legend(ax, "lower right")


def _probability(ax: core.Axes, table: pd.DataFrame) -> None:
    for placement, marker in PLACEMENTS.items():
        for series, dash in (("key noise", "-"), ("query noise", "--")):
            curve = core.pick(table, placement=placement, series=series)
            x, value, predicted = 100 * curve[["x", "value", "predicted"]].to_numpy().T
            name = core.PLACEMENT_NAMES[placement] if series == "key noise" else None
            colour = core.COLOURS[placement]
            ax.plot(x, value, marker, color=colour, markersize=4, label=name)
            if placement == "none":
                ax.plot(x, predicted, dash, color="black", linewidth=1.0, zorder=1)
    beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": "right"}
    ax.annotate("noise on k", (30, 50), (0, 6), **beside)
    ax.annotate("noise on q", (30, 0), (0, 5), **beside)
    ax.set(xlabel="RMS of the noise, σ (%)", ylabel="draws that collapse the row (%)")
    _legend(ax, "center right")


def _isotropic(ax: core.Axes, table: pd.DataFrame) -> None:
    mine = table[table["placement"] == "pre"].assign(x=lambda t: 100 * t["x"])
    styles = zip(mine["series"].unique(), RUNS, "os^x", strict=False)
    _curves(ax, mine, *(("pre", s, s, colour, marker) for s, colour, marker in styles))
    ax.set_xlabel("RMS of the key noise, σ (%), Pre-Norm")
    ax.set_ylabel("movement of the output\n(over the RMS of m)")
    _legend(ax, "upper left")
