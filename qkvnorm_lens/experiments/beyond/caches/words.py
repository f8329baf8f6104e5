"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.caches.decoding import PROMPT, SPAN
from qkvnorm_lens.experiments.beyond.caches.measure import (
    BUDGETS,
    GRADIENTS,
    NAMES,
    PREDICTORS,
    against,
    rank_correlations,
)

WANTED: Final = 0.9
CHEAPER: Final = 20
MOST: Final = 4  # formats


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Rank correlations, cost, and recipes of equal bits; lost cases by name."""
    found = rank_correlations(table)
    columns = (*PREDICTORS, "halves", "ratio")
    names = (*(NAMES[name] for name in PREDICTORS), "isolated KL, half and half", "risk / isolated")
    head = ["model", "format", *names]
    rows = [
        [r["model"], r["format"], *(_two(r[name]) for name in columns)]
        for r in found.to_dict("records")
    ]
    yield f"{core.markdown(head, rows)}\n\n{_LEGEND}\n"
    for name in dict.fromkeys(table["model"]):
        yield from _of_model(table, found, str(name))
        yield from _decoded(table, str(name))
    yield "Nothing was published of these models."


_LEGEND: Final = (
    "Spearman's rank correlation over layers with isolated KL: KL(clean || cached) of the output, "
    "with one layer's keys (then its values) in the format, both added up. Cache risk: 1/2 sum_t "
    "E[(g_t . dx_t)^2] of the same prompts, from two gradients and from eight. Score error: "
    "variance of the scores' errors under the row's attention (values: relative error). Gradient "
    "norm, entropy, the first and last two layers and norm-only sigma weigh a layer's relative "
    "error. Half and half: isolated KL of every other prompt with that of the rest, which is how "
    "far the reference itself depends on what is read. The last column is the sum of the risk's "
    "nats over that of the isolated ones."
)


def _two(x: Any) -> str:
    return "-" if math.isnan(x) else f"{x:.2f}"


def _of_model(table: pd.DataFrame, found: pd.DataFrame, model: str) -> Iterator[str]:
    mine = found[found["model"] == model]
    times = table[(table["what"] == "seconds") & (table["model"] == model)].iloc[0]
    yield (
        f"\n**{model}**: isolated KL of all layers and formats, keys and values in one pass, takes "
        f"{float(times['isolated']):.3g} s.\n"
    )
    for name, n in GRADIENTS.items():
        bad = mine[mine[name] < WANTED]["format"].tolist()
        left = f"; not in {', '.join(bad)}" if bad else ""
        yield (
            f"The risk with {n} gradients, errors of rows included: {float(times[name]):.3g} s. It "
            f"ranks layers as isolated KL does (Spearman {WANTED:g} or more) in "
            f"{len(mine) - len(bad)} of {len(mine)} formats{left}.\n"
        )
    for budget in BUDGETS:
        judged = against(table, model, budget)
        if len(judged) < 2 or "risk" not in set(judged["choice"]):
            continue
        head = ["choice", "bits", "KL", "same best token", "more KL than ours", "less agreement"]
        rows = [
            [
                NAMES.get(r["choice"], r["choice"]),
                f"{r['bits']:.2f}",
                f"{r['kl']:.3g}",
                f"{100 * r['agreement']:.1f}%",
                _with(r["more_kl"], r["more_kl_half"], 1.0),
                _with(r["less_agreement"], r["less_agreement_half"], 100.0),
            ]
            for r in judged.sort_values("kl").to_dict("records")
        ]
        yield f"At most {budget:g} bits, on other text:\n\n{core.markdown(head, rows)}\n"
        yield _verdict(judged)


def _decoded(table: pd.DataFrame, model: str) -> Iterator[str]:
    """What a long text does to each cache: first and last span."""
    rows = table[(table["what"] == "step") & (table["model"] == model)]
    if not len(rows):
        return
    first, last = rows["step"].min(), rows["step"].max()
    head = ["cache", "KL", "same best token", "norms of new keys", "1 - cos of new keys"]
    head += ["norms of the prompt's", "1 - cos of the prompt's"]
    lines = []
    for name, mine in rows.groupby("format", sort=False):
        a, b = (mine[mine["step"] == step].iloc[0] for step in (first, last))
        lines.append(
            [
                str(name),
                f"{a['kl']:.2g} to {b['kl']:.2g}",
                f"{a['agreement']:.0%} to {b['agreement']:.0%}",
                *(
                    f"{100 * a[c]:.2g}% to {100 * b[c]:.2g}%"
                    if c.startswith("norm")
                    else f"{a[c]:.2g} to {b[c]:.2g}"
                    for c in ("norm_new", "direction_new", "norm_prompt", "direction_prompt")
                ),
            ]
        )
    yield (
        f"Decoding {last:,.0f} tokens that the full cache draws, every cache reading its own keys "
        f"(prompt of {PROMPT} tokens; errors against the full cache's keys, RMS of norms, mean of "
        f"1 - cos; the first {first:,.0f} steps to the last {SPAN}):\n\n"
        f"{core.markdown(head, lines)}\n"
    )
    ends = [mine.sort_values("step").iloc[[0, -1]] for _, mine in rows.groupby("format")]
    grow = {
        c: sum(float(e[c].iloc[1]) > 1.25 * float(e[c].iloc[0]) for e in ends)
        for c in ("norm_new", "direction_new", "norm_prompt", "direction_prompt")
    }
    yield (
        f"More than a quarter larger at the end than at the beginning: norm errors of new keys in "
        f"{grow['norm_new']} of {len(ends)} caches and their directions in "
        f"{grow['direction_new']}; of the prompt's keys {grow['norm_prompt']} and "
        f"{grow['direction_prompt']}.\n"
    )


def _with(x: float, half: float, times: float) -> str:
    if x == 0 and (half == 0 or math.isnan(half)):
        return "-"
    return f"{times * x:+.2g} ± {times * half:.2g}"


def _verdict(judged: pd.DataFrame) -> str:
    others = judged[judged["choice"] != "risk"]
    more, half = others["more_kl"], others["more_kl_half"]
    lost, same = others[more < 0], others[(more == 0) & ~(half > 0)]
    open_ = others[(more > 0) & (more - half <= 0)]
    less = others[others["less_agreement"] < 0]
    parts = [f"Our recipe has lower KL than {int((more > 0).sum())} of {len(others)} others"]
    if len(same):
        parts.append(f"is the same as that of {_list(same)}")
    if len(lost):
        parts.append(f"has higher KL than {_list(lost)}")
    if len(open_):
        parts.append(f"over prompts it is not decided against {_list(open_)}")
    if len(less):
        parts.append(f"its agreement is lower than that of {_list(less)}")
    return f"{'; '.join(parts)}.\n"


def _list(rows: pd.DataFrame) -> str:
    return ", ".join(NAMES.get(name, name) for name in rows["choice"])


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """What was asked of the risk: the ranks of isolated KL, for much less."""
    seconds: Any = table[table["what"] == "seconds"].set_index("model")
    for model, mine in rank_correlations(table).groupby("model", sort=False):
        for name, n in GRADIENTS.items():
            good = int((mine[name] >= WANTED).sum())
            times = float(seconds.loc[model, "isolated"]) / float(seconds.loc[model, name])
            yield core.Claim(
                f"layers ranked by cache risk, {n} gradients, as by isolated KL, {model}",
                "nothing",
                f"Spearman {WANTED:g} or more in {good} of {len(mine)} formats "
                f"({_two(mine[name].min())} to {_two(mine[name].max())}); isolated KL takes "
                f"{times:.2g} times as long",
                core.decide(good >= min(MOST, len(mine)), times >= CHEAPER),
                f"asked: in {MOST} formats, and {CHEAPER} times as long, which takes many layers: "
                "isolated KL is a pass for each layer and format",
            )
