"""Accuracy under norm noise in all layers of one pass (Menary et al. 2024, Fig. 2).

Noise on q, k, v or all of them, of all rows; and, on q and k, of sparse or of non-sparse rows only.
A curve is of the vectors that enter the dot product (``at = "dot"``) unless it says
``"projection"``: there the noise meets the norm behind the projection, where a model has one.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    PLACEMENT_NAMES,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    groups,
    mean,
    panels,
)
from qkvnorm_lens.experiments.paper.noise.rows import (
    ALL,
    ANY_ROWS,
    EVERY,
    LABELS,
    LOST,
    NEXT,
    OTHER_ROWS,
    ROWS,
    SHIELDED,
    SPARSE_ROWS,
    VECTORS,
    WITHOUT_END,
    Condition,
    kept,
    kept_mean,
    lost_at,
    main_targets,
    telling,
)
from qkvnorm_lens.plots.charts import RUNS, grid, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from hooks import SweepReport

SEED: Final = 20  # of the sums; the noise has the seed 0
PERCENT: Final = 0.01  # the sigma at which the paper gives numbers


@dataclass(frozen=True)
class Scale:
    """How much: prompts, their length (language models), sigmas and draws of each."""

    sums: int
    windows: int
    length: int
    sigmas: tuple[float, ...]
    draws: int


SCALES: Final[dict[Size, Scale]] = {
    "smoke": Scale(30, 1, 24, (0.01, 0.1, 0.5), 2),
    "quick": Scale(100, 4, 40, (0.01, 0.05, 0.1, 0.2, 0.3, 0.5), 2),
    "full": Scale(300, 8, 128, (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5), 6),
}
ROWS_PER_PASS: Final = {"addition": 1024, "language": 32}


# -- measuring ------------------------------------------------------------------------------


def of_vectors(subject: Subject, scale: Scale) -> pd.DataFrame:
    """Noise on q, on k, on v and on all, of all rows; also before the norm that shields them."""
    shielded = _shield(subject.load()) != "none"
    return _measure(subject, scale, (*VECTORS, SHIELDED) if shielded else VECTORS)


def of_rows(subject: Subject, scale: Scale) -> pd.DataFrame:
    """Noise on q and k, of all rows, of the sparse ones and of the non-sparse ones."""
    return _measure(subject, scale, ROWS)


def _measure(subject: Subject, scale: Scale, conditions: tuple[Condition, ...]) -> pd.DataFrame:
    from hooks import sweep

    model = subject.load()
    tokens, target_sets = _prompts(subject, model, scale)
    shares, shield = _shares(model, tokens), _shield(model)
    frames = []
    for condition in conditions:
        for scored, targets in target_sets.items():
            with warnings.catch_warnings():  # that a norm takes the noise away is what is shown
                warnings.filterwarnings("ignore", message="noise at the projection")
                report = sweep(
                    model,
                    tokens,
                    targets=targets,
                    sigmas=scale.sigmas,
                    replicates=scale.draws,
                    on=condition.on,
                    at=condition.at,
                    rows=condition.rows,
                    batch_size=ROWS_PER_PASS[subject.kind],
                    progress=False,
                )
            about = {
                **subject.columns,
                "on": condition.on,
                "at": condition.at,
                "rows": condition.rows,
                "scored": scored,
                "shield": shield,
                **shares[condition.rows],
            }
            frames.append(_curve_rows(about, report))
    return pd.concat(frames, ignore_index=True)


def _curve_rows(about: dict[str, Any], report: SweepReport) -> pd.DataFrame:
    """One row for each sigma, the clean one first."""
    frame = report.to_frame()
    try:
        sigma = report.sigma_at(LOST)
    except ValueError:  # nothing to lose, or not lost within the sigmas
        sigma = math.inf if frame["accuracy"].iloc[0] > 0 else math.nan
    prompts = int((report.positions > 0).sum())
    return frame.assign(**about, prompts=prompts, sigma_lost=sigma)[
        [
            *about,
            "prompts",
            "sigma_lost",
            "sigma",
            "positions",
            "accuracy",
            "se_accuracy",
            "se_prompts_accuracy_change",
            "loss",
            "kl",
            "top1_agreement",
        ]
    ].rename(columns={"se_accuracy": "se_draws", "se_prompts_accuracy_change": "se_prompts"})


def _prompts(
    subject: Subject, model: TransformerBridge, scale: Scale
) -> tuple[Any, dict[str, Any]]:
    """Tokens, and the sets of targets by name (None for the next token)."""
    if subject.kind == "language":
        from qkvnorm_lens.text import passage, windows

        read = windows(model, passage(), length=scale.length, limit=scale.windows)
        return read.ids, {NEXT: None}
    from qkvnorm_lens.training import END, PAD, draw

    batch = draw(subject.split, scale.sums, seed=SEED)
    targets = batch.targets.masked_fill(batch.targets == PAD, -100)
    return batch.tokens, {
        ALL: targets,
        WITHOUT_END: targets.masked_fill(targets == END, -100),
    }


def _shield(model: TransformerBridge) -> str:
    """What a norm behind the projections does to noise on q, k and v before it."""
    from hooks import attention_sites
    from hooks.model import ROLES

    found = {layer.vector(role).shield for layer in attention_sites(model) for role in ROLES}
    return " and ".join(sorted(found - {"none"})) or "none"


def _shares(model: TransformerBridge, tokens: Any) -> dict[str, dict[str, float]]:
    """Share of rows that are noised, and of those the share whose arg max is the first token.

    In the clean pass, of rows with two keys or more, over all heads and layers.
    """
    from hooks import attention_sites
    from hooks.model import encode
    from hooks.noise import NON_SPARSE, SPARSE
    from hooks.sites import LayerView, observe

    counts = {rows: np.zeros(2) for rows in ("all", "sparse", "non-sparse")}

    def count(view: LayerView) -> None:
        top, at = view.pattern.max(-1)
        valid = view.visible.sum(-1) > 1
        chosen = {
            "all": valid,
            "sparse": top >= SPARSE,
            "non-sparse": top < NON_SPARSE,
        }
        for name, where in chosen.items():
            mine = where & valid
            counts[name] += [int(mine.sum()), int((mine & (at == 0)).sum())]

    observe(model, attention_sites(model).layers, encode(model, tokens), count, batch_size=64)
    n = counts["all"][0]
    return {
        name: {"share": mine / n, "share_first": first / mine if mine else math.nan}
        for name, (mine, first) in counts.items()
    }


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """Two for each model: by vectors and by rows."""
    scale = SCALES[size]
    settings = {**vars(scale), "sigmas": list(scale.sigmas), "seed": SEED}
    return [
        Part(f"{s.name}-{name}", partial(work, s, scale), s, settings)
        for s in subjects
        for name, work in (("vectors", of_vectors), ("rows", of_rows))
    ]


# -- figure ---------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy kept against sigma: above by vectors, below by rows of q and k.

    A column for each placement (solid: the group of most seeds, with the 95% interval over them;
    dotted: the others), and for each of other people's models. A single model's interval is over
    prompts.
    """
    main = main_targets(table)
    columns = _columns(main)
    fig, axes = panels(
        2, len(columns), width=min(3.6, 10.2 / len(columns)), height=2.9, share_y=True
    )
    for i, (title, ordered) in enumerate(columns):
        above, below = axes[i], axes[len(columns) + i]
        _draw(above, main, ordered, (*VECTORS, SHIELDED))
        _draw(below, main, ordered, ROWS)
        above.set_title(title, fontsize=10)
    fig.supxlabel("RMS of the relative change of norms, σ (%)", fontsize=10)
    for ax, title in ((axes[0], "noise on"), (axes[len(columns)], "noise on q and k of")):
        _legend(ax, axes, title)
        ax.set_ylabel("accuracy kept (% of clean)")
    return fig


def _columns(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Title and groups of each column, the group of most seeds first."""
    out = []
    for placement in (p for p in ("none", "pre", "qkv") if (table["placement"] == p).any()):
        mine = table[table["placement"] == placement]
        seeds = mine.groupby("group")["model"].nunique()
        ordered = sorted(groups(mine), key=lambda g: -seeds[g])
        named = ", ".join(ordered) if len(ordered) < 3 else f"{len(ordered)} groups"
        out.append((f"{PLACEMENT_NAMES[placement]}\n({named})", ordered))
    return out + [(group, [group]) for group in groups(table[table["placement"] == ""])]


def _legend(ax: Axes, axes: list[Axes], title: str) -> None:
    """In the first panel of a row, with what any panel of the row shows."""
    half = len(axes) // 2
    row = axes[:half] if ax is axes[0] else axes[half:]
    found: dict[str, Any] = {}
    for each in row:
        handles, labels = each.get_legend_handles_labels()
        found |= {name: h for h, name in zip(handles, labels, strict=True) if name not in found}
    ax.legend(found.values(), found.keys(), fontsize=8, title=title, title_fontsize=8)


def _draw(
    ax: Axes, table: pd.DataFrame, ordered: list[str], conditions: tuple[Condition, ...]
) -> None:
    for j, condition in enumerate(conditions):
        style = "--" if condition is SHIELDED else "-"
        for i, group in enumerate(ordered):
            mine = condition.of(table[table["group"] == group])
            if mine.empty:
                continue
            sigmas = sorted(s for s in mine["sigma"].unique() if s > 0)
            points = [kept_mean(mine, s) for s in sigmas]
            x = 100 * np.asarray(sigmas)
            y = np.asarray([100 * p.value for p in points])
            half = np.asarray([100 * p.half for p in points])
            ax.plot(
                x,
                y,
                style if i == 0 else ":",
                color=RUNS[j],
                linewidth=1.6 if i == 0 else 1.0,
                marker="o" if i == 0 else None,
                markersize=3,
                label=LABELS[condition] if i == 0 else None,
            )
            if i == 0:
                ax.fill_between(x, y - half, y + half, color=RUNS[j], alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_ylim(-3, 108)
    log_ticks(ax.xaxis)
    grid(ax)


# -- words ----------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Sigma at which a tenth of the accuracy is lost, by condition; what a percent does; rows."""
    known = [c for c in LABELS if len(c.of(table))]
    lines = [
        f"Sigma (%) at which {LOST:.0%} of the accuracy is lost (relative; 95% interval over seeds "
        "where a group has several; `>`: not lost at the largest sigma). Noise on the vectors that "
        "enter the dot product, in all layers, unless a column says otherwise.",
        "",
        "| models | seeds | scored | clean (%) | " + " | ".join(map(_head, known)) + " |",
        "|" + "---|" * (4 + len(known)),
    ]
    for group in groups(table):
        for scored in dict.fromkeys(table["scored"]):
            mine = table[(table["group"] == group) & (table["scored"] == scored)]
            if len(mine):
                lines.append(_line(group, scored, mine, known))
    lines.append("")
    for group in groups(table):
        lines += [_sentences(group, main_targets(table[table["group"] == group])), ""]
    return "\n".join(lines)


def _head(condition: Condition) -> str:
    return f"q, k of {LABELS[condition]}" if condition in ROWS else LABELS[condition]


def _line(group: str, scored: str, mine: pd.DataFrame, known: list[Condition]) -> str:
    cells = []
    for condition in known:
        rows = condition.of(mine)
        cells.append(lost_at(rows) if len(rows) else "")
    clean = mine[mine["sigma"] == 0].groupby("model")["accuracy"].first()
    about = f"| {group} | {len(clean)} | {scored} | {100 * clean.mean():.1f} "
    return about + "| " + " | ".join(cells) + " |"


def _sentences(group: str, mine: pd.DataFrame) -> str:
    """What a percent of noise does to a group, and which rows cause the loss."""
    top = float(mine["sigma"].max())
    every = EVERY.of(mine)
    said = [
        f"{group}: noise on q, k and v of sigma = {PERCENT:.0%} leaves "
        f"{kept_mean(every, PERCENT).percent()}% of the accuracy, {top:.0%} leaves "
        f"{kept_mean(every, top).percent(0)}%."
    ]
    sigma = telling(mine)
    said.append(
        f"On q and k only, {sigma:.0%} leaves {kept_mean(ANY_ROWS.of(mine), sigma).percent()}%."
    )
    for condition in (SPARSE_ROWS, OTHER_ROWS):
        rows = condition.of(mine)
        share, first = rows["share"].mean(), rows["share_first"].mean()
        sinks = "" if math.isnan(first) else f" ({first:.0%} of them look to the first token)"
        said.append(
            f"On {LABELS[condition]} only, {share:.0%} of all{sinks}, {sigma:.0%} leaves "
            f"{kept_mean(rows, sigma).percent()}%, {top:.0%} {kept_mean(rows, top).percent(0)}%."
        )
    shielded = SHIELDED.of(mine)
    if len(shielded):
        said.append(
            f"Before the norm on q, k and v (noise {mine['shield'].iloc[0]} there), {top:.0%} "
            f"leaves {kept_mean(shielded, top).percent(2)}%: the norm takes it away; the vectors "
            "behind it are what the other numbers are of."
        )
    if (mine["scored"] == NEXT).all():
        least = every[every["sigma"] == PERCENT].mean(numeric_only=True)
        clean = every[every["sigma"] == 0].mean(numeric_only=True)
        said.append(
            f"Next-token loss {clean['loss']:.3f} nats, {least['loss'] - clean['loss']:+.4f} at "
            f"{PERCENT:.0%}, where KL(clean || noisy) is {least['kl']:.2g} nats."
        )
    return " ".join(said)


# -- claims ---------------------------------------------------------------------------------

_SCALE_OF_OURS: Final = (
    "our models have 2 or 4 layers, the paper's 8 and 10, and their sums are smaller: probably "
    "fewer layers add up less noise and easier sums leave larger margins; not tested apart"
)


def claims(table: pd.DataFrame) -> list[Claim]:
    """Fig. 2: a percent of noise, sparse against other rows, and QKV-Norm's stability."""
    main = main_targets(table)
    out: list[Claim] = []
    for group in groups(main):
        mine = main[main["group"] == group]
        if not group.startswith(("study-", "addition-")):
            continue
        placement = mine["placement"].iloc[0]
        if placement == "pre":
            out += [_percent_claim(group, mine), _rows_claim(group, mine)]
        if placement == "qkv":
            out.append(_shield_claim(group, mine))
    return out


def _percent_claim(group: str, mine: pd.DataFrame) -> Claim:
    share = kept_mean(EVERY.of(mine), PERCENT)
    fall = Mean(1 - share.value, share.half, share.n)
    reaches, may = fall.value >= LOST, fall.value + np.nan_to_num(fall.half) >= LOST
    return Claim(
        f"fall of accuracy at sigma = 1%, q, k and v ({group})",
        ">= 10% (Baseline), >= 20% (Alternate), one seed each, Fig. 2",
        f"{fall.percent(2)}% of the accuracy; a tenth is lost at sigma = "
        f"{lost_at(EVERY.of(mine))}% ({fall.n} {'seeds' if fall.n > 1 else 'seed'})",
        "yes" if reaches else "not decided" if may else "no",
        _SCALE_OF_OURS,
    )


def _rows_claim(group: str, mine: pd.DataFrame) -> Claim:
    """Sparse rows lose less than non-sparse ones, where noise on all rows takes about a tenth."""
    sigma = telling(mine)
    sparse, other = SPARSE_ROWS.of(mine), OTHER_ROWS.of(mine)
    a, b = kept(sparse, sigma), kept(other, sigma)
    gap = a["kept"] - b["kept"]
    if len(gap) > 1:
        over = mean(gap.tolist())
    else:  # one model: over prompts, the two taken as independent
        half = math.hypot(a["half"].iloc[0], b["half"].iloc[0])
        over = Mean(float(gap.iloc[0]), half, 1)
    share = {name: rows["share"].mean() for name, rows in (("sparse", sparse), ("other", other))}
    return Claim(
        f"sparse rows bear noise on q and k, non-sparse ones cause the drop ({group})",
        "sparse rows are stable to the percent level, the non-sparse ones cause the drop, Fig. 2",
        f"at sigma = {sigma:.0%}, where noise on all rows leaves "
        f"{kept_mean(ANY_ROWS.of(mine), sigma).percent()}% of the accuracy, noise on sparse rows "
        f"({share['sparse']:.0%} of all) leaves {kept_mean(sparse, sigma).percent()}%, on "
        f"non-sparse rows ({share['other']:.0%}) {kept_mean(other, sigma).percent()}%; difference "
        f"{over.percent()} points",
        "not decided" if not over.excludes_zero else "yes" if over.value > 0 else "no",
        "the two kinds are not equally many: the share noised stands beside each number",
    )


def _shield_claim(group: str, mine: pd.DataFrame) -> Claim:
    top = float(mine["sigma"].max())
    before, behind = (kept_mean(c.of(mine), top) for c in (SHIELDED, EVERY))
    held, falls = abs(1 - before.value) < 0.01, 1 - behind.value >= LOST
    return Claim(
        f"QKV-Norm is stable by construction ({group})",
        "the norm on q, k and v removes the noise, Fig. 2",
        f"at sigma = {top:.0%} noise before the norm leaves {before.percent(2)}% of the accuracy, "
        f"noise on what enters the dot product {behind.percent(0)}%",
        "in part" if held and falls else "yes" if held else "no",
        "before the norm noise is removed up to its eps; that says nothing of the vectors behind "
        "it, which are as open to error (of rounding, say) as any other model's",
    )


EXPERIMENT: Final = Experiment(
    name="noise",
    title="Accuracy under noise on the norms of q, k and v in all layers at once",
    source="Menary et al. 2024, Fig. 2",
    models="any",
    minutes={"smoke": 0.2, "quick": 1.0, "full": 16.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
