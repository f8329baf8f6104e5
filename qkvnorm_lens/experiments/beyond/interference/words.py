"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.interference.measure import MOVED, SPARED, measured, of


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """What really moves beside what noise of that size would move; lengths; who has no norm."""
    known = measured(table)
    head = ["models", "seeds", "content rows", "sinks", "spread of s", "moved", "first spared"]
    head += ["independent", "shuffled", "lengths alone", "directions alone"]
    rows = []
    for group, mine in core.by_group(known):
        whole, spared = of(mine, "model"), of(mine, "model", first=SPARED[True])
        sinks = whole.assign(share=whole["sinks"] / whole["rows"])
        rows.append(
            [
                group,
                str(len(whole)),
                f"{int((whole['rows'] - whole['sinks']).sum())}",
                core.group_share(sinks, "share").percent(0),
                core.group_mean(whole, "scale_spread_rest").percent(),
                _really(whole),
                _really(spared),
                core.group_share(whole, "predicted_content").percent(2),
                core.group_share(whole, "permuted_content").percent(2),
                core.group_mean(whole, "length_share").percent(),
                core.group_mean(whole, "direction_share").percent(),
            ]
        )
    if rows:
        yield f"{core.markdown(head, rows)}\n\n{_LEGEND}\n"
    for group, mine in core.by_group(known):
        yield from _findings(group, mine)
    without = table[table["reason"] != "-"].groupby("reason", sort=False)["model"].unique()
    for reason, names in without.items():
        yield f"Not measured: {', '.join(names)} ({reason})."


_LEGEND: Final = (
    "In percent, with 95% intervals over seeds (of one model: the standard error over prompts). "
    "Content rows: sparse rows (max >= 0.95) that attend to another than the first token; sinks: "
    "the others' share. Moved: content rows that attend to another token once the norm in front of "
    "their layer divides every token by one constant (each prompt's median scale; k only, one "
    "layer at a time); first spared: the first token keeps its own scale. Independent: the exact "
    "share that independent noise on the keys would move, of the spread that each row sees; "
    "shuffled: the same factors, shuffled among the prompt's tokens. Spread of s: deviation of the "
    "scales over their mean, without the first token. Lengths alone, directions alone: what "
    "remains of the scores' variance over a row's keys; the two need not add up to one. No paper "
    "has these numbers: Menary et al. 2024 simulate interference and name this as missing."
)

_AGAINST: Final = {
    True: "more than independent noise says",
    False: "less than it says",
    None: "the difference is not decided",
}


def _really(models: pd.DataFrame) -> str:
    """Share that really moved, with its interval over seeds or, of one model, its error."""
    found = core.group_share(models, MOVED)
    if found.n != 1 or models["se_content"].isna().all():
        return found.percent(2)
    return f"{found.percent(2)} (s.e. {100 * models['se_content'].iloc[0]:.2f})"


def _findings(group: str, mine: pd.DataFrame) -> Iterator[str]:
    """Sentences about one group."""
    gap = excess(of(mine, "model"))
    if not math.isnan(gap.value):
        yield (
            f"{group}: really moved minus predicted {_points(gap)} points "
            f"({core.counted(gap.n, 'model')}): {_AGAINST[core.above(gap)]}."
        )
    first = of(mine, "model")["to_first"].mean()
    if first > 0.005:
        yield f"{group}: {100 * first:.1f}% of the content rows move to the first token."
    yield from _by_constant(group, mine)
    layers = of(mine, "layer", on="qk").dropna(subset=["kl"])
    if len(layers):
        worst = layers.sort_values("kl").iloc[-1]
        yield (
            f"{group}: with q, k and v of one layer frozen the answers' KL from the model's own is "
            f"{layers['kl'].min():.2g} to {worst['kl']:.2g} nats per token (most in "
            f"{worst['label']} of {worst['model']}; {100 * worst['agree']:.0f}% keep their token)."
        )


def _by_constant(group: str, mine: pd.DataFrame) -> Iterator[str]:
    """What the constant changes, where several were tried."""
    for first in SPARED.values():
        rates = core.pick(mine, by="model", first=first, on="k")
        by_model = rates.groupby("model")["moved"]
        if rates["constant"].nunique() < 2:
            continue
        change = float((by_model.max() - by_model.min()).max())
        low, high = rates["constant"].min(), rates["constant"].max()
        what = (
            "changes no count"
            if change == 0
            else f"changes the share of all sparse rows, sinks too, by up to "
            f"{100 * change:.2g} points"
        )
        where = "the first token frozen too" if first == SPARED[False] else "the first token spared"
        yield f"{group}: with {where}, the constant ({low:g} to {high:g} times the median) {what}."


def excess(models: pd.DataFrame) -> core.Mean:
    """Share really moved minus the share that independent noise would move, over the models."""
    both = models.assign(gap=models[MOVED] - models["predicted_content"])
    return core.group_mean(both, "gap").cut(-1.0, 1.0)


def _points(gap: core.Mean) -> str:
    """``+0.30 ± 0.12``, in percent; never ``-0.00``."""
    said = gap.percent(2, "+")
    return f"+{said[1:]}" if said.startswith("-0.00") else said


def _each(models: pd.DataFrame, column: str) -> str:
    """Each model's share, in percent."""
    return ", ".join(f"{100 * v:.2f}" for v in models[column].astype(float).dropna())


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """What the paper could only simulate, by group."""
    for group, mine in core.by_group(measured(table)):
        whole = of(mine, "model")
        moved, noise, gap = (
            core.group_share(whole, MOVED),
            core.group_share(whole, "predicted_content"),
            excess(whole),
        )
        if math.isnan(moved.value):
            continue
        seeds = core.counted(moved.n, "model")
        yield core.Claim(
            f"content rows that depend on the common length ({group})",
            "not measured: interference is simulated, not observed (limitations)",
            f"{moved.percent(2)}% ({seeds}: {_each(whole, MOVED)}); with the first token "
            f"spared {_each(of(mine, 'model', first=SPARED[True]), MOVED)}",
            "-",
            "the norm's scale frozen at one constant, one layer at a time; no noise; first "
            "token spared: it keeps its own scale",
        )
        yield core.Claim(
            f"independent noise as a stand-in for interference ({group})",
            "assumed (Fig. 2, 3): real noise may be correlated (limitations)",
            f"{noise.percent(2)}% predicted at the rows' own spread; really {_points(gap)} points",
            "-",
            "the scales of a row's tokens are no independent draws; the same factors shuffled "
            f"move {core.group_share(whole, 'permuted_content').percent(2)}%",
        )
