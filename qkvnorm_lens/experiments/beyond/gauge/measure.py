"""How much of a difference in collapse rates is a difference in score level only.

softmax ignores a constant added to a row's scores, w -> w + c; the collapse rate does not, for
noise multiplies. Two models with the same attention patterns can so differ in their rates. Shown:
each model's rate at its own level, in the centred gauge (each row's mean visible q.k part taken
away), and as a function of the level, every row moved by one constant so that the model's mean
attended q.k part is the level wanted.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch

from qkvnorm_lens.experiments.core import (
    AMOUNT,
    COLOURS,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    groups,
    label,
    mean,
    panels,
    reading,
)
from qkvnorm_lens.plots.charts import log_ticks, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMAS: Final = (0.05, 0.1, 0.2)
LEVELS: Final = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 150.0, 300.0, 600.0)
ROWS: Final[dict[Size, int]] = {"smoke": 60, "quick": 300, "full": 1000}
_SEED: Final = 5


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Rates of one model by sigma and score level, on a sample of its sparse rows."""
    import hooks

    model = subject.load()
    tokens = reading(subject, AMOUNT[size]).ids
    report = hooks.collapse_probe(model, tokens, sigmas=SIGMAS, draws=0, progress=False)
    whole = report.to_frame("model")
    rows: list[dict[str, Any]] = []

    def add(quantity: str, sigma: float, level: float, value: float, n: int) -> None:
        rows.append(
            {"quantity": quantity, "sigma": sigma, "level": level, "value": value, "rows": n}
        )

    own = float(whole["score_level"].iloc[0])
    n = report.n_sparse
    for quantity, column, level in (
        ("own level", "loose", own),
        ("own level without sinks", "loose_content", own),
        ("centred gauge", "loose_centred", math.nan),
    ):
        for sigma, rate in zip(SIGMAS, whole[column].astype(float), strict=True):
            add(quantity, sigma, level, rate, n)
    s_star, s, rivals = sparse_rows(model, tokens, ROWS[size])
    if len(s_star):
        level = float(s_star.mean())
        for sigma in SIGMAS:
            rate = rate_at(s_star, s, rivals, sigma, 0.0)
            add("sampled rows, own level", sigma, level, rate, len(s_star))
            for wanted in LEVELS:
                rate = rate_at(s_star, s, rivals, sigma, wanted - level)
                add("level", sigma, wanted, rate, len(s_star))
    frame = pd.DataFrame(rows)
    return pd.concat([pd.DataFrame([subject.columns] * len(frame)), frame], axis=1)


def sparse_rows(
    model: Any, tokens: Any, limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sample of the sparse rows: attended q.k part, all q.k parts, which keys are competitors.

    Rows of a layer with added biases are left out: there a constant on s is not one on w.
    """
    from hooks import SPARSE, attention_sites
    from hooks.model import encode
    from hooks.sites import LayerView, observe

    sites = [s for s in attention_sites(model) if not s.has_bias]
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_layer(view: LayerView) -> None:
        top = view.pattern.amax(-1)
        chosen = (top >= SPARSE) & (view.visible.sum(-1) > 1)
        s, seen = view.parts.s[chosen], view.visible[chosen]
        star = view.scores[chosen].argmax(-1, keepdim=True)
        found.append((s.gather(1, star).squeeze(1), s, seen.scatter(1, star, False)))

    observe(model, sites, encode(model, tokens), on_layer)
    width = max((s.shape[1] for _, s, _ in found), default=0)
    total = sum(len(s) for s, _, _ in found)
    if not total:
        return torch.zeros(0), torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool)
    pick = np.random.default_rng(_SEED).permutation(total)[:limit]
    pick.sort()
    s_star = torch.cat([a for a, _, _ in found])[pick]
    pad = torch.nn.functional.pad
    s = torch.cat([pad(b, (0, width - b.shape[1])) for _, b, _ in found])[pick]
    rivals = torch.cat([pad(c, (0, width - c.shape[1])) for _, _, c in found])[pick]
    return s_star.double(), s.double(), rivals


def rate_at(
    s_star: torch.Tensor, s: torch.Tensor, rivals: torch.Tensor, sigma: float, shift: float
) -> float:
    """Mean collapse probability with a constant added to every row's q.k parts."""
    import hooks

    p = hooks.collapse_probability(
        s_star + shift,
        s + shift,
        torch.full((len(s),), sigma, dtype=s.dtype),
        hooks.LAWS["uniform"],
        valid=rivals,
    )
    return float(p.mean())


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return [
        Part(s.name, partial(measure, s, size), s, {**AMOUNT[size].settings(s), "rows": ROWS[size]})
        for s in subjects
    ]


def values(table: pd.DataFrame, group: str, quantity: str, sigma: float) -> Mean:
    """A group's rate with its interval over seeds."""
    chosen = table[
        (table["group"] == group) & (table["quantity"] == quantity) & (table["sigma"] == sigma)
    ]
    return mean(chosen["value"].dropna().tolist())


def own_level(table: pd.DataFrame, group: str) -> float:
    """The group's mean score level."""
    chosen = table[(table["group"] == group) & (table["quantity"] == "own level")]
    return float(chosen["level"].mean())


def at_level(table: pd.DataFrame, group: str, sigma: float, level: float) -> Mean:
    """A group's rate at another score level, between the levels computed, over seeds."""
    kinds = ("level", "sampled rows, own level")
    chosen = table[
        (table["group"] == group) & table["quantity"].isin(kinds) & (table["sigma"] == sigma)
    ]
    rates = []
    for _, one in chosen.groupby("model", sort=False):
        known = one[one["level"] > 0].sort_values("level")
        rates.append(float(np.interp(math.log(level), np.log(known["level"]), known["value"])))
    return mean(rates)


def figure(table: pd.DataFrame) -> Figure:
    """Rate against score level for each sigma; marks: models at their own level, lines: moved."""
    fig, axes = panels(1, len(SIGMAS), height=3.6)
    for ax, sigma in zip(axes, SIGMAS, strict=True):
        for i, group in enumerate(groups(table)):
            mine = table[(table["group"] == group) & (table["sigma"] == sigma)]
            placement = mine["placement"].iloc[0]
            name = label(group, placement)
            style = ("-", "--", ":", "-.")[i % 4]
            own = mine[mine["quantity"] == "sampled rows, own level"]
            at = sorted({*LEVELS, *(x for x in own["level"] if x > 0)})
            levels = [(x, at_level(table, group, sigma, x).value) for x in at]
            line = [(x, y) for x, y in levels if np.isfinite(y)]
            if not line:
                continue
            xs, ys = zip(*line, strict=True)
            ax.plot(xs, [100 * y for y in ys], style, color=COLOURS[placement], linewidth=1.1)
            ax.plot(
                own["level"],
                100 * own["value"],
                "osD^v"[i % 5],
                markersize=5,
                color=COLOURS[placement],
                label=name,
            )
        ax.set_title(f"σ = {100 * sigma:g}%", fontsize=10)
        ax.set_xscale("log")
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(1e-3, 100)
        ax.yaxis.set_major_formatter(plain)
        log_ticks(ax.xaxis)
        ax.set_xticks([2, 5, 20, 50, 200], ["2", "5", "20", "50", "200"])
        ax.set_xlabel("score level (mean attended q·k)")
        ax.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes[0].set_ylabel("sparse rows that collapse (%)")
    fig.legend(
        *axes[-1].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        title="marks: at their own level; lines: all rows moved by one constant",
        title_fontsize=8,
    )
    return fig


def text(table: pd.DataFrame) -> str:
    """Own level, centred gauge and a common level side by side; pairs of groups."""
    sigma = 0.1
    names = [g for g in groups(table) if np.isfinite(own_level(table, g))]
    if not names:
        return "No sparse rows: there is no rate."
    common = float(np.exp(np.mean([math.log(max(own_level(table, g), 1.0)) for g in names])))
    head = ["models", "seeds", "score level", "rate at its own level", "without sinks"]
    head += ["centred gauge", f"all at level {common:.3g}"]
    lines = [f"Loose collapse at σ = {100 * sigma:g}%, percent of sparse rows:", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in names:
        own = values(table, group, "own level", sigma)
        cells = [
            group,
            str(own.n),
            f"{own_level(table, group):.3g}",
            own.percent(3),
            values(table, group, "own level without sinks", sigma).percent(3),
            values(table, group, "centred gauge", sigma).percent(3),
            at_level(table, group, sigma, common).percent(3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Score level: mean q.k part of an attended score. Centred gauge: each row's mean visible "
        f"q.k part taken away. At level {common:.3g} (the levels' geometric mean): every row moved "
        "by one constant, so that the model's level is that; patterns stay what they are.",
        "",
        *_pairs(table),
    ]
    return "\n".join(lines)


def _pairs(table: pd.DataFrame) -> list[str]:
    """What remains of the difference between the placements when the level is the same."""
    out = []
    study = [g for g in groups(table) if g.startswith("study-")]
    for a in study:
        for b in study:
            if a >= b:
                continue
            for sigma in SIGMAS:
                at_own = values(table, a, "own level", sigma), values(table, b, "own level", sigma)
                moved = at_level(table, a, sigma, own_level(table, b))
                centred = tuple(values(table, g, "centred gauge", sigma) for g in (a, b))
                out.append(
                    f"σ = {100 * sigma:g}%: {a} {at_own[0].percent(3)}, "
                    f"{b} {at_own[1].percent(3)}; "
                    f"{a} moved to the level of {b}: {moved.percent(3)}; centred: "
                    f"{centred[0].percent(3)} and {centred[1].percent(3)}."
                )
    return ["- " + line for line in out]


def claims(table: pd.DataFrame) -> list[Claim]:
    """Nothing was published on it; what our models say."""
    names = [g for g in groups(table) if g.startswith("study-")]
    if len(names) < 2:
        return []
    levels = ", ".join(f"{g.removeprefix('study-')} {own_level(table, g):.3g}" for g in names)
    rates = ", ".join(
        f"{g.removeprefix('study-')} {values(table, g, 'own level', 0.1).percent(3)} "
        f"(centred {values(table, g, 'centred gauge', 0.1).percent(3)})"
        for g in names
    )
    return [
        Claim(
            "Collapse at σ = 10% by placement, and in the centred gauge",
            "rates of models compared without their score level",
            f"score levels: {levels}; rates in percent: {rates}",
            "-",
            "rates of two models can't be compared without the level of their scores: adding a "
            "constant to a row's scores changes its rate and nothing else",
        )
    ]


EXPERIMENT: Final = Experiment(
    name="gauge",
    title="The score level's part in the collapse rate",
    source="beyond Menary et al. 2024: a control",
    models="any",
    minutes={"smoke": 0.3, "quick": 2.0, "full": 8.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
