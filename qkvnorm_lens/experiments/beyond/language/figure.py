"""The experiment's figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.language.measure import GRAMS
from qkvnorm_lens.experiments.core import traits
from qkvnorm_lens.plots.charts import GREY, plain

_CACHES: Final = ("int8", "fp8 e5m2", "int4 KIVI", "int4")
_GAUGES: Final = {core.PLAIN: "-", "content": "--", "centred gauge": ":"}
Values = Callable[[pd.DataFrame], pd.Series]


def figure(table: pd.DataFrame) -> core.Figure:
    """Loss, rows, collapse, spread, rank, spectrum, caches, interference; dots are seeds."""
    fig, axes = core.panels(2, 4, width=3.1, height=2.9)
    groups = core.by_group(table)
    _draw_loss(axes[0], groups)
    _draw_rows(axes[1], groups)
    _draw_curves(axes[2], groups)
    _draw_spread(axes[3], groups)
    _draw_depth(axes[4], groups, "mean_cosine", "mean |cosine| of tokens", "rank: tokens by depth")
    _draw_gap(axes[5], groups)
    _draw_caches(axes[6], groups)
    _draw_interference(axes[7], groups)
    core.legend_below(fig, axes[4], ncols=4, frameon=False)
    return fig


def _name(mine: pd.DataFrame) -> str:
    return core.PLACEMENT_NAMES[core.placement_of(mine)]


def _colour(mine: pd.DataFrame) -> str:
    return core.COLOURS[core.placement_of(mine)]


def _dots(
    ax: core.Axes,
    groups: list[tuple[str, pd.DataFrame]],
    names: Sequence[str],
    values: Callable[[pd.DataFrame, str], pd.Series],
) -> None:
    """A place for each name, within it each placement's seeds, and their mean as a line."""
    for g, (_, mine) in enumerate(groups):
        for x, name in enumerate(names):
            at = x + 0.18 * (g - (len(groups) - 1) / 2)
            seeds = values(mine, name).dropna()
            style: dict[str, Any] = {"color": _colour(mine)}
            ax.plot([at] * len(seeds), seeds, ".", markersize=5, **style)
            if len(seeds):
                ax.plot([at - 0.07, at + 0.07], [seeds.mean()] * 2, linewidth=1.5, **style)
    ax.set_xticks(range(len(names)), list(names), fontsize=7)


def _draw_loss(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    for g, (_, mine) in enumerate(groups):
        seeds = traits.whole(mine, "loss")
        ax.plot([g] * len(seeds), seeds, ".", color=_colour(mine), markersize=6)
    for name in GRAMS[1:]:
        level = traits.whole(groups[0][1], "loss", name).iloc[0]
        ax.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
        ax.text(-0.4, level, name, fontsize=7, va="bottom", color=GREY)
    ax.set_xticks(range(len(groups)), [_name(mine) for _, mine in groups], fontsize=7)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.margins(y=0.12)
    core.finish(ax, "held-out books", size=9, ylabel="loss (nats per token)")


def _draw_rows(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    names = {
        "rows sparse": "sparse share",
        "of these sinks": "sink share",
        "attention to\nthe first token": "first token's attention",
    }
    _dots(ax, groups, list(names), lambda mine, name: 100 * traits.whole(mine, names[name]))
    core.finish(ax, "sparse rows and sinks", size=9, ylabel="%")
    ax.set_ylim(bottom=0)


def _draw_curves(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    """The mean over seeds of the loose rate, of the content rows' and in the centred gauge."""
    for _, mine in groups:
        for variant, line in _GAUGES.items():
            rows = core.pick(mine, quantity="loose", variant=variant, layer=traits.WHOLE)
            mean = 100 * rows.groupby("at")["value"].mean()
            ax.plot(100 * mean.index, mean, line, color=_colour(mine), linewidth=1.1)
    for variant, line in _GAUGES.items():
        ax.plot([], [], line, color=GREY, label="all" if variant == core.PLAIN else variant)
    ax.set(xscale="log", yscale="log", ylim=(0.01, 100))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
    ax.axhline(1, color=GREY, linewidth=0.6)
    core.key(ax)
    labels = {"xlabel": "RMS of the noise, σ (%)", "ylabel": "sparse rows that collapse (%)"}
    core.finish(ax, "loose collapse", size=9, **labels)


def _draw_spread(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    _dots(
        ax, groups, traits.VECTORS,
        lambda mine, name: 100 * traits.whole(mine, "spread", name),
    )  # fmt: skip
    ax.axhspan(20, 30, color=GREY, alpha=0.2, linewidth=0)
    core.finish(ax, "lengths (grey: Pre-Norm, published)", size=9, ylabel="90% within ± (%)")
    ax.set_ylim(bottom=0)


def _draw_depth(
    ax: core.Axes, groups: list[tuple[str, pd.DataFrame]], quantity: str, said: str, title: str
) -> None:
    for _, mine in groups:
        rows = core.pick(mine, quantity=quantity)
        mean = rows.groupby("at")["value"].mean()
        ax.plot(mean.index, mean, color=_colour(mine), label=_name(mine), linewidth=1.4)
        ax.plot(rows["at"], rows["value"], ".", color=_colour(mine), markersize=3)
    core.finish(ax, title, size=9, xlabel="depth (blocks)", ylabel=said)


def _draw_gap(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    for _, mine in groups:
        rows = traits.by_layer(mine, "gap")
        mean = rows.groupby("layer")["value"].mean()
        ax.plot(mean.index, mean, color=_colour(mine), linewidth=1.4)
        ax.plot(rows["layer"], rows["value"], ".", color=_colour(mine), markersize=3)
    level = traits.by_layer(groups[0][1], "uniform_gap")["value"].iloc[0]
    ax.axhline(level, color=GREY, linewidth=0.8, linestyle=":", label="causal mask alone")
    core.key(ax)
    core.whole_numbers(ax)
    core.finish(ax, "spectral gap of attention", size=9, xlabel="layer", ylabel="s1 - s2")


def _draw_caches(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    _dots(ax, groups, _CACHES, lambda mine, name: traits.whole(mine, "cache: KL", name))
    ax.set_yscale("log")
    core.finish(ax, "a quantised cache", size=9, ylabel="KL from the model's own (nats)")


def _draw_interference(ax: core.Axes, groups: list[tuple[str, pd.DataFrame]]) -> None:
    """Only models with a norm on the block's input have it."""
    names = {"frozen": core.PLAIN, "first spared": "first token spared",
             "independent\nnoise": "independent noise"}  # fmt: skip
    _dots(
        ax, groups, list(names),
        lambda mine, name: 100 * traits.whole(mine, "interference", names[name]),
    )  # fmt: skip
    ax.set_ylim(bottom=0)
    core.finish(ax, "interference (a norm before W_Q, W_K)", size=9, ylabel="content rows (%)")
