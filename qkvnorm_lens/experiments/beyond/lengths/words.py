"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.lengths.measure import FROZEN, OUTLIERS, measured, of

MASSIVE: Final = 10.0
"""Lengths over the median beyond which a token is called long here."""


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """What moves by what is frozen; the layers of each group's first model; who has no norm."""
    known = measured(table)
    head = ["models", "seeds", "content rows", *(f"{name} frozen" for name in FROZEN)]
    rows = []
    for group, mine in core.by_group(known):
        whole = of(mine, "all")
        content = int((whole["rows"] - whole["sinks"]).sum())
        moved = [core.group_share(of(mine, name), "moved_content").percent() for name in FROZEN]
        rows.append([group, str(len(whole)), str(content), *moved])
    if rows:
        yield f"{core.markdown(head, rows)}\n\n{_LEGEND}\n"
    for _, mine in core.by_group(known):
        yield from _layers(mine[mine["model"] == mine["model"].iloc[0]])
    without = table[table["reason"] != "-"].groupby("reason", sort=False)["model"].unique()
    for reason, names in without.items():
        yield f"\nNot measured: {', '.join(names)} ({reason})."


_LEGEND: Final = (
    f"Percent of the sparse content rows that attend to another token once a part of s_t^2 = eps + "
    f"(1/d) sum_i x_ti^2 is the same for all tokens, in one layer at a time, k only. Outlier "
    f"dimensions: the {OUTLIERS} with the largest mean square over all tokens but the first, of "
    "each prompt and layer."
)


def _layers(mine: pd.DataFrame) -> Iterator[str]:
    """A model's layers, one by one."""
    every, spared = (of(mine, name, layers=True) for name in list(FROZEN)[:2])
    few, rest = (of(mine, name, layers=True) for name in list(FROZEN)[2:])
    head = ["layer", "outlier dimensions", "of the first", "of others", "first", "longest other"]
    head += ["content rows", "all frozen", "to the first", "first spared", "they go to"]
    head += ["outliers", "others", "KL all", "KL first spared", "KL outliers", "KL others"]
    rows = []
    for parts in zip(*(x.to_dict("records") for x in (every, spared, few, rest)), strict=True):
        one, other, outlier, left = parts
        goes = f"{one['winner']} ({100 * one['winner_share']:.0f}%, × {one['winner_length']:.2g})"
        cells = [one["label"], one["dimensions"], _percent(one["first_share"])]
        cells += [_percent(one["share"]), f"× {one['first_length']:.3g}"]
        cells += [f"{one['longest']} × {one['longest_length']:.2g}"]
        cells += [f"{int(one['rows'] - one['sinks'])}", _percent(one["moved_content"])]
        cells += [_percent(one["to_first"]), _percent(other["moved_content"])]
        cells += ["-" if one["winner"] == "-" else goes.replace("|", "\\|")]
        cells += [_percent(x["moved_content"]) for x in (outlier, left)]
        cells += [f"{x['kl']:.2g}" for x in parts]
        rows.append(cells)
    yield f"\n{mine['model'].iloc[0]}, layer by layer:\n\n{core.markdown(head, rows)}\n"
    yield (
        "Of the first, of others: the outlier dimensions' share of the squared length, in percent. "
        "First, longest other: length over the median of all tokens but the first. They go to: the "
        "token that most rows move to with the first one spared, its share of those rows, its "
        "length. KL: of the output, with q, k and v made from the frozen norm, nats per token."
    )
    yield from _long(every, spared)


def _long(every: pd.DataFrame, spared: pd.DataFrame) -> Iterator[str]:
    """The layers whose first token is long, beside those whose isn't."""
    long = every["first_length"] >= MASSIVE
    for name, chosen in (("at least", long), ("less than", ~long)):
        mine, other = every[chosen], spared[chosen.to_numpy()]
        content = mine["rows"] - mine["sinks"]
        if content.sum():
            moved = _weighted(mine["moved_content"], content)
            to_first = _weighted(mine["to_first"], content)
            left = _weighted(other["moved_content"], content)
            yield (
                f"\nFirst token {name} {MASSIVE:g} times as long as the median: {len(mine)} "
                f"layers, {int(content.sum())} content rows; {moved:.0f}% move, {to_first:.0f}% to "
                f"the first token; {left:.0f}% with the first token spared."
            )


def _weighted(shares: pd.Series, rows: pd.Series) -> float:
    """Percent of all rows, from shares by layer."""
    return 100 * float((shares.fillna(0).to_numpy() * rows.to_numpy()).sum() / rows.sum())


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.0f}"


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Outlier dimensions and massive activations, and what our rows owe to them."""
    for group, mine in core.by_group(measured(table)):
        layers, whole = of(mine, "all", layers=True), of(mine, "all")
        long = layers[layers["first_length"] >= MASSIVE]
        if core.is_language(mine):
            found = len(long) and (long["first_share"] > 0.9).mean() > 0.5
            yield core.Claim(
                f"few dimensions make the first token long ({group})",
                "a few activations, in fixed dimensions and at the first token among few others, "
                "are thousands of times larger than the median (Sun et al. 2024)",
                f"first token >= {MASSIVE:g} times the median length in {len(long)} of "
                f"{len(layers)} layers; {OUTLIERS} dimensions make {_range(long['first_share'])}% "
                f"of its squared length there, {_range(layers['share'])}% of the others' (all "
                "layers)",
                "yes" if found else "no",
                f"yes: at least {MASSIVE:g} times in a layer, and most of it in {OUTLIERS} "
                "dimensions",
            )
        if whole["moved_content"].notna().any():
            shares = [core.group_share(of(mine, n), "moved_content").percent() for n in FROZEN]
            yield core.Claim(
                f"content rows that hang on outlier dimensions' length ({group})",
                "not measured",
                "; ".join(f"{n} frozen {s}%" for n, s in zip(FROZEN, shares, strict=True)),
                "-",
                "one layer at a time, k only; what is frozen is the same for all tokens",
            )


def _range(values: pd.Series) -> str:
    some = 100 * values.astype(float)
    return f"{some.min():.0f} to {some.max():.0f}" if len(some) else "-"
