"""Accuracy in distribution and out of it (Menary et al. 2024, the table; several seeds here)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    Claim,
    Experiment,
    Mean,
    Part,
    Size,
    Subject,
    difference,
    groups,
    label,
    mean,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUMS: Final[dict[Size, int]] = {"smoke": 400, "quick": 4_000, "full": 20_000}
KINDS: Final = ("in distribution", "interpolation", "extrapolation")
PUBLISHED: Final = {
    "pre": dict(zip(KINDS, (0.9138, 0.8746, 0.6665), strict=True)),
    "qkv": dict(zip(KINDS, (0.9099, 0.8254, 0.4676), strict=True)),
}


def accuracies(subject: Subject, sums: int) -> pd.DataFrame:
    """Accuracy on freshly drawn sums of each kind, teacher forced."""
    from qkvnorm_lens.training import SPLITS, TEST_SEED, evaluate, tests_of

    model, split = subject.load(), subject.split
    name = next(name for name, known in SPLITS.items() if known == split)
    return pd.DataFrame(
        [
            {
                **subject.columns,
                "kind": kind,
                "counts": "-".join(map(str, SPLITS[of].counts)),
                **dataclasses.asdict(evaluate(model, of, rows=sums, seed=TEST_SEED)),
            }
            for kind, of in tests_of(name, int(model.cfg.n_ctx)).items()
        ]
    )


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    sums = SUMS[size]
    return [Part(s.name, partial(accuracies, s, sums), s, {"sums": sums}) for s in subjects]


def over_seeds(table: pd.DataFrame, group: str, kind: str, column: str = "per_token") -> Mean:
    """A group's accuracy with its interval."""
    chosen = table[(table["group"] == group) & (table["kind"] == kind)]
    return mean(chosen[column].tolist())


def _study_difference(table: pd.DataFrame, kind: str, column: str) -> Mean | None:
    """Pre-Norm minus QKV-Norm over the study models, if several seeds of both are there."""
    study = table[(table["kind"] == kind) & table["group"].str.startswith("study-")]
    pre, qkv = (study[study["placement"] == p][column].tolist() for p in ("pre", "qkv"))
    return difference(pre, qkv) if min(len(pre), len(qkv)) > 1 else None


def figure(table: pd.DataFrame) -> Figure:
    """Points: seeds; bars: 95% intervals of their mean; crosses: published (another scale)."""
    fig, axes = panels(1, 2, width=4.2, height=3.4, share_y=True)
    named = (("per_token", "per token, ] counted"), ("per_token_without_end", "without ]"))
    for ax, (column, title) in zip(axes, named, strict=True):
        _draw(ax, table, column)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.grid(visible=True, axis="y", linewidth=0.5, alpha=0.5)
    axes[0].set_ylabel("accuracy (%)")
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return fig


def _draw(ax: Axes, table: pd.DataFrame, column: str) -> None:
    names = groups(table)
    for i, group in enumerate(names):
        mine = table[table["group"] == group]
        placement = mine["placement"].iloc[0]
        at = np.arange(len(KINDS)) + (i - (len(names) - 1) / 2) * 0.11
        means = [over_seeds(table, group, kind, column) for kind in KINDS]
        marker = "o" if group.startswith("study") else "s"
        ax.errorbar(
            at,
            [100 * m.value for m in means],
            yerr=[100 * np.nan_to_num(m.half) for m in means],
            color=COLOURS[placement],
            marker=marker,
            markersize=4,
            linestyle="none",
            capsize=2,
            label=label(group, placement),
        )
        for x, kind in zip(at, KINDS, strict=True):
            seeds = 100 * mine[mine["kind"] == kind][column]
            ax.plot([x] * len(seeds), seeds, ".", color=COLOURS[placement], alpha=0.4, markersize=5)
    if column == "per_token":
        for placement, numbers in PUBLISHED.items():
            ax.plot(
                np.arange(len(KINDS)) + 0.42,
                [100 * numbers[kind] for kind in KINDS],
                "x",
                color=COLOURS[placement],
                label=f"{PLACEMENT_NAMES[placement]}, published (Baseline)",
            )


def text(table: pd.DataFrame) -> str:
    """The table of means, and the gaps between the placements."""
    lines = ["| models | seeds | " + " | ".join(KINDS) + " | extrapolation without ] |"]
    lines.append("|" + "---|" * 6)
    for group in groups(table):
        means = [over_seeds(table, group, kind) for kind in KINDS]
        bare = over_seeds(table, group, "extrapolation", "per_token_without_end")
        cells = " | ".join(m.percent() for m in [*means, bare])
        lines.append(f"| {group} | {means[0].n} | {cells} |")
    lines.append("")
    lines.append(
        "Per-token accuracy in percent, teacher forced, with 95% intervals over seeds. `]` ends an "
        "answer and is counted unless a column says otherwise: more than a quarter of the scored "
        "tokens of these sums, about a fifth of those of the paper's."
    )
    for kind in KINDS:
        for column, name in (("per_token", "`]` counted"), ("per_token_without_end", "without")):
            gap = _study_difference(table, kind, column)
            if gap is not None:
                lines.append(
                    f"Pre-Norm minus QKV-Norm, {kind}, {name}: {gap.percent()} points "
                    f"({gap.n} seeds each)."
                )
    return "\n".join(lines)


def claims(table: pd.DataFrame) -> list[Claim]:
    """The table's entries, and its gap in extrapolation."""
    out = []
    for kind in KINDS:
        gap = _study_difference(table, kind, "per_token")
        if gap is None:
            continue
        published = PUBLISHED["pre"][kind] - PUBLISHED["qkv"][kind]
        ours = f"{gap.percent()} points ({gap.n} seeds each)"
        if gap.excludes_zero:
            same = "yes" if (gap.value > 0) == (published > 0) else "no"
        else:
            same = "not decided" if abs(published - gap.value) <= gap.half else "no"
        why = (
            "smaller sums (2 or 4 numbers of 1 or 2 digits, extrapolation to 5 and 6), a model of "
            "2 layers, trained for 2 million sums with Muon"
        )
        out.append(
            Claim(
                f"Pre-Norm minus QKV-Norm, {kind}",
                f"{100 * published:+.1f} points (one seed each)",
                ours,
                same,  # type: ignore[arg-type]
                why,
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="accuracy",
    title="Accuracy in distribution, in interpolation and in extrapolation",
    source="Menary et al. 2024, table of accuracies",
    models="addition",
    minutes={"smoke": 0.1, "quick": 1.0, "full": 4.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
