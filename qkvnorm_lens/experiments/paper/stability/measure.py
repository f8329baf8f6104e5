"""At which learning rates training fails, by width and placement (Menary et al. 2024, Fig. 24).

Small models, trained from their start with the paper's recipe (AdamW, decay of all parameters, a
constant rate) for a fixed number of steps.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
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
from qkvnorm_lens.plots.charts import GREY, grid, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qkvnorm_lens.training import Run

SPLIT: Final = "small-train"
WINDOWS: Final = 10  # a run's losses are means over so many equal parts of its steps
FORGOTTEN: Final = 0.5  # share of what was gained over frequencies whose loss again is a failure


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much: the grid, the steps of a run, and seeds of each."""

    widths: tuple[int, ...]
    rates: tuple[float, ...]
    placements: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int


SCALES: Final[dict[Size, Scale]] = {
    "smoke": Scale((32,), (1e-3, 1e-1), ("pre", "qkv"), (1,), 50),
    "quick": Scale((32, 64), (1e-3, 3e-2, 1e-1, 3e-1), ("pre", "qkv"), (1,), 200),
    "full": Scale(
        (32, 64, 128), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), ("pre", "qkv", "none"), (1, 2), 350
    ),
}


# -- measuring ------------------------------------------------------------------------------


def run_of(placement: str, width: int, rate: float, seed: int, steps: int) -> Run:
    """A study model of another width (heads and feed-forward in proportion), the paper's recipe.

    The paper halves its rate on a plateau of epochs of 2,000 steps: these runs are shorter, so
    that theirs is constant.
    """
    from qkvnorm_lens.models import named_config
    from qkvnorm_lens.training import Run, get_recipe

    config = named_config(
        "study", placement, seed=seed, d_model=width, n_heads=width // 16, d_mlp=4 * width
    )
    recipe = dataclasses.replace(get_recipe("paper"), lr=rate)
    if steps > recipe.epoch:
        raise ValueError(f"steps: wanted at most {recipe.epoch}, a constant rate; got {steps}")
    window = steps // WINDOWS
    return Run(config, SPLIT, recipe, steps=steps, seed=seed, log_every=window, eval_rows=100)


def train_and_see(run: Run) -> list[float]:
    """Mean training loss of each tenth of a run, nats per scored token (every sum is new)."""
    from qkvnorm_lens.training import train

    with tempfile.TemporaryDirectory() as folder:
        train(run, folder, progress=False, save_every=run.steps)
        log = pd.read_csv(Path(folder) / "log.csv")
    losses: list[float] = log["loss"].astype(float).tolist()
    return losses


def frequencies(sums: int = 20_000, seed: int = 21) -> float:
    """Loss (nats) of a model that knows only how frequent each target is: their entropy."""
    from qkvnorm_lens.training import draw

    batch = draw(SPLIT, sums, seed=seed)
    counts = np.unique(batch.targets[batch.scored].numpy(), return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def failure(losses: Sequence[float], known: float) -> str:
    """Why a run counts as failed; empty if it does not.

    Args:
        losses: means over equal parts of the run.
        known: loss of a model that knows only the targets' frequencies.

    Returns:
        ``"not a number"``; ``"frequencies"``: the last loss is not below ``known``; ``"spike"``:
        the last loss is above the lowest one by more than half of what that had gained on
        ``known``; or ``""``.
    """
    if not all(math.isfinite(x) for x in losses):
        return "not a number"
    last, lowest = losses[-1], min(losses)
    if last >= known:
        return "frequencies"
    return "spike" if last - lowest > FORGOTTEN * (known - lowest) else ""


def measure(placement: str, width: int, scale: Scale) -> pd.DataFrame:
    """One row for each rate and seed."""
    known = frequencies()
    rows = []
    for rate in scale.rates:
        for seed in scale.seeds:
            losses = train_and_see(run_of(placement, width, rate, seed, scale.steps))
            why = failure(losses, known)
            rows.append(
                {
                    "placement": placement,
                    "width": width,
                    "rate": rate,
                    "seed": seed,
                    "steps": scale.steps,
                    "loss": losses[-1],
                    "lowest": float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan,
                    "frequencies": known,
                    "failed": int(bool(why)),
                    "why": why or "trained",
                }
            )
    return pd.DataFrame(rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each placement and width."""
    scale = SCALES[size]
    settings = {
        "rates": list(scale.rates),
        "seeds": list(scale.seeds),
        "steps": scale.steps,
        "split": SPLIT,
        "recipe": "paper",
        "forgotten": FORGOTTEN,
    }
    return [
        Part(f"{p}-{w}", partial(measure, p, w, scale), None, {**settings, "width": w})
        for w in scale.widths
        for p in scale.placements
    ]


# -- reading the table ----------------------------------------------------------------------


def least_failing(table: pd.DataFrame, placement: str, width: int) -> float:
    """The lowest rate at which a run failed; inf where none did.

    At a higher rate runs may pass again, narrowly: the text names every run that failed.
    """
    mine = table[(table["placement"] == placement) & (table["width"] == width)]
    failed = mine[mine["failed"] > 0]["rate"]
    return float(failed.min()) if len(failed) else math.inf


def half_gain(table: pd.DataFrame, placement: str, width: int) -> list[float]:
    """For each seed the rate at which half of what the best rate gains on frequencies is lost.

    Interpolated linearly in the logarithm of the rate; inf where the grid ends before.
    """
    mine = table[(table["placement"] == placement) & (table["width"] == width)]
    out = []
    for _, runs in mine.sort_values("rate").groupby("seed"):
        known = float(runs["frequencies"].iloc[0])
        losses = runs["loss"].fillna(np.inf).clip(upper=2 * known).to_numpy(dtype=float)
        rates = np.log(runs["rate"].to_numpy(dtype=float))
        best = int(losses.argmin())
        limit = (losses[best] + known) / 2
        above = [i for i in range(best + 1, len(losses)) if losses[i] > limit]
        if not above or losses[best] >= known:
            out.append(math.inf if not above else math.nan)
            continue
        i = above[0]
        share = (limit - losses[i - 1]) / (losses[i] - losses[i - 1])
        out.append(math.exp(rates[i - 1] + share * (rates[i] - rates[i - 1])))
    return out


def figure(table: pd.DataFrame) -> Figure:
    """Loss after the run against the learning rate, a panel for each width; crosses: failed."""
    widths = sorted(table["width"].unique().tolist())
    fig, axes = panels(1, len(widths), width=3.6, height=3.2, share_y=True)
    known = float(table["frequencies"].iloc[0])
    top = 1.4 * known
    low = 0.9 * min(float(table["loss"].min()), known)
    for ax, width in zip(axes, widths, strict=True):
        _draw(ax, table[table["width"] == width], top)
        ax.axhline(known, color=GREY, linewidth=0.9, linestyle="--")
        ax.set_title(f"width {width}", fontsize=10)
        ax.set_xlabel("learning rate")
        ax.set_ylim(low, top + 0.04 * (top - low))
    axes[0].set_ylabel("loss at the end (nats per token)")
    axes[0].annotate(
        "knows only frequencies",
        (axes[0].get_xlim()[0], known),
        (4, 3),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return fig


def _draw(ax: Axes, table: pd.DataFrame, top: float) -> None:
    """A line through the seeds' means; what lies above the axis, or is no number, at its top."""
    placements = list(dict.fromkeys(table["placement"]))
    for i, placement in enumerate(placements):
        mine = table[table["placement"] == placement].assign(
            shown=lambda t: t["loss"].fillna(np.inf).clip(upper=top)
        )
        shift = 1.06 ** (i - (len(placements) - 1) / 2)  # side by side
        colour = COLOURS[placement]
        means = mine.groupby("rate")["shown"].mean()
        ax.plot(shift * means.index, means, color=colour, linewidth=1.3)
        for failed, marker, size in ((0, "o", 4), (1, "x", 7)):
            some = mine[mine["failed"] == failed]
            ax.plot(
                shift * some["rate"],
                some["shown"],
                marker,
                color=colour,
                markersize=size,
                label=f"{PLACEMENT_NAMES[placement]}{', failed' if failed else ''}",
            )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain)
    ax.minorticks_off()
    grid(ax)


def text(table: pd.DataFrame) -> str:
    """The lowest failing rate by width and placement, how they fail, and the definition."""
    placements = list(dict.fromkeys(table["placement"]))
    widths = sorted(table["width"].unique().tolist())
    known, steps = float(table["frequencies"].iloc[0]), int(table["steps"].iloc[0])
    lines = [
        f"Runs of {steps} steps of 128 sums, AdamW at a constant rate with decay 0.01 on all "
        f"parameters, {_seeds(table)} each. A run failed if a loss is "
        f"no number, if its last tenth is not below {known:.3f} nats (what knowing only the "
        "frequencies of targets gives), or if it lost again more than half of what it had gained "
        "on that. Half of the gain: the rate, interpolated, at which the last loss is half-way "
        "between that of the best rate and the frequencies' (one number for each seed).",
        "",
        "| width | "
        + " | ".join(
            f"{PLACEMENT_NAMES[p]}: {what}"
            for p in placements
            for what in ("first fails at", "half")
        )
        + " |",
        "|" + "---|" * (1 + 2 * len(placements)),
    ]
    for width in widths:
        cells = []
        for p in placements:
            halves = ", ".join(_rate(r, table) for r in half_gain(table, p, width))
            cells += [_rate(least_failing(table, p, width), table), halves]
        lines.append(f"| {width} | " + " | ".join(cells) + " |")
    lines.append("")
    for placement in placements:
        mine = table[table["placement"] == placement]
        failed = mine[mine["failed"] == 1]
        cells = failed.groupby(["width", "rate", "why"]).size()
        kinds = "; ".join(
            f"width {width} at {rate:g}: {why}{f', {n} seeds' if n > 1 else ''}"
            for (width, rate, why), n in cells.items()
        )
        best = mine.loc[mine["loss"].idxmin()]
        lines.append(
            f"{PLACEMENT_NAMES[placement]}: {len(failed)} of {len(mine)} runs failed"
            f"{f' ({kinds})' if kinds else ''}; the lowest loss is {best['loss']:.3f} at the rate "
            f"{best['rate']:g} and width {best['width']}."
        )
    lines += ["", *(_verdict(_compared(table, m), does) for m, does in _MEASURES)]
    return "\n".join(lines)


def _seeds(table: pd.DataFrame) -> str:
    n = table["seed"].nunique()
    return f"{n} seed{'s' if n > 1 else ''}"


def _rate(rate: float, table: pd.DataFrame) -> str:
    return f"> {table['rate'].max():g}" if math.isinf(rate) else f"{rate:.2g}"


Measure = Callable[[pd.DataFrame, str, int], float]


def _half(table: pd.DataFrame, placement: str, width: int) -> float:
    """Geometric mean over seeds; inf where one seed's grid ends before."""
    return float(np.exp(np.log(half_gain(table, placement, width)).mean()))


def _compared(table: pd.DataFrame, measure: Measure) -> dict[str, list[int]]:
    """Widths at which Pre-Norm has a lower, the same and a higher rate than QKV-Norm, or none."""
    out: dict[str, list[int]] = {"lower": [], "same": [], "higher": [], "neither": []}
    for width in sorted(table["width"].unique().tolist()):
        pre, qkv = (measure(table, p, width) for p in ("pre", "qkv"))
        if math.isinf(pre) and math.isinf(qkv):
            out["neither"].append(width)
        else:
            out["lower" if pre < qkv else "higher" if pre > qkv else "same"].append(width)
    return out


def _same(found: dict[str, list[int]]) -> Literal["yes", "no", "in part", "not decided"]:
    if found["lower"]:
        return "in part" if any(found[k] for k in ("same", "higher", "neither")) else "yes"
    return "no" if found["higher"] else "not decided"


def _verdict(found: dict[str, list[int]], does: str) -> str:
    words = {
        "lower": "at lower rates than QKV-Norm",
        "same": "at the same rate of this grid",
        "higher": "at higher rates than QKV-Norm",
        "neither": "like QKV-Norm at no rate of this grid",
    }
    said = [f"{words[k]} at width {', '.join(map(str, at))}" for k, at in found.items() if at]
    return f"Pre-Norm {does} {'; '.join(said)}."


_MEASURES: Final[tuple[tuple[Measure, str], ...]] = (
    (least_failing, "fails"),
    (_half, "loses half of what its best rate gains"),
)


def claims(table: pd.DataFrame) -> list[Claim]:
    """Fig. 24: which placement fails at 1e-3, and which at lower rates."""
    widths = sorted(table["width"].unique().tolist())
    at = table[np.isclose(table["rate"], 1e-3)]
    failed = {p: at[at["placement"] == p]["failed"] for p in ("pre", "qkv")}
    why = (
        f"2 layers of width {' or '.join(map(str, widths))}, runs of {int(table['steps'].iloc[0])} "
        "steps: the paper's Large has 12 layers of width 1024 and trains for days"
    )
    out = [
        Claim(
            "training at a learning rate of 1e-3",
            "large Pre-Norm models fail, QKV-Norm ones do not; at 1e-4 both train (Fig. 24)",
            "; ".join(
                f"{PLACEMENT_NAMES[p]}: {f.sum()} of {len(f)} runs fail" for p, f in failed.items()
            ),
            "yes" if failed["pre"].any() and not failed["qkv"].any() else "no",
            why,
        )
    ]
    for measure, does in _MEASURES:
        found = _compared(table, measure)
        out.append(
            Claim(
                f"Pre-Norm {does} at lower learning rates than QKV-Norm",
                "fails at 1e-3, where QKV-Norm trains, for large models (Fig. 24)",
                _verdict(found, does),
                _same(found),
                f"{why}; {_seeds(table)}",
            )
        )
    return out


EXPERIMENT: Final = Experiment(
    name="stability",
    title="Loss after training, and failed runs, against the learning rate",
    source="Menary et al. 2024, Fig. 24",
    models="none",
    minutes={"smoke": 0.2, "quick": 2.0, "full": 38.0},
    parts=parts,
    figure=figure,
    text=text,
    claims=claims,
)
