"""Figure of the experiment `spectrum`: constructed networks above, models below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import groups, panels, pick
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, RUNS, grid, log_ticks, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PURPLE: Final = RUNS[3]
STYLES: Final = {(0, 0): "-", (1, 0): "--", (0, 1): ":", (1, 1): "-."}
WITH: Final = {(0, 0): "", (1, 0): "LayerNorm", (0, 1): "skip", (1, 1): "both"}


def figure(table: pd.DataFrame) -> Figure:
    """Spectra, rank in width, in depth, gradients; the models' gap, and their random start."""
    fig, axes = panels(3, 2, width=4.4, height=3.3)
    _spectra(axes[0], pick(table, what="spectrum"))
    _width(axes[1], pick(table, what="width", quantity="stable rank"))
    _depth(axes[2], pick(table, what="depth", quantity="stable rank"))
    axes[2].set_ylabel("stable rank of $XX^T$")
    axes[2].set_xlabel("layer")
    _depth(axes[3], pick(table, what="gradient", quantity="norm"), legend=True)
    axes[3].set_ylabel(r"$\|\partial X_L/\partial W_l\|_F$")
    axes[3].set_xlabel("layer $l$")
    _gap(axes[4], pick(table, what="trained"))
    _start(axes[5], pick(table, what="start", mask="none"), table)
    for ax in axes:
        grid(ax)
    return fig


def _curve(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    colour: str,
    style: str,
    *,
    geometric: bool = False,
    **more: Any,
) -> None:
    """Mean over seeds, and a band from the least to the greatest; no point where a seed has none.

    A geometric mean wants numbers above 0.
    """
    values = rows["value"].astype(float)
    if geometric:
        values = values.where(values > 0).map(math.log, na_action="ignore")
    by = values.groupby(rows[x]).agg(["mean", "min", "max"])[values.notna().groupby(rows[x]).all()]
    by = by.map(math.exp) if geometric else by
    ax.plot(by.index, by["mean"], style, color=colour, linewidth=1.3, markersize=4, **more)
    ax.fill_between(by.index, by["min"], by["max"], color=colour, alpha=0.18, linewidth=0)


def _tokens(ax: Axes, table: pd.DataFrame) -> None:
    ax.set_xscale("log")
    ticks = sorted(table["tokens"].unique().tolist())
    shown = [t for i, t in enumerate(ticks) if not i or t / ticks[i - 1] > 1.3]
    ax.set_xticks(shown, [str(t) for t in shown])
    ax.minorticks_off()
    ax.set_xlabel("tokens $T$")


def _spectra(ax: Axes, rows: pd.DataFrame) -> None:
    """One random matrix."""
    ax.set_title("random Markov matrices", fontsize=10)
    for mask, colour, style in (("none", BLUE, "o-"), ("causal", ORANGE, "s-")):
        for i, quantity in enumerate(("s1", "s2")):
            name = None if i else f"$s_1, s_2$, {'no mask' if mask == 'none' else 'causal'}"
            of = pick(rows, attention="markov", mask=mask, quantity=quantity)
            _curve(ax, of, "tokens", colour, style, label=name)
    for i, quantity in enumerate(("s1", "s2")):
        of = pick(rows, attention="uniform", mask="causal", quantity=quantity)
        _curve(ax, of, "tokens", ORANGE, ":", label=None if i else "uniform, causal")
    narrow = pick(rows, attention="softmax narrow", mask="none", quantity="s2")
    _curve(ax, narrow, "tokens", PURPLE, "^--", label="$s_2$, softmax, $d_{head}=16$, no mask")
    n = np.array(sorted(rows["tokens"].unique().tolist()), dtype=float)
    ax.plot(n, 2 / np.sqrt(n), "k--", linewidth=1, label=r"$2/\sqrt{T}$")
    _tokens(ax, rows)
    ax.set_ylim(0, 2.8)
    ax.set_ylabel("singular value")
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)


def _width(ax: Axes, rows: pd.DataFrame) -> None:
    """Rank behind one layer, against T."""
    ax.set_title("rank in width (one layer)", fontsize=10)
    for fix, colour in ((0, BLUE), (1, ORANGE)):
        for mask, style in (("none", "-"), ("causal", "--")):
            for attention, marker in (("markov", "o"), ("softmax", "x")):
                of = pick(rows, fix=fix, mask=mask, attention=attention)
                what = f"{'A - U' if fix else 'A'}, {'no mask' if mask == 'none' else 'causal'}"
                name = what if attention == "markov" else None
                _curve(ax, of, "tokens", colour, f"{marker}{style}", label=name)
    ax.plot([], [], "ko-", markersize=4, linewidth=0.8, label="random Markov")
    ax.plot([], [], "kx-", markersize=4, linewidth=0.8, label="softmax")
    _tokens(ax, rows)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    ax.set_ylim(0.9, 60)
    ax.set_ylabel("stable rank of $XX^T$")
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)


def _depth(ax: Axes, rows: pd.DataFrame, *, legend: bool = False) -> None:
    """Random Markov matrices without a mask, layer by layer."""
    from matplotlib.ticker import MaxNLocator

    rows = pick(rows, mask="none")
    n = int(rows["tokens"].iloc[0])
    kind = "gradients" if legend else "rank in depth"
    ax.set_title(f"{kind} (random Markov, no mask, $T$ = {n})", fontsize=10)
    for fix, scaled, colour in ((0, 0, BLUE), (1, 0, ORANGE), (1, 1, GREEN)):
        mine = pick(rows, attention="markov", fix=fix, scaled=scaled)
        for (norm, skip), style in STYLES.items():
            of = pick(mine, norm=norm, skip=skip)
            if len(of):
                _curve(ax, of, "layer", colour, style, geometric=legend)
    if legend:
        for name, colour in (("A", BLUE), ("A - U", ORANGE), (r"$\sqrt{T}$ (A - U)", GREEN)):
            ax.plot([], [], color=colour, label=name)
        for key, style in STYLES.items():
            ax.plot([], [], style, color="k", linewidth=1, label=WITH[key] or "neither")
        ax.legend(fontsize=7.5, frameon=False, ncols=2, loc="best")
    ax.set_yscale("log")
    if not legend:
        log_ticks(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _gap(ax: Axes, rows: pd.DataFrame) -> None:
    """The models' gap, each layer a thin line, beside that of uniform attention."""
    ax.set_title("trained models, their own mask", fontsize=10)
    gaps = pick(rows, quantity="gap")
    for colour, group in zip(_colours(groups(gaps)), groups(gaps), strict=True):
        mine = pick(gaps, group=group)
        for _, layer in mine.groupby("layer"):
            by = layer.groupby("tokens")["value"].mean()
            ax.plot(by.index, by, color=colour, linewidth=0.5, alpha=0.4)
        by = mine.groupby("tokens")["value"].mean()
        ax.plot(by.index, by, "o-", color=colour, markersize=4, linewidth=1.6, label=group)
    uniform = pick(rows, quantity="uniform_gap").groupby("tokens")["value"].mean()
    ax.plot(uniform.index, uniform, "k--", linewidth=1, label="uniform, same mask")
    _tokens(ax, rows)
    ax.set_ylim(0, 1.5 * float(gaps.groupby(["group", "layer", "tokens"])["value"].mean().max()))
    ax.set_ylabel("gap $s_1 - s_2$ (mean over heads)")
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)


def _start(ax: Axes, rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Second singular value of untrained models without a mask."""
    ax.set_title("our models before training, no mask", fontsize=10)
    ax.set_ylabel("$s_2$ (mean over heads), first layer")
    ax.yaxis.set_major_formatter(plain)
    first = pick(rows, quantity="s2", layer=0)
    for colour, group in zip(_colours(groups(first)), groups(first), strict=True):
        _curve(ax, pick(first, group=group), "tokens", colour, "o-", label=group)
    markov = pick(table, what="spectrum", attention="markov", mask="none", quantity="s2")
    _curve(ax, markov, "tokens", GREY, "-", label="random Markov")
    narrow = pick(table, what="spectrum", attention="softmax narrow", mask="none", quantity="s2")
    _curve(ax, narrow, "tokens", PURPLE, "^--", label="softmax, $d_{head}=16$")
    _tokens(ax, markov)
    top = max(float(x["value"].max()) for x in (first, markov, narrow) if len(x))
    ax.set_ylim(0, 1.5 * top)
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)


def _colours(names: list[str]) -> list[str]:
    colours = [c for c in RUNS if c != PURPLE]
    return [colours[i % len(colours)] for i in range(len(names))]
