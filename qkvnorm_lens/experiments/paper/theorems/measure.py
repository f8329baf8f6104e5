"""Pictures of theorems 1-3 and 5-8, from constructed heads (Menary et al. 2024, Section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import pandas as pd

from qkvnorm_lens.experiments.core import (
    COLOURS,
    PLACEMENT_NAMES,
    Claim,
    Experiment,
    Part,
    Size,
    Subject,
    panels,
)
from qkvnorm_lens.plots.charts import BLUE, GREEN, GREY, ORANGE, RUNS, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Where = Literal["upper left", "lower left", "lower right", "center right"]
EXACT: Final = 1e-9
"""Up to this a value that was calculated in float64 agrees with a prediction."""


@dataclass(frozen=True)
class Scale:
    """How much: points of a curve, random points and draws, and the most subspaces."""

    points: int
    scattered: int
    draws: int
    subspaces: int


SCALES: Final[dict[Size, Scale]] = {
    "smoke": Scale(5, 30, 500, 2),
    "quick": Scale(17, 80, 4_000, 4),
    "full": Scale(33, 120, 40_000, 4),
}


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each panel of the figure."""
    from qkvnorm_lens.experiments.paper.theorems import parts

    scale = SCALES[size]
    n, points = scale.points, {"points": scale.points}
    draws, most = scale.draws, scale.subspaces
    scattered = {**points, "scattered": scale.scattered}
    return [
        Part("turning", partial(parts.turning, n), settings=points),
        Part("growing", partial(parts.growing, n), settings=points),
        Part("matching", partial(parts.matching, n), settings=points),
        Part("offset", partial(parts.offset, n), settings=points),
        Part("freedom", partial(parts.freedom, most), settings={"subspaces": most}),
        Part("limits", partial(parts.limits, n), settings=points),
        Part("boundary", partial(parts.boundary, n, scale.scattered), settings=scattered),
        Part("probability", partial(parts.probability, draws), settings={"draws": draws}),
        Part("isotropic", partial(parts.isotropic, n), settings=points),
    ]


# -- figure ---------------------------------------------------------------------------------


def figure(table: pd.DataFrame) -> Figure:
    """Nine panels: points were measured on our blocks, lines are what a theorem predicts."""
    fig, axes = panels(3, 3, width=3.5, height=3.0)
    drawn = (
        ("turning", _turning, "theorems 1-3: B turns on its sphere"),
        ("growing", _growing, "theorem 2: B's length changes"),
        ("matching", _matching, "theorem 2: a matching head fails"),
        ("offset", _offset, "theorem 2 behind constant offsets"),
        ("freedom", _freedom, "theorems 1-3: dimensions lost"),
        ("limits", _limits, "theorems 5, 6: isotropic to sparse"),
        ("boundary", _boundary, "theorem 7: where a row collapses"),
        ("probability", _probability, "theorem 7: how often it does"),
        ("isotropic", _isotropic, "theorem 8: isotropic attention"),
    )
    for ax, (name, draw, title) in zip(axes, drawn, strict=True):
        draw(ax, table[table["panel"] == name])
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8)
        grid(ax)
    fig.suptitle("points: measured on our blocks; lines: what the theorem predicts", fontsize=10)
    return fig


def _curves(
    ax: Axes, table: pd.DataFrame, named: dict[tuple[str, str], tuple[str, str, str]]
) -> None:
    """Points and predicted lines of (placement, series), with (label, colour, marker).

    Where there are many points each curve shows others, so that equal ones can be seen.
    """
    for i, ((placement, series), (label, colour, marker)) in enumerate(named.items()):
        mine = table[(table["placement"] == placement) & (table["series"] == series)]
        size = {"x": 6, "+": 9}.get(marker, 4)
        every = (i, len(named)) if len(mine) > 3 * len(named) else None
        ax.plot(mine["x"], mine["predicted"], color=colour, linewidth=1.2)
        ax.plot(
            mine["x"],
            mine["value"],
            marker,
            color=colour,
            markersize=size,
            label=label,
            markevery=every,
        )


def _legend(ax: Axes, where: Where) -> None:
    ax.legend(loc=where, fontsize=7.5, handletextpad=0.3, borderpad=0.3, labelspacing=0.3)


def _turning(ax: Axes, table: pd.DataFrame) -> None:
    independent, orthogonal = "independent subspaces", "orthogonal subspaces"
    _curves(
        ax,
        table,
        {
            ("none", independent): ("No-Norm, independent", GREEN, "s"),
            ("qkv", independent): ("QKV-Norm, independent", ORANGE, "x"),
            ("pre", orthogonal): ("Pre-Norm, orthogonal", BLUE, "+"),
            ("pre", independent): ("Pre-Norm, independent", BLUE, "o"),
        },
    )
    ax.set_xlabel("angle of B's content (turns)")
    ax.set_ylabel("score of head A (over first)")
    ax.set_ylim(0.75, 2.65)
    _legend(ax, "upper left")


def _growing(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("none", "independent subspaces"): ("No-Norm", GREEN, "s"),
            ("qkv", "independent subspaces"): ("QKV-Norm", ORANGE, "x"),
            ("pre", "orthogonal subspaces"): ("Pre-Norm, RMSNorm", BLUE, "o"),
            ("pre", "LayerNorm, orthogonal subspaces"): ("Pre-Norm, LayerNorm", BLUE, "+"),
        },
    )
    _log2(ax)
    ax.set_xlabel("length of B's content (over first)")
    ax.set_ylabel("score of head A (over first)")
    ax.set_ylim(0, 1.1)
    _legend(ax, "lower left")


def _log2(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(plain)


def _matching(ax: Axes, table: pd.DataFrame) -> None:
    series = "attention on the match"
    _curves(
        ax,
        table,
        {
            ("none", series): ("No-Norm", GREEN, "s"),
            ("qkv", series): ("QKV-Norm", ORANGE, "x"),
            ("pre", series): ("Pre-Norm", BLUE, "o"),
        },
    )
    jump = float(table[table["series"] == "arg max jumps"]["value"].iloc[0])
    ax.axvline(jump, color=GREY, linewidth=0.9, linestyle=":")
    ax.annotate(
        "arg max\njumps", (jump, 0.5), (5, 0), textcoords="offset points", fontsize=7.5, color=GREY
    )
    _log2(ax)
    ax.set_xlabel("length of the match's content in B")
    ax.set_ylabel("attention on the match")
    _legend(ax, "lower left")


def _offset(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("pre", "B turns on its circle"): ("b turns, r = 1", GREEN, "s"),
            ("pre", "B leaves its circle"): ("r grows from 1 to 3", BLUE, "o"),
        },
    )
    ax.set_xlabel("turns of b, or (r - 1)/2")
    ax.set_ylabel("Pre-Norm's score of head A\n(over first)")
    ax.set_ylim(0.82, 1.03)
    _legend(ax, "lower left")


def _freedom(ax: Axes, table: pd.DataFrame) -> None:
    _curves(
        ax,
        table,
        {
            ("none", "No-Norm"): ("No-Norm: 0", GREEN, "s"),
            ("qkv", "QKV-Norm"): ("QKV-Norm: $N_s$", ORANGE, "x"),
            ("pre", "Pre-Norm, RMSNorm"): ("Pre-RMSNorm: $N_s$", BLUE, "+"),
            ("pre", "Pre-Norm, LayerNorm"): ("Pre-LayerNorm: $N_s+1$", BLUE, "o"),
        },
    )
    ax.set_xticks(sorted(table["x"].unique()))
    ax.set_ylim(-0.4, table["value"].max() + 2.2)
    ax.set_xlabel("number of subspaces $N_s$")
    ax.set_ylabel("dimensions lost, of N")
    _legend(ax, "upper left")


def _limits(ax: Axes, table: pd.DataFrame) -> None:
    """Pre-Norm's curves; the isotropic limit as dashes at the left, the sparse one at the right."""
    mine = table[table["placement"] == "pre"]
    along = {
        ("pre", site): (f"noise on {site}", colour, "o")
        for site, colour in zip("qkv", RUNS, strict=False)
    }
    _curves(ax, mine[mine["x"] <= _SHOWN], along)
    for site, colour in zip("qkv", RUNS, strict=False):
        for end, span in (("isotropic", (0.0, 0.12)), ("sparse", (0.88, 1.0))):
            limit = mine[mine["series"] == f"{site}, {end}"]["predicted"].iloc[0]
            ax.axhline(limit, *span, color=colour, linewidth=1.0, linestyle="--")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.set_xlim(0.01 / 1.5, _SHOWN * 1.5)
    ax.set_xlabel("factor on the scores (Pre-Norm)")
    ax.set_ylabel("movement of the output\nper unit of noise")
    _legend(ax, "upper left")


_SHOWN: Final = 101.0  # the factor on the scores up to which curves are drawn


def _boundary(ax: Axes, table: pd.DataFrame) -> None:
    for placement, marker in zip(("none", "pre", "qkv"), "sox", strict=True):
        mine = table[table["placement"] == placement]
        rhos = sorted((s for s in mine["series"].unique() if s[0].isdigit()), key=float)
        for rho, line in zip(rhos, ("-", "--", ":"), strict=False):
            curve = mine[mine["series"] == rho]
            colour = COLOURS[placement]
            if placement == "none":
                ax.plot(
                    curve["x"],
                    curve["predicted"],
                    line,
                    color="black",
                    linewidth=1.0,
                    label=f"ρ = {rho}",
                )
            ax.plot(curve["x"], curve["value"], marker, color=colour, markersize=3)
    for series, face in (("moved", "#E69F00"), ("stays", "#BBBBBB")):
        some = table[table["series"] == series]
        ax.plot(
            some["x"],
            some["value"],
            ".",
            color=face,
            markersize=4,
            zorder=0,
            label=f"{series} (ρ = 1.2)",
        )
    ax.set_xlim(-0.52, 0.52)
    ax.set_ylim(-0.52, 0.8)
    ax.set_xlabel("$k_*$, noise on the attended key")
    ax.set_ylabel("$k_t$, noise on the other key")
    _legend(ax, "lower right")


def _probability(ax: Axes, table: pd.DataFrame) -> None:
    shown = table.assign(
        x=100 * table["x"], value=100 * table["value"], predicted=100 * table["predicted"]
    )
    for placement, marker in zip(("none", "pre", "qkv"), "sox", strict=True):
        mine = shown[shown["placement"] == placement]
        for series, line in (("key noise", "-"), ("query noise", "--")):
            curve = mine[mine["series"] == series]
            label = PLACEMENT_NAMES[placement] if series == "key noise" else None
            ax.plot(
                curve["x"],
                curve["value"],
                marker,
                color=COLOURS[placement],
                markersize=4,
                label=label,
            )
            if placement == "none":
                ax.plot(
                    curve["x"], curve["predicted"], line, color="black", linewidth=1.0, zorder=1
                )
    ax.annotate("noise on k", (30, 50), (0, 6), textcoords="offset points", fontsize=8, ha="right")
    ax.annotate("noise on q", (30, 0), (0, 5), textcoords="offset points", fontsize=8, ha="right")
    ax.set_xlabel("RMS of the noise, σ (%)")
    ax.set_ylabel("draws that collapse the row (%)")
    _legend(ax, "center right")


def _isotropic(ax: Axes, table: pd.DataFrame) -> None:
    shown = table.assign(x=100 * table["x"])
    mine = shown[shown["placement"] == "pre"]
    styles = zip(mine["series"].unique(), RUNS, "os^x", strict=False)
    _curves(ax, mine, {("pre", s): (s, colour, marker) for s, colour, marker in styles})
    ax.set_xlabel("RMS of the key noise, σ (%), Pre-Norm")
    ax.set_ylabel("movement of the output\n(over the RMS of m)")
    _legend(ax, "upper left")


# -- words ----------------------------------------------------------------------------------


def deviation(table: pd.DataFrame, panel: str, *series: str) -> float:
    """Largest difference between measured and predicted in a panel."""
    mine = table[table["panel"] == panel]
    if series:
        mine = mine[mine["series"].isin(series)]
    return float((mine["value"] - mine["predicted"]).abs().max())


def text(table: pd.DataFrame) -> str:
    """What each theorem says on our blocks, with the largest deviation from its prediction."""
    turning = table[(table["panel"] == "turning") & (table["placement"] == "pre")]
    factor = turning[turning["series"] == "independent subspaces"]["value"]
    growing = table[(table["panel"] == "growing") & (table["placement"] == "pre")]
    jump = table[table["series"] == "arg max jumps"].iloc[0]
    drop = _attention_at_end(table)
    own = ("each key its own",)
    lines = [
        f"Theorems 1 and 3: heads that read linearly independent subspaces, far from orthogonal, "
        f"do not notice each other's content under No-Norm and QKV-Norm, whatever its direction or "
        f"length (largest change of a score: {_still(table):.0e} of it).",
        f"Theorem 2: under Pre-Norm the same independent subspaces interfere although each lies on "
        f"its sphere (the score of head A goes through {factor.min():.2f} to {factor.max():.2f} of "
        f"its start as B turns), orthogonal ones do not; where B leaves its sphere, by a factor "
        f"{growing['x'].max():g}, orthogonal ones do too: the score falls to "
        f"{growing['value'].min():.2f}. The prediction, one factor 1/|x|, holds to "
        f"{max(deviation(table, 'turning'), deviation(table, 'growing')):.0e}.",
        f"A matching head, attention {drop['first']:.3f} on the match: when the match's content in "
        f"B grows fourfold, {drop['pre']:.0e} is left under Pre-Norm, {drop['none']:.3f} under "
        f"No-Norm and {drop['qkv']:.3f} under QKV-Norm. The arg max jumps at a length of "
        f"{jump['value']:.4f} (predicted {jump['predicted']:.4f}).",
        "Constant offsets: x_A = (2, cos a, sin a, 0, 0) and x_B = (3, 0, 0, cos b, sin b) have "
        "x_A.x_B = 6 and do not interfere under Pre-Norm (to "
        f"{deviation(table, 'offset', 'B turns on its circle'):.0e}); off the circle they do, as "
        f"predicted (to {deviation(table, 'offset', 'B leaves its circle'):.0e}).",
        f"Dimensions that cannot be attended to, as numerical rank, with up to "
        f"{table[table['panel'] == 'freedom']['x'].max():.0f} subspaces: 0 for No-Norm, N_s for "
        f"QKV-Norm and Pre-RMSNorm, N_s + 1 for Pre-LayerNorm: "
        f"{'as predicted' if deviation(table, 'freedom') == 0 else 'not as predicted'}. "
        "(Pre-Norm's coordinates were kept on spheres, which is what theorem 2 asks for.)",
        f"Theorems 5 and 6: the output's movement under noise on q, k and v equals the first order "
        f"of theorem 4 from isotropic to sparse attention (to {deviation(table, 'limits'):.0e}), "
        "with plain means at one end, and nothing (q, k) or the attended token's own noise (v) at "
        "the other.",
        f"Theorem 7: the k_t at which a row goes to t, found by bisection, is rho (1 + k_*) - 1 to "
        f"{deviation(table, 'boundary', *_rhos(table)):.0e}; query noise of any size moved "
        f"{table[table['series'] == 'query noise']['value'].max():.0%} of the arg maxes. Under "
        f"uniform noise the share of draws that collapse a sparse row of five competitors agrees "
        f"with the closed form (largest difference {deviation(table, 'probability'):.4f}).",
        f"Theorem 8: key noise of 2% on an isotropic head moves its output as w <m~ k> says, to "
        f"{_relative(table):.1%} of it, and by the square of the noise beyond that "
        f"({deviation(table, 'isotropic', *own):.3f} at 30%, in units of the RMS of m); the same "
        "noise on all keys, or q = 0, moves nothing; noise independent of m moves nothing to first "
        "order.",
    ]
    return "\n\n".join(lines)


def _still(table: pd.DataFrame) -> float:
    mine = table[
        table["panel"].isin(("turning", "growing")) & table["placement"].isin(("none", "qkv"))
    ]
    return float((mine["value"] - 1).abs().max())


def _attention_at_end(table: pd.DataFrame) -> dict[str, float]:
    mine = table[table["series"] == "attention on the match"]
    last = mine[mine["x"] == mine["x"].max()].set_index("placement")["value"]
    first = mine[(mine["x"] - 1).abs() < EXACT]["value"]
    return {"first": float(first.iloc[0]), **{p: float(last[p]) for p in ("none", "pre", "qkv")}}


def _rhos(table: pd.DataFrame) -> list[str]:
    series = table[table["panel"] == "boundary"]["series"].unique()
    return [s for s in series if str(s)[0].isdigit()]


def _relative(table: pd.DataFrame) -> float:
    """Largest relative deviation of theorem 8 at the smallest noise."""
    mine = table[table["series"] == "each key its own"]
    least = mine[mine["x"] == mine["x"].min()]
    return float(((least["value"] - least["predicted"]) / least["predicted"]).abs().max())


def claims(table: pd.DataFrame) -> list[Claim]:
    """Each theorem beside what our blocks do."""
    pre = table["placement"] == "pre"
    interferes = (table[pre & table["panel"].isin(("turning", "growing"))]["value"] - 1).abs().max()
    moved = float(table[table["series"] == "query noise"]["value"].max())
    exact = "computed in float64 on our own blocks"
    checks = [
        (
            "theorems 1 and 3",
            "linear independence suffices for No-Norm and QKV-Norm",
            f"scores change by {_still(table):.0e}",
            _still(table) < EXACT,
        ),
        (
            "theorem 2",
            "Pre-Norm wants orthogonal spheres; else one factor interferes",
            f"scores change by up to {interferes:.0%}, as 1/|x| to "
            f"{max(deviation(table, p) for p in ('turning', 'growing', 'matching', 'offset')):.0e}",
            interferes > 0.1
            and max(deviation(table, p) for p in ("turning", "growing", "matching", "offset"))
            < EXACT,
        ),
        (
            "degrees of freedom",
            "N, N - N_s, N - N_s - 1, N - N_s of N",
            f"ranks differ by {deviation(table, 'freedom'):.0f}",
            deviation(table, "freedom") == 0,
        ),
        (
            "theorems 5 and 6",
            "0, 0, e_m; and <m k~^T> e_q, <m~ e_k^T> q, <e_m>",
            f"largest deviation {deviation(table, 'limits'):.0e}",
            deviation(table, "limits") < EXACT,
        ),
        (
            "theorem 7",
            "collapse iff w*/w_t < (1 + k_t)/(1 + k_*); query noise never",
            f"boundary to {deviation(table, 'boundary', *_rhos(table)):.0e}; query noise moved "
            f"{moved:.0%}",
            deviation(table, "boundary", *_rhos(table)) < EXACT and moved == 0,
        ),
        (
            "theorem 8",
            "isotropic key noise moves the output by w <m~_t k_t>",
            f"to {_relative(table):.1%} at 2% noise",
            _relative(table) < 0.02,
        ),
    ]
    return [
        Claim(what, f"{published} (Section 3)", ours, "yes" if holds else "no", exact)
        for what, published, ours, holds in checks
    ]


EXPERIMENT: Final = Experiment(
    name="theorems",
    title="What theorems 1-3 and 5-8 say, from constructed heads",
    source="Menary et al. 2024, Section 3, theorems 1-3 and 5-8",
    models="none",
    minutes={"smoke": 0.1, "quick": 0.1, "full": 0.2},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
