"""The collapse that Pre-Norm models really suffer, with no injected noise (not in any paper).

Menary et al. 2024 simulate interference with independent noise. Here the scale of the norm in front
of each layer's attention is frozen at one constant, and the sparse rows are counted that attend to
another token then.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    Amount,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    by_group,
    group_mean,
    groups,
    markdown,
    panels,
    reading,
)
from qkvnorm_lens.plots.charts import GREY, RUNS, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=16, windows=1, length=32),
    "quick": Amount(sums=64, windows=4),
    "full": Amount(sums=256, windows=16),
}
CONSTANTS: Final = {"addition": (0.25, 0.5, 1.0, 2.0, 4.0), "language": (1.0,)}
ON: Final = {"addition": ("k", "qk"), "language": ("k",)}
DRAWS: Final = 8
BY: Final[tuple[Literal["head", "layer", "model"], ...]] = ("head", "layer", "model")
SPARED: Final = {False: "frozen too", True: "spared"}
MOVED: Final = "moved_content"
RATES: Final = {
    "really": (MOVED, SPARED[False], True, "o"),
    "really, first token spared": (MOVED, SPARED[True], True, "s"),
    "independent noise": ("predicted_content", SPARED[False], False, "o"),
    "shuffled factors": ("permuted_content", SPARED[False], False, "s"),
}
_FACTS: Final = ("by", "first", "on", "constant", "layer", "head", "label")


_BOTH: Final = ("", "_content")
_NUMBERS: Final = (
    "rows",
    "sinks",
    "moved",
    "moved_content",
    "moved_sinks",
    "strict",
    "to_first",
    *(f"{name}{kind}" for name in ("factored", "permuted", "predicted") for kind in _BOTH),
    "sigma",
    "lognormal",
    "scale_spread",
    "scale_spread_rest",
    "length_share",
    "direction_share",
    "length_share_sparse",
    "direction_share_sparse",
    "length_share_rest",
    "direction_share_rest",
    "se",
    "se_content",
    "kl",
    "agree",
    "loss_change",
)


def measure(subject: Subject, amount: Amount, *, few_layers: bool = False) -> pd.DataFrame:
    """`hooks.interference` of one model, the first token frozen too and spared; or why not.

    Args:
        subject: the model.
        amount: what it reads.
        few_layers: only the first, the middle and the last attention layer.
    """
    import hooks

    model, read = subject.load(), reading(subject, amount)
    layers = None
    if few_layers:
        every = [sites.layer for sites in hooks.attention_sites(model)]
        layers = sorted({every[0], every[len(every) // 2], every[-1]})
    frames: list[pd.DataFrame] = []
    reason = "-"
    try:
        for spared, first in SPARED.items():
            report = hooks.interference(
                model,
                read.ids,
                constants=CONSTANTS[subject.kind],
                on=ON[subject.kind],
                spare_first=spared,
                layers=layers,
                output=subject.kind == "addition",
                targets=read.targets if subject.kind == "addition" else None,
                draws=DRAWS,
                batch_size=64 if subject.kind == "addition" else 4,
                progress=False,
            )
            for by in BY:
                frame = report.to_frame(by)
                frames.append(frame.assign(by=by, first=first))
    except hooks.UnsupportedModelError as error:
        reason = str(error)
        frames = [pd.DataFrame([{"by": "model", "first": "-", "on": "-", "constant": math.nan}])]
    rows = pd.concat(frames, ignore_index=True)
    for name, none in (("layer", -1), ("head", -1), ("label", "all")):
        rows[name] = rows[name].fillna(none) if name in rows else none
    rows[["layer", "head"]] = rows[["layer", "head"]].astype(int)
    rows = rows.assign(**subject.columns, reason=reason)
    for name in _NUMBERS:
        if name not in rows:
            rows[name] = math.nan
    return rows[[*subject.columns, "reason", *_FACTS, *_NUMBERS]]


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model, those without a norm before attention too: they say so."""
    amount, out = AMOUNT[size], []
    for s in subjects:
        few = size == "smoke" and s.kind == "language"  # each layer is a pass of its own
        settings = {"constants": list(CONSTANTS[s.kind]), "draws": DRAWS, "few_layers": few}
        work = partial(measure, s, amount, few_layers=few)
        out.append(Part(s.name, work, s, {**amount.settings(s), **settings}))
    return out


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the models that have such a norm."""
    return table[table["reason"] == "-"]


def of(
    table: pd.DataFrame, by: str, *, first: str = SPARED[False], on: str = "k", constant: float = 1
) -> pd.DataFrame:
    """Rows of one kind."""
    return table[
        (table["by"] == by)
        & (table["first"] == first)
        & (table["on"] == on)
        & (table["constant"] == constant)
    ]


# -- figure -----------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Really moved against predicted, by head; both by group; what the keys' lengths decide."""
    from matplotlib.patches import Patch

    known = measured(table)
    if not len(known):
        return _empty(table)
    named = by_group(known)
    fig, axes = panels(1, 3, width=3.6, height=3.1 + 0.25 * len(named))
    _draw_heads(axes[0], named)
    _draw_rates(axes[1], named)
    _draw_shares(axes[2], named)
    colours = [Patch(color=RUNS[i % len(RUNS)], label=group) for i, (group, _) in enumerate(named)]
    fig.legend(handles=colours, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _empty(table: pd.DataFrame) -> Figure:
    fig, axes = panels(1, 1, width=5.0, height=1.5)
    names = ", ".join(groups(table))
    axes[0].text(0.5, 0.5, f"No norm in front of the attention:\n{names}", ha="center", va="center")
    axes[0].set_axis_off()
    return fig


def _draw_heads(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """A circle per head, larger for more sparse content rows."""
    top = 0.0
    for i, (_, mine) in enumerate(named):
        heads = of(mine, "head").dropna(subset=["moved_content", "predicted_content"])
        x, y = (100 * heads[name].to_numpy(float) for name in ("predicted_content", MOVED))
        content = (heads["rows"] - heads["sinks"]).to_numpy(float)
        size = 6 + 90 * content / max(content.max(initial=1.0), 1.0)
        ax.scatter(x, y, s=size, color=RUNS[i % len(RUNS)], alpha=0.5, linewidth=0.5)
        top = max(top, *x, *y, 0.0)
    line = np.linspace(0, 100, 2000)
    ax.plot(line, line, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for name in ("x", "y"):
        getattr(ax, f"set_{name}scale")("symlog", linthresh=0.1, linscale=0.5)
        getattr(ax, f"set_{name}ticks")([0, 0.1, 1, 10, 100])
        getattr(ax, f"{name}axis").set_major_formatter(plain)
        getattr(ax, f"set_{name}lim")(-0.03, min(1.5 * max(top, 1), 150))
    ax.set_xlabel("predicted for independent noise (%)")
    ax.set_ylabel("really moved (%)")
    ax.set_title("content rows, by head (larger: more rows)", fontsize=9)
    grid(ax)


def _draw_rates(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """Shares of a group's sparse content rows with 95% intervals over seeds."""
    for i, (_, mine) in enumerate(named):
        colour = RUNS[i % len(RUNS)]
        for j, (name, (column, first, filled, marker)) in enumerate(RATES.items()):
            found = group_mean(of(mine, "model", first=first), column)
            ax.errorbar(
                100 * found.value,
                i + 0.18 * (j - (len(RATES) - 1) / 2),
                xerr=100 * np.nan_to_num(found.half),
                color=colour,
                marker=marker,
                markersize=4.5,
                markerfacecolor=colour if filled else "white",
                capsize=2,
                linestyle="none",
            )
            if not i:
                ax.plot([], [], marker, color=GREY, markersize=4.5, label=name)
                ax.lines[-1].set_markerfacecolor(GREY if filled else "white")
    ax.set_yticks(range(len(named)), [""] * len(named))
    ax.set_ylim(len(named) - 0.5, -0.5)
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_xlim(-0.03, 150)
    ax.set_xticks([0, 0.1, 1, 10, 100])
    ax.xaxis.set_major_formatter(plain)
    ax.set_xlabel("content rows that move (%)")
    ax.set_title("by model", fontsize=9)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    grid(ax)


def _draw_shares(ax: Axes, named: list[tuple[str, pd.DataFrame]]) -> None:
    """What remains of the scores' variance with lengths alone, a dot per head."""
    rng = np.random.default_rng(0)
    for i, (_, mine) in enumerate(named):
        heads = of(mine, "head")
        at = i + 0.5 * (rng.random(len(heads)) - 0.5)
        colour = RUNS[i % len(RUNS)]
        ax.plot(100 * heads["length_share"], at, ".", color=colour, markersize=4, alpha=0.6)
        whole = group_mean(of(mine, "model"), "length_share")
        ax.plot(100 * whole.value, i, "|", color="black", markersize=16, markeredgewidth=1.5)
    ax.set_yticks(range(len(named)), [""] * len(named))
    ax.set_ylim(len(named) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("score variance with keys' lengths alone (%)")
    ax.set_title("lengths against directions", fontsize=9)
    ax.plot([], [], ".", color=GREY, markersize=4, label="a head")
    ax.plot([], [], "|", color="black", markersize=10, markeredgewidth=1.5, label="the model")
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    grid(ax)


# -- words ------------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """What really moves beside what noise of that size would move; lengths; who has no norm."""
    known = measured(table)
    head = ["models", "seeds", "content rows", "sinks", "spread of s", "moved", "first spared"]
    head += ["independent", "shuffled", "lengths alone", "directions alone"]
    rows = []
    for group, mine in by_group(known):
        whole, spared = of(mine, "model"), of(mine, "model", first=SPARED[True])
        sinks = whole.assign(share=whole["sinks"] / whole["rows"])
        rows.append(
            [
                group,
                str(len(whole)),
                f"{int((whole['rows'] - whole['sinks']).sum())}",
                group_mean(sinks, "share").percent(0),
                group_mean(whole, "scale_spread_rest").percent(),
                _really(whole),
                _really(spared),
                group_mean(whole, "predicted_content").percent(2),
                group_mean(whole, "permuted_content").percent(2),
                group_mean(whole, "length_share").percent(),
                group_mean(whole, "direction_share").percent(),
            ]
        )
    lines = [markdown(head, rows), "", _LEGEND, ""] if rows else []
    for group, mine in by_group(known):
        lines += _findings(group, mine)
    for reason, names in _without(table).items():
        lines.append(f"Not measured: {', '.join(names)} ({reason}).")
    return "\n".join(lines)


_LEGEND: Final = (
    "In percent, with 95% intervals over seeds (of one model: the standard error over prompts). "
    "Content rows: sparse rows (max >= 0.95) that attend to another than the first token; sinks: "
    "the others' share. Moved: content rows that "
    "attend to another token once the norm in front of their layer divides every token "
    "by one constant (each prompt's median scale; k only, one layer at a time); first spared: the "
    "first token keeps its own scale. Independent: the exact share that independent noise on the "
    "keys would move, of the spread that each row sees; shuffled: the same factors, shuffled among "
    "the prompt's tokens. Spread of s: deviation of the scales over their mean, without the first "
    "token. Lengths alone, directions alone: what remains of the scores' variance over a row's "
    "keys; the two need not add up to one. No paper has these numbers: Menary et al. 2024 simulate "
    "interference and name this as missing."
)


def _really(models: pd.DataFrame) -> str:
    """Share that really moved, with its interval over seeds or, of one model, its error."""
    found = group_mean(models, MOVED)
    if found.n != 1 or models["se_content"].isna().all():
        return found.percent(2)
    return f"{found.percent(2)} (s.e. {100 * models['se_content'].iloc[0]:.2f})"


def _findings(group: str, mine: pd.DataFrame) -> list[str]:
    """Sentences about one group."""
    lines = []
    gap = excess(of(mine, "model"))
    if not math.isnan(gap.value):
        verdict = "the difference is not decided"
        if gap.excludes_zero:
            verdict = "more than independent noise says" if gap.value > 0 else "less than it says"
        lines.append(
            f"{group}: really moved minus predicted {_points(gap)} points "
            f"({gap.n} model{'s' * (gap.n != 1)}): {verdict}."
        )
    first = of(mine, "model")["to_first"].mean()
    if first > 0.005:
        lines.append(f"{group}: {100 * first:.1f}% of the content rows move to the first token.")
    lines += _by_constant(group, mine)
    layers = of(mine, "layer", on="qk").dropna(subset=["kl"])
    if len(layers):
        worst = layers.sort_values("kl").iloc[-1]
        lines.append(
            f"{group}: with q, k and v of one layer frozen the answers' KL from the model's own is "
            f"{layers['kl'].min():.2g} to {worst['kl']:.2g} nats per token (most in "
            f"{worst['label']} of {worst['model']}; {100 * worst['agree']:.0f}% keep their token)."
        )
    return lines


def _by_constant(group: str, mine: pd.DataFrame) -> list[str]:
    """What the constant changes, where several were tried."""
    lines = []
    for first in SPARED.values():
        rates = mine[(mine["by"] == "model") & (mine["first"] == first) & (mine["on"] == "k")]
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
        lines.append(
            f"{group}: with {where}, the constant ({low:g} to {high:g} times the median) {what}."
        )
    return lines


def excess(models: pd.DataFrame) -> Mean:
    """Share really moved minus the share that independent noise would move, over the models."""
    both = models.assign(gap=models[MOVED] - models["predicted_content"])
    return group_mean(both, "gap")


def _points(gap: Mean) -> str:
    """``+0.30 ± 0.12``, in percent; never ``-0.00``."""
    half = "" if math.isnan(gap.half) else f" ± {100 * gap.half:.2f}"
    return f"{round(100 * gap.value, 2) + 0.0:+.2f}{half}"


def _each(models: pd.DataFrame, column: str) -> str:
    """Each model's share, in percent."""
    return ", ".join(f"{100 * v:.2f}" for v in models[column].astype(float).dropna())


def _without(table: pd.DataFrame) -> dict[str, list[str]]:
    """Models that have no such norm, by what was found."""
    out: dict[str, list[str]] = {}
    for model, mine in table[table["reason"] != "-"].groupby("model", sort=False):
        out.setdefault(str(mine["reason"].iloc[0]), []).append(str(model))
    return out


def claims(table: pd.DataFrame) -> list[Claim]:
    """What the paper could only simulate, by group."""
    out = []
    for group, mine in by_group(measured(table)):
        whole = of(mine, "model")
        moved, noise, gap = (
            group_mean(whole, MOVED),
            group_mean(whole, "predicted_content"),
            excess(whole),
        )
        if math.isnan(moved.value):
            continue
        seeds = f"{moved.n} model{'s' * (moved.n != 1)}"
        out.append(
            Claim(
                f"content rows that hang on the common length ({group})",
                "not measured: interference is simulated, not observed (limitations)",
                f"{moved.percent(2)}% ({seeds}: {_each(whole, MOVED)}); with the first token "
                f"spared {_each(of(mine, 'model', first=SPARED[True]), MOVED)}",
                "-",
                "the norm's scale frozen at one constant, one layer at a time; no noise; first "
                "token spared: it keeps its own scale",
            )
        )
        out.append(
            Claim(
                f"independent noise as a stand-in for interference ({group})",
                "assumed (Fig. 2, 3): real noise may be correlated (limitations)",
                f"{noise.percent(2)}% predicted at the rows' own spread; really "
                f"{_points(gap)} points",
                "-",
                "the scales of a row's tokens are no independent draws; the same factors shuffled "
                f"move {group_mean(whole, 'permuted_content').percent(2)}%",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="interference",
    title="The collapse that Pre-Norm's common length really causes",
    source="not in a paper; Menary et al. 2024 name it as missing (theorems 2 and 7, limitations)",
    models="any",
    minutes={"smoke": 0.2, "quick": 0.6, "full": 2.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
