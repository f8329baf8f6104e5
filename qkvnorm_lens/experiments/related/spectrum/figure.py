"""Figure of the experiment `spectrum`: constructed networks above, models below."""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import groups, pick
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, RUNS, log_ticks, plain

PURPLE: Final = RUNS[3]
STYLES: Final = {(0, 0): "-", (1, 0): "--", (0, 1): ":", (1, 1): "-."}
WITH: Final = {(0, 0): "neither", (1, 0): "LayerNorm", (0, 1): "skip", (1, 1): "both"}
_MASKS: Final = {"none": "no mask", "causal": "causal"}
_KEY: Final[dict[str, Any]] = {"fontsize": 7.5, "loc": "upper left", "ncols": 2}


def figure(table: pd.DataFrame) -> core.Figure:
    """Spectra, rank in width, in depth, gradients; the models' gap, and their random start."""
    fig, axes = core.panels(3, 2, width=4.4, height=3.3)
    _spectra(axes[0], pick(table, what="spectrum"))
    _width(axes[1], pick(table, what="width", quantity="stable rank"))
    _depth(axes[2], pick(table, what="depth", quantity="stable rank"))
    axes[2].set(ylabel="stable rank of $XX^T$", xlabel="layer")
    _depth(axes[3], pick(table, what="gradient", quantity="norm"), legend=True)
    axes[3].set(ylabel=r"$\|\partial X_L/\partial W_l\|_F$", xlabel="layer $l$")
    _gap(axes[4], pick(table, what="trained"))
    _start(axes[5], pick(table, what="start", mask="none"), table)
    return fig


def _curve(
    ax: core.Axes,
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


def _by_tokens(ax: core.Axes, table: pd.DataFrame, title: str, **settings: Any) -> None:
    """The axis of T, the legend, title and labels."""
    ax.set_xscale("log")
    ticks = sorted(table["tokens"].unique().tolist())
    shown = [t for i, t in enumerate(ticks) if not i or t / ticks[i - 1] > 1.3]
    ax.set_xticks(shown, [str(t) for t in shown])
    ax.minorticks_off()
    core.finish(ax, title, xlabel="tokens $T$", **settings)
    core.key(ax, **_KEY)


def _spectra(ax: core.Axes, rows: pd.DataFrame) -> None:
    """One random matrix."""
    for (mask, said), colour, style in zip(_MASKS.items(), (BLUE, ORANGE), "os", strict=True):
        for quantity, name in (("s1", f"$s_1, s_2$, {said}"), ("s2", None)):
            of = pick(rows, attention="markov", mask=mask, quantity=quantity)
            _curve(ax, of, "tokens", colour, f"{style}-", label=name)
    for quantity, name in (("s1", "uniform, causal"), ("s2", None)):
        of = pick(rows, attention="uniform", mask="causal", quantity=quantity)
        _curve(ax, of, "tokens", ORANGE, ":", label=name)
    narrow = pick(rows, attention="softmax narrow", mask="none", quantity="s2")
    _curve(ax, narrow, "tokens", PURPLE, "^--", label="$s_2$, softmax, $d_{head}=16$, no mask")
    n = np.array(sorted(rows["tokens"].unique().tolist()), dtype=float)
    ax.plot(n, 2 / np.sqrt(n), "k--", linewidth=1, label=r"$2/\sqrt{T}$")
    _by_tokens(ax, rows, "random Markov matrices", ylim=(0, 2.8), ylabel="singular value")


def _width(ax: core.Axes, rows: pd.DataFrame) -> None:
    """Rank behind one layer, against T."""
    for (fix, colour, what), (mask, said) in itertools.product(
        ((0, BLUE, "A"), (1, ORANGE, "A - U")), _MASKS.items()
    ):
        for attention, marker in (("markov", "o"), ("softmax", "x")):
            of = pick(rows, fix=fix, mask=mask, attention=attention)
            name = f"{what}, {said}" if attention == "markov" else None
            style = marker + ("-" if mask == "none" else "--")
            _curve(ax, of, "tokens", colour, style, label=name)
    ax.plot([], [], "ko-", markersize=4, linewidth=0.8, label="random Markov")
    ax.plot([], [], "kx-", markersize=4, linewidth=0.8, label="softmax")
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    title = "rank in width (one layer)"
    _by_tokens(ax, rows, title, ylim=(0.9, 60), ylabel="stable rank of $XX^T$")


def _depth(ax: core.Axes, rows: pd.DataFrame, *, legend: bool = False) -> None:
    """Random Markov matrices without a mask, layer by layer."""
    rows = pick(rows, mask="none")
    cells = ((0, 0, BLUE, "A"), (1, 0, ORANGE, "A - U"), (1, 1, GREEN, r"$\sqrt{T}$ (A - U)"))
    for fix, scaled, colour, _ in cells:
        mine = pick(rows, attention="markov", fix=fix, scaled=scaled)
        for (norm, skip), style in STYLES.items():
            of = pick(mine, norm=norm, skip=skip)
            if len(of):
                _curve(ax, of, "layer", colour, style, geometric=legend)
    if legend:
        for *_, colour, name in cells:
            ax.plot([], [], color=colour, label=name)
        for parts, style in STYLES.items():
            ax.plot([], [], style, color="k", linewidth=1, label=WITH[parts])
        core.key(ax, fontsize=7.5, ncols=2, loc="best")
    ax.set_yscale("log")
    if not legend:
        log_ticks(ax.yaxis)
    core.whole_numbers(ax)
    kind, n = "gradients" if legend else "rank in depth", int(rows["tokens"].iloc[0])
    core.finish(ax, f"{kind} (random Markov, no mask, $T$ = {n})")


def _gap(ax: core.Axes, rows: pd.DataFrame) -> None:
    """The models' gap, each layer a thin line, beside that of uniform attention."""
    gaps = pick(rows, quantity="gap")
    for colour, group in _coloured(gaps):
        mine = pick(gaps, group=group)
        for _, layer in mine.groupby("layer"):
            by = layer.groupby("tokens")["value"].mean()
            ax.plot(by.index, by, color=colour, linewidth=0.5, alpha=0.4)
        by = mine.groupby("tokens")["value"].mean()
        ax.plot(by.index, by, "o-", color=colour, markersize=4, linewidth=1.6, label=group)
    uniform = pick(rows, quantity="uniform_gap").groupby("tokens")["value"].mean()
    ax.plot(uniform.index, uniform, "k--", linewidth=1, label="uniform, same mask")
    top = 1.5 * float(gaps.groupby(["group", "layer", "tokens"])["value"].mean().max())
    title = "trained models, their own mask"
    _by_tokens(ax, rows, title, ylim=(0, top), ylabel="gap $s_1 - s_2$ (mean over heads)")


def _start(ax: core.Axes, rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Second singular value of untrained models without a mask."""
    ax.yaxis.set_major_formatter(plain)
    first = pick(rows, quantity="s2", layer=0)
    for colour, group in _coloured(first):
        _curve(ax, pick(first, group=group), "tokens", colour, "o-", label=group)
    markov = pick(table, what="spectrum", attention="markov", mask="none", quantity="s2")
    _curve(ax, markov, "tokens", GREY, "-", label="random Markov")
    narrow = pick(table, what="spectrum", attention="softmax narrow", mask="none", quantity="s2")
    _curve(ax, narrow, "tokens", PURPLE, "^--", label="softmax, $d_{head}=16$")
    top = 1.5 * max(float(x["value"].max()) for x in (first, markov, narrow) if len(x))
    ax.set_ylabel("$s_2$ (mean over heads), first layer")
    _by_tokens(ax, markov, "our models before training, no mask", ylim=(0, top))


def _coloured(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Groups, each with its colour before it."""
    return list(zip(itertools.cycle(c for c in RUNS if c != PURPLE), groups(rows), strict=False))
