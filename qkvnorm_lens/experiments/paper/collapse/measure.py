"""Circuit collapse against the noise's size (Menary et al. 2024, Fig. 3 and 13).

Noise in each layer on its own, on clean inputs. The loose rate is computed and, to check that,
sampled; the strict rate is sampled.
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWS: Final[dict[Size, int]] = {"smoke": 8, "quick": 32, "full": 64}
RATE: Final = 0.01
PUBLISHED: Final = {"Baseline": 0.11, "Alternate": 0.075, "Large": 0.055}


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Exact and sampled rates of one model, against sigma; by layer too."""
    import hooks

    model = subject.load()
    tokens = reading(subject, AMOUNT[size]).ids
    exact = hooks.collapse_probe(model, tokens, draws=DRAWS[size], progress=False)
    sampled = hooks.collapse_probe(
        model, tokens, draws=DRAWS[size], seed=1, method="sample", progress=False
    )
    rows: list[dict[str, Any]] = []

    def add(quantity: str, frame: pd.DataFrame, value: str, error: str | None = None) -> None:
        layers = frame["layer"] if "layer" in frame else [-1] * len(frame)
        errors = frame[error] if error else [math.nan] * len(frame)
        rows.extend(
            {"quantity": quantity, "layer": layer, "sigma": s, "value": v, "se": e, "rows": n}
            for layer, s, v, e, n in zip(
                layers, frame["sigma"], frame[value], errors, frame["rows"], strict=True
            )
        )

    whole, layers = exact.to_frame("model"), exact.to_frame("layer")
    add("loose", whole, "loose", "se_prompts")
    add("loose without sinks", whole, "loose_content")
    add("loose, centred gauge", whole, "loose_centred")
    add("strict", whole, "strict", "se_strict")
    add("loose", layers, "loose")
    counted = sampled.to_frame("model")
    add("loose, sampled", counted, "loose", "se")
    facts = {
        "sparse share": exact.n_sparse / max(int(exact.examined.sum()), 1),
        "sink share": float(whole["sinks"].iloc[0]) / max(exact.n_sparse, 1),
        "score level": float(whole["score_level"].iloc[0]),
        "sigma at 1%": _at(exact, content=False),
        "sigma at 1% without sinks": _at(exact, content=True),
        "sigma at 1%, strict": crossing(whole["sigma"], whole["strict"], RATE),
    }
    n = exact.n_sparse
    rows += [
        {"quantity": k, "layer": -1, "sigma": math.nan, "value": v, "se": math.nan, "rows": n}
        for k, v in facts.items()
    ]
    frame = pd.DataFrame(rows)
    return pd.concat([pd.DataFrame([subject.columns] * len(frame)), frame], axis=1)


def _at(report: Any, *, content: bool) -> float:
    sigma = report.sigma_at(RATE, content=content)
    return float(sigma)


def crossing(sigma: pd.Series, rate: pd.Series, wanted: float) -> float:
    """Sigma at which a measured curve first reaches a rate, linear between points; inf if never."""
    x, y = sigma.to_numpy(dtype=float), rate.to_numpy(dtype=float)
    if not np.isfinite(y).all():
        return math.nan
    above = np.flatnonzero(y >= wanted)
    if not len(above):
        return math.inf
    i = int(above[0])
    if i == 0:
        return float(x[0])
    return float(np.interp(wanted, y[i - 1 : i + 1], x[i - 1 : i + 1]))


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return [
        Part(
            s.name, partial(measure, s, size), s, {**AMOUNT[size].settings(s), "draws": DRAWS[size]}
        )
        for s in subjects
    ]


def disagreement(table: pd.DataFrame) -> pd.DataFrame:
    """(sampled - exact) / standard error over draws, for every model and sigma with draws.

    Where no draw moved a row, or all did the same, the error is taken from the rows: it is then
    that of independent rows, which is too small if anything.
    """
    whole = table[table["layer"] == -1]
    keys = ["model", "sigma"]
    exact = whole[whole["quantity"] == "loose"].set_index(keys)
    counted = whole[whole["quantity"] == "loose, sampled"].set_index(keys)
    sampled = counted[["value", "se"]].rename(columns={"value": "value_sampled"})
    both = exact[["value", "rows"]].join(sampled)
    both = both[both["rows"] > 0]
    gap = both["value_sampled"] - both["value"]
    independent = np.sqrt(both["value"] * (1 - both["value"]) / both["rows"])
    error = both["se"].where(both["se"] > 0, independent).astype(float)
    z = (gap / error).where(error > 0, np.where(gap.abs() < 1e-12, 0.0, np.inf))
    return pd.DataFrame({"gap": gap, "error": error, "z": z}).reset_index()


def _fact(table: pd.DataFrame, group: str, quantity: str) -> Mean:
    chosen = table[(table["group"] == group) & (table["quantity"] == quantity)]
    values = chosen["value"].to_numpy(dtype=float)
    return mean(values[np.isfinite(values)].tolist())


def figure(table: pd.DataFrame) -> Figure:
    """A panel for each group of models: exact lines, sampled points, strict, without sinks."""
    names = groups(table)
    columns = min(3, len(names))
    fig, axes = panels(-(-len(names) // columns), columns, height=2.9, share_y=True)
    for ax, group in zip(axes, names, strict=False):
        _draw(ax, table[table["group"] == group])
        ax.set_title(label(group, table[table["group"] == group]["placement"].iloc[0]), fontsize=9)
    for ax in axes[len(names) :]:
        ax.remove()
    for i, ax in enumerate(axes[: len(names)]):
        if i % columns == 0:
            ax.set_ylabel("sparse rows that collapse (%)")
        ax.set_xlabel("RMS of the noise, σ (%)")
    handles = {h.get_label(): h for ax in axes[: len(names)] for h in _handles(ax)}
    fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, fontsize=8)
    return fig


def _handles(ax: Axes) -> list[Any]:
    return list(ax.get_legend_handles_labels()[0])


def _draw(ax: Axes, mine: pd.DataFrame) -> None:
    colour = COLOURS[mine["placement"].iloc[0]]
    whole = mine[mine["layer"] == -1]
    for i, model in enumerate(dict.fromkeys(whole["model"])):
        one = whole[whole["model"] == model]
        first = i == 0

        def curve(quantity: str, one: pd.DataFrame = one) -> pd.DataFrame:
            return one[one["quantity"] == quantity].sort_values("sigma")

        for quantity, style, name in (
            ("loose", "-", "loose, exact"),
            ("loose without sinks", "--", "loose, exact, sinks left out"),
        ):
            c = curve(quantity)
            ax.plot(
                100 * c["sigma"],
                100 * c["value"],
                style,
                color=colour,
                linewidth=1,
                label=name if first else None,
            )
        c = curve("loose, sampled")
        ax.errorbar(
            100 * c["sigma"],
            100 * c["value"],
            yerr=200 * c["se"].fillna(0),
            fmt="o",
            markersize=3,
            color=colour,
            markerfacecolor="none",
            linewidth=1,
            label="loose, sampled (2 s.e. over draws)" if first else None,
        )
        c = curve("strict")
        ax.plot(
            100 * c["sigma"],
            100 * c["value"],
            ":",
            color="black",
            linewidth=1,
            label="strict, sampled" if first else None,
        )
    ax.axhline(1, color="grey", linewidth=0.7)
    ax.set_xscale("log")
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlim(0.9, 60)
    ax.set_ylim(0.01, 100)
    log_ticks(ax.xaxis)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(visible=True, linewidth=0.4, alpha=0.6)


def text(table: pd.DataFrame) -> str:
    """Thresholds by group, and whether sampling agrees with the exact curve."""
    head = ["models", "seeds", "rows sparse", "sinks among them", "score level"]
    head += ["σ at 1%", "without sinks", "strict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups(table):
        mine = table[table["group"] == group]
        level = _fact(table, group, "score level")
        spread = "" if math.isnan(level.half) else f" ± {level.half:.2g}"
        cells = [
            group,
            str(mine["seed"].nunique()),
            _fact(table, group, "sparse share").percent(),
            _fact(table, group, "sink share").percent(),
            f"{level.value:.3g}{spread}",
            *(
                _percent(table, group, f"sigma at 1%{kind}")
                for kind in ("", " without sinks", ", strict")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    z = disagreement(table)
    worst = z.iloc[int(z["z"].abs().to_numpy().argmax())] if len(z) else None
    lines += [
        "",
        "All in percent but the score level (the mean q.k part of an attended score); ± is half "
        "the 95% interval over seeds; never: not within the uniform law (σ up to 57.7%).",
    ]
    if worst is not None:
        lines.append(
            f"Sampled and exact: {len(z)} points, {(z['z'].abs() > 2).mean():.1%} of them more "
            f"than 2 standard errors apart, the furthest {abs(worst['z']):.1f} "
            f"({worst['model']}, σ = {100 * worst['sigma']:g}%). Points of one model share their "
            "draws, so they are not independent."
        )
    return "\n".join(lines)


def _percent(table: pd.DataFrame, group: str, quantity: str) -> str:
    chosen = table[(table["group"] == group) & (table["quantity"] == quantity)]
    values = chosen["value"].to_numpy(dtype=float)
    never = int(np.isinf(values).sum())
    if never == len(values) or not len(values):
        return "never" if never else "-"
    if never:  # the others' mean alone would be too low
        least = ", ".join(f"{100 * v:.1f}" for v in sorted(values[np.isfinite(values)]))
        return f"{least}; never in {never} of {len(values)}"
    return _fact(table, group, quantity).percent()


def claims(table: pd.DataFrame) -> list[Claim]:
    """The published thresholds beside ours."""
    published = ", ".join(f"{100 * v:g}% ({k})" for k, v in PUBLISHED.items())
    out = []
    for group in groups(table):
        mine = table[table["group"] == group]
        if mine["placement"].iloc[0] != "pre":
            continue
        ours = _percent(table, group, "sigma at 1%")
        sigma = _fact(table, group, "sigma at 1%")
        half = math.inf if math.isnan(sigma.half) else sigma.half  # one seed decides nothing
        apart = max(min(PUBLISHED.values()) - sigma.value, sigma.value - max(PUBLISHED.values()))
        out.append(
            Claim(
                f"Pre-Norm: σ at which 1% of sparse rows collapse ({group})",
                published,
                f"{ours}% (score level {_fact(table, group, 'score level').value:.3g})",
                "yes" if apart <= 0 else "no" if apart > half else "not decided",
                "the number hangs on the score level (see gauge), which the paper does not give, "
                "and on the model: its three differ twofold, not in the order of their size, and "
                "ours are smaller than all of them",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="collapse",
    title="Circuit collapse of sparse attention under norm noise",
    source="Menary et al. 2024, Fig. 3 and 13",
    models="any",
    minutes={"smoke": 0.3, "quick": 2.0, "full": 8.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
