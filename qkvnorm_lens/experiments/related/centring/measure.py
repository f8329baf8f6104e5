"""Training with the spectral gap and without it (Naderi et al. 2024): the same run twice.

Each seed of the small model is trained with A and with A - U, from the same weights on the same
sums; everything else is equal, which is checked. Pre-Norm, and No-Norm, where nothing else holds
the lengths of vectors.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    AMOUNT,
    PLACEMENT_NAMES,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    markdown,
    mean,
    panels,
    reading,
    trained,
)
from qkvnorm_lens.experiments.paper.accuracy import KINDS, accuracies
from qkvnorm_lens.plots.charts import BLUE, GREY, ORANGE, grid, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUMS: Final[dict[Size, int]] = {"smoke": 200, "quick": 2_000, "full": 20_000}
PAIRS: Final = {"pre": ("confound-pre", "centred-pre")}
"""By placement: the runs with A, and those with A - U."""
SEEDS: Final = (1, 2, 3)
LAST: Final = 5  # rows of the log: the final loss is their mean
FINAL: Final = "final loss"
WHOLE: Final = "mean loss"
SPECTRUM: Final = ("gap", "stable_rank", "left_s1")
COMMAND: Final = "python -m qkvnorm_lens.experiments.train"


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """A run's loss by step, its accuracy by kind of sums, and the spectrum of its patterns."""
    import hooks

    assert subject.path is not None
    log = pd.read_csv(subject.path / "log.csv")
    rows = [
        ("curve", int(s), "loss", float(x)) for s, x in zip(log["step"], log["loss"], strict=True)
    ]
    last = int(log["step"].iloc[-1])
    rows.append(("number", last, FINAL, float(log["loss"].iloc[-LAST:].mean())))
    rows.append(("number", last, WHOLE, float(log["loss"].mean())))
    table = accuracies(subject, SUMS[size])
    rows += [
        ("number", last, f"accuracy, {kind}", float(value))
        for kind, value in zip(table["kind"], table["per_token"], strict=True)
    ]
    read = reading(subject, AMOUNT[size])
    report = hooks.spectral_gap(subject.load(), read.ids, batch_size=32, progress=False)
    whole = report.to_frame("prompt")[list(SPECTRUM)].mean()
    rows += [("number", last, name, float(whole[name])) for name in SPECTRUM]
    fix = int(subject.group.startswith("centred"))
    return pd.DataFrame(
        [
            {**subject.columns, "fix": fix, "what": a, "step": s, "quantity": q, "value": v}
            for a, s, q, v in rows
        ]
    )


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each run; the first seed of Pre-Norm in the smoke form.

    Raises:
        ValueError: a run is missing, or two of a pair differ in more than the fix.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    pairs = [(*PAIRS[p], seed) for p in PAIRS for seed in SEEDS]
    pairs = pairs[:1] if size == "smoke" else pairs
    there = trained()
    names = [f"{group}-{seed}" for *both, seed in pairs for group in both]
    missing = sorted(name for name in names if name not in there)
    if missing:
        raise ValueError(
            f"centring: wanted the trained models {', '.join(names)}; got none of "
            f"{', '.join(missing)}. To train them: {COMMAND} {' '.join(missing)}"
        )
    for plain, fixed, seed in pairs:
        _check_pair(there[f"{plain}-{seed}"], there[f"{fixed}-{seed}"])
    settings = {"sums": SUMS[size], "last": LAST}
    return [
        Part(s.name, partial(measure, s, size), s, {**settings, **AMOUNT[size].settings(s)})
        for s in find_subjects(names)
    ]


def _check_pair(plain: Path, fixed: Path) -> None:
    """Refuse two runs that differ in more than the fix."""
    runs = []
    for path in (plain, fixed):
        run = json.loads((path / "card.json").read_text(encoding="utf-8"))["run"]
        runs.append((run["config"].pop("centred", False), run))
    (without, one), (with_fix, other) = runs
    unlike = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    if unlike or without or not with_fix:
        raise ValueError(
            f"centring: wanted {plain.name} and {fixed.name} to differ in the fix alone; got "
            f"centred = {without} and {with_fix}, other {', '.join(unlike) or 'settings equal'}"
        )


# -- reading the table ----------------------------------------------------------------------


def values(table: pd.DataFrame, placement: str, fix: int, quantity: str) -> pd.Series[float]:
    """One number for each seed."""
    chosen = table[
        (table["placement"] == placement)
        & (table["fix"] == fix)
        & (table["what"] == "number")
        & (table["quantity"] == quantity)
    ]
    return chosen.set_index("seed")["value"].astype(float)


def gain(table: pd.DataFrame, placement: str, quantity: str) -> Mean:
    """With the fix minus without it: mean over seeds of the difference within a seed."""
    change = values(table, placement, 1, quantity) - values(table, placement, 0, quantity)
    return mean(change.dropna().tolist())


def _placements(table: pd.DataFrame) -> list[str]:
    return [p for p in PAIRS if p in set(table["placement"])]


# -- figure ---------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Training loss with and without the fix; differences in accuracy, seed by seed."""
    placements = _placements(table)
    fig, axes = panels(1, len(placements) + 1, width=3.4, height=3.1)
    for ax, placement in zip(axes, placements, strict=False):
        _curves(ax, table, placement)
    axes[0].set_ylabel("training loss (nats per token)")
    axes[0].legend(fontsize=8, frameon=False)
    _differences(axes[-1], table, placements)
    for ax in axes:
        grid(ax)
    return fig


def _curves(ax: Axes, table: pd.DataFrame, placement: str) -> None:
    curves = table[(table["placement"] == placement) & (table["what"] == "curve")]
    for fix, colour, name in ((0, BLUE, "A"), (1, ORANGE, "A - U (the fix)")):
        mine = curves[curves["fix"] == fix]
        for _, seed in mine.groupby("seed"):
            ax.plot(seed["step"], seed["value"], color=colour, linewidth=0.6, alpha=0.5)
        by = mine.groupby("step")["value"].mean()
        ax.plot(by.index, by, color=colour, linewidth=1.8, label=name)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    ax.set_xlabel("step")
    ax.set_title(PLACEMENT_NAMES[placement], fontsize=10)


def _differences(ax: Axes, table: pd.DataFrame, placements: list[str]) -> None:
    for i, placement in enumerate(placements):
        marker = "os"[i % 2]
        at = np.arange(len(KINDS)) + 0.24 * (i - (len(placements) - 1) / 2)
        for x, kind in zip(at, KINDS, strict=True):
            quantity = f"accuracy, {kind}"
            found = gain(table, placement, quantity)
            ax.errorbar(
                x,
                100 * found.value,
                yerr=100 * np.nan_to_num(found.half),
                fmt=marker,
                color="k",
                capsize=3,
                label=PLACEMENT_NAMES[placement] if kind == KINDS[0] else None,
            )
            change = values(table, placement, 1, quantity) - values(table, placement, 0, quantity)
            ax.plot([x + 0.08] * len(change), 100 * change, ".", color=GREY)
    ax.axhline(0, color=GREY, linewidth=0.9)
    ax.set_xticks(range(len(KINDS)), [k.replace(" ", "\n", 1) for k in KINDS], fontsize=8)
    ax.set_ylabel("accuracy, fix minus none (points)")
    ax.set_title("what the fix changes", fontsize=10)
    ax.legend(fontsize=8, frameon=False)


# -- words ----------------------------------------------------------------------------------


def text(table: pd.DataFrame) -> str:
    """Runs with and without the fix, and the differences seed by seed."""
    head = ["", "fix", "seeds", FINAL, WHOLE, *KINDS, "gap", "stable rank of A", "A - U: s1"]
    body = []
    for placement in _placements(table):
        for fix in (0, 1):
            of = {
                q: mean(values(table, placement, fix, q).tolist())
                for q in (FINAL, WHOLE, *SPECTRUM, *(f"accuracy, {k}" for k in KINDS))
            }
            body.append(
                [
                    PLACEMENT_NAMES[placement],
                    "A - U" if fix else "none",
                    str(of[FINAL].n),
                    *(_plain(of[q]) for q in (FINAL, WHOLE)),
                    *(of[f"accuracy, {kind}"].percent() for kind in KINDS),
                    *(f"{of[q].value:.2f}" for q in SPECTRUM),
                ]
            )
    steps = int(table["step"].max())
    lines = [
        markdown(head, body),
        "",
        f"{steps:,} steps each; losses in nats per scored token (final: over the last {LAST} "
        "entries of the log; mean: over the whole run); accuracy in percent; gap s1 - s2, stable "
        "rank |A|_F²/s1² and s1 of A - U: of the trained patterns A, also where values are "
        "averaged with A - U. 95% intervals over seeds.",
    ]
    for placement in _placements(table):
        lines += [
            f"- {PLACEMENT_NAMES[placement]}, fix minus none, seed by seed: final loss "
            f"{_plain(gain(table, placement, FINAL))}, mean loss "
            f"{_plain(gain(table, placement, WHOLE))}, accuracy "
            + ", ".join(
                f"{kind} {gain(table, placement, f'accuracy, {kind}').percent()}" for kind in KINDS
            )
            + " points."
        ]
    return "\n".join(lines)


def _plain(m: Mean) -> str:
    return f"{m.value:.3f}" if math.isnan(m.half) else f"{m.value:.3f} ± {m.half:.3f}"


def claims(table: pd.DataFrame) -> list[Claim]:
    """Does training gain from the fix?"""
    out = []
    for placement in _placements(table):
        found = {q: gain(table, placement, q) for q in (FINAL, WHOLE)}
        better = [m.excludes_zero and m.value < 0 for m in found.values()]
        worse = [m.excludes_zero and m.value > 0 for m in found.values()]
        same: Any = "not decided"
        if any(better) or any(worse):
            same = "in part" if any(better) and any(worse) else "yes" if any(better) else "no"
        n = found[FINAL].n
        out.append(
            Claim(
                f"training gains from the fix ({PLACEMENT_NAMES[placement]})",
                "lower loss, faster (reviewers questioned it)",
                "; ".join(f"{q} {_plain(m)}" for q, m in found.items())
                + f" (fix minus none, {n} seed{'s' * (n != 1)})",
                same,
                "a causal model of 2 layers with skip connections, on sums of some 12 tokens: the "
                "paper's gap is that of long, unmasked sequences",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="centring",
    title="Training with and without the spectral gap",
    source="Naderi et al. 2024 (arXiv 2410.07799)",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.3, "full": 2.5},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
