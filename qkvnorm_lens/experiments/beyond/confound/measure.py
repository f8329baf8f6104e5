"""Why QKV-Norm has no sparse attention in the paper: the norm, or the scale of its scores?

The paper calibrates w to a standard deviation of 0.1 and decays every parameter, gains included.
With gains at one QKV-Norm's scores are then bounded by about 0.8, while a weight of 0.95 among
twenty tokens wants a gap near 5.9. Six cells, several seeds, one small model: the paper's setting
and ours, calibrated without decay on gains, and a learned inverse temperature.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    AMOUNT,
    COLOURS,
    CONFOUND_STEPS,
    CONFOUNDS,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    difference,
    groups,
    mean,
    panels,
    reading,
    trained,
)
from qkvnorm_lens.experiments.paper.accuracy import KINDS, accuracies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMS: Final[dict[Size, int]] = {"smoke": 200, "quick": 2_000, "full": 10_000}
SCALE_GAP: Final = "Sparse rows, QKV-Norm, 1/√d minus the paper's setting"
NONE: Final = 0.01  # below this share of sparse rows a cell has none to speak of
CELLS: Final = {
    "confound-pre": "Pre-Norm,\n1/√d",
    "confound-qkv": "QKV-Norm,\n1/√d",
    "confound-pre-paper": "Pre-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-paper": "QKV-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-calibrated": "QKV-Norm,\ncalibrated,\nno decay\non gains",
    "confound-qkv-learned": "QKV-Norm,\nlearned\ntemperature",
}


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Accuracy by kind of sums, and how sparse attention is, of one trained cell."""
    import hooks

    table = accuracies(subject, SUMS[size])
    facts: dict[str, float] = {
        f"accuracy, {kind}": float(value)
        for kind, value in zip(table["kind"], table["per_token"], strict=True)
    }
    model = subject.load()
    report = hooks.collapse_probe(
        model, reading(subject, AMOUNT[size]).ids, sigmas=[0.05, 0.1, 0.2], draws=0, progress=False
    )
    examined = int(report.examined.sum())
    whole = report.to_frame("model")
    facts |= {
        "sparse share": report.n_sparse / examined,
        "score level": float(whole["score_level"].iloc[0]),
        "collapse at 10%": float(whole["loose"].iloc[1]),
        "collapse at 10%, centred gauge": float(whole["loose_centred"].iloc[1]),
        "sigma at 1%": float(report.sigma_at()) if report.n_sparse else math.nan,  # type: ignore[arg-type]
        "largest score": _largest_score(model, reading(subject, AMOUNT[size]).ids),
    }
    return pd.DataFrame(
        [
            {**subject.columns, "quantity": k, "value": v, "rows": report.n_sparse}
            for k, v in facts.items()
        ]
    )


def _largest_score(model: Any, tokens: Any) -> float:
    """Greatest |w| over all layers, heads and visible keys."""
    from hooks import attention_sites
    from hooks.model import encode
    from hooks.sites import LayerView, observe

    top = [0.0]

    def on_layer(view: LayerView) -> None:
        top[0] = max(top[0], float(view.scores[view.visible].abs().max()))

    observe(model, list(attention_sites(model)), encode(model, tokens), on_layer)
    return top[0]


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each trained cell and seed; two of them in the smoke form.

    Raises:
        ValueError: none is trained.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    names = sorted(trained("confound-"), key=_order)
    if not names:
        raise ValueError(
            "confound: wanted trained cells; got none. To train them: "
            "python -m qkvnorm_lens.experiments.train"
        )
    if size == "smoke":
        names = names[:2]
    settings = {"sums": SUMS[size], "steps": CONFOUND_STEPS}
    return [
        Part(s.name, partial(measure, s, size), s, {**settings, **AMOUNT[size].settings(s)})
        for s in find_subjects(names)
    ]


def _order(name: str) -> tuple[int, str]:
    cell = name.removeprefix("confound-").rpartition("-")[0]
    return list(CONFOUNDS).index(cell), name


def of(table: pd.DataFrame, group: str, quantity: str) -> list[float]:
    """One number for each seed."""
    chosen = table[(table["group"] == group) & (table["quantity"] == quantity)]
    return [float(v) for v in chosen["value"] if np.isfinite(v)]


def figure(table: pd.DataFrame) -> Figure:
    """Cells against share of sparse rows and accuracy; dots: seeds, bars: 95% intervals."""
    fig, axes = panels(1, 3, width=4.4, height=3.6)
    names = groups(table)
    ticks = [CELLS.get(name, name) for name in names]
    shown = (
        ("sparse share", "rows with a weight ≥ 0.95 (%)"),
        ("accuracy, in distribution", "accuracy in distribution (%)"),
        ("accuracy, extrapolation", "accuracy in extrapolation (%)"),
    )
    for ax, (quantity, title) in zip(axes, shown, strict=True):
        for x, group in enumerate(names):
            seeds = of(table, group, quantity)
            m = mean(seeds)
            placement = table[table["group"] == group]["placement"].iloc[0]
            ax.errorbar(
                x,
                100 * m.value,
                yerr=100 * np.nan_to_num(m.half),
                fmt="o",
                color=COLOURS[placement],
                capsize=3,
            )
            ax.plot([x + 0.15] * len(seeds), [100 * s for s in seeds], ".", color="grey")
        ax.set_xticks(range(len(names)), ticks, fontsize=7)
        ax.set_title(title, fontsize=10)
        ax.grid(visible=True, axis="y", linewidth=0.5, alpha=0.6)
        low, high = ax.get_ylim()  # an interval of few seeds may reach beyond what a share can be
        ax.set_ylim(max(low, 0), min(high, 100))
    axes[0].set_ylim(bottom=0)
    return fig


def text(table: pd.DataFrame) -> str:
    """The six cells, and the two differences that the question is about."""
    head = ["cell", "seeds", "sparse rows", *KINDS, "largest score", "collapse at 10%", "centred"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups(table):
        largest = mean(of(table, group, "largest score"))
        cells = [
            CELLS.get(group, group).replace("\n", " "),
            str(len(of(table, group, "sparse share"))),
            mean(of(table, group, "sparse share")).percent(),
            *(mean(of(table, group, f"accuracy, {kind}")).percent() for kind in KINDS),
            f"{largest.value:.3g}",
            mean(of(table, group, "collapse at 10%")).percent(2),
            mean(of(table, group, "collapse at 10%, centred gauge")).percent(2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Percent, but the largest |score|; {CONFOUND_STEPS:,} steps each; ± half a 95% interval "
        "over seeds.",
    ]
    for what, gap in _gaps(table).items():
        lines.append(f"- {what}: {gap.percent()} points.")
    return "\n".join(lines)


def _gaps(table: pd.DataFrame) -> dict[str, Mean]:
    """The paper's setting against ours: sparsity of QKV-Norm, and Pre-Norm's lead."""
    out: dict[str, Mean] = {}
    for what, a, b, quantity in (
        (SCALE_GAP, "qkv", "qkv-paper", "sparse share"),
        ("Sparse rows, QKV-Norm, no decay on gains minus decay", "qkv-calibrated", "qkv-paper",
         "sparse share"),
        ("Extrapolation, Pre-Norm minus QKV-Norm, the paper's setting", "pre-paper", "qkv-paper",
         "accuracy, extrapolation"),
        ("Extrapolation, Pre-Norm minus QKV-Norm, 1/√d", "pre", "qkv", "accuracy, extrapolation"),
        ("Extrapolation, Pre-Norm minus QKV-Norm with a learned temperature", "pre", "qkv-learned",
         "accuracy, extrapolation"),
    ):  # fmt: skip
        x, y = (of(table, f"confound-{cell}", quantity) for cell in (a, b))
        if min(len(x), len(y)) > 1:
            out[what] = difference(x, y)
    return out


def claims(table: pd.DataFrame) -> list[Claim]:
    """Is QKV-Norm never sparse; is Pre-Norm's lead its own?"""
    out = []
    cells = [f"confound-{c}" for c in ("qkv-paper", "qkv-calibrated", "qkv", "qkv-learned")]
    shares = {c: mean(of(table, c, "sparse share")) for c in cells if of(table, c, "sparse share")}
    if len(shares) > 1:
        ours = "; ".join(
            f"{CELLS[c].replace(chr(10), ' ')}: {m.percent()}%" for c, m in shares.items()
        )
        paper = shares.get("confound-qkv-paper")
        sparse = any(m.value - np.nan_to_num(m.half, nan=m.value) > 0 for m in shares.values())
        gap = _gaps(table).get(SCALE_GAP)
        scale = gap is not None and gap.excludes_zero and gap.value > 0
        none = paper is not None and paper.value < NONE
        out.append(
            Claim(
                "QKV-Norm has no sparse attention",
                "no peak of row maxima at 1 (Fig. 25-27)",
                f"sparse rows: {ours}",
                "in part" if none and sparse else "no" if sparse else "yes",
                "the share of sparse rows changes with the scores' scale, the norm being the same: "
                f"1/√d minus the paper's setting is {gap.percent()} points"
                if scale and gap is not None
                else "whether the scale decides is open: our seeds scatter too much",
            )
        )
    gaps = {k: v for k, v in _gaps(table).items() if k.startswith("Extrapolation")}
    for what, gap in gaps.items():
        out.append(
            Claim(
                what,
                "+19.9 points (one seed each)",
                f"{gap.percent()} points ({gap.n} seeds each)",
                "yes" if gap.excludes_zero and gap.value > 0 else
                "no" if gap.excludes_zero or abs(0.199 - gap.value) > gap.half else "not decided",
                "smaller models and sums; 95% interval over seeds",
            )
        )  # fmt: skip
    return out


EXPERIMENT: Final = Experiment(
    name="confound",
    title="QKV-Norm's missing sparsity: the norm, or the scale of its scores",
    source="beyond Menary et al. 2024, who do not separate the two",
    models="none",
    minutes={"smoke": 0.2, "quick": 1.5, "full": 4.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
