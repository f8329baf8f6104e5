"""What the experiment found, in words and as claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core


def least_failing(table: pd.DataFrame, placement: str, width: int) -> float:
    """The lowest rate at which a run failed; inf where none did.

    At a higher rate runs may pass again, narrowly: the text names every run that failed.
    """
    mine = core.pick(table, placement=placement, width=width)
    failed = mine[mine["failed"] > 0]["rate"]
    return float(failed.min()) if len(failed) else math.inf


def _widths(table: pd.DataFrame) -> list[int]:
    return sorted(table["width"].unique().tolist())


@core.listed
def half_gain(table: pd.DataFrame, placement: str, width: int) -> Iterator[float]:
    """For each seed the rate at which half of what the best rate gains on frequencies is lost.

    Interpolated linearly in the logarithm of the rate; inf where the grid ends before.
    """
    mine = core.pick(table, placement=placement, width=width)
    for _, runs in mine.sort_values("rate").groupby("seed"):
        known = float(runs["frequencies"].iloc[0])
        losses = runs["loss"].fillna(np.inf).clip(upper=2 * known).to_numpy(dtype=float)
        rates = np.log(runs["rate"].to_numpy(dtype=float))
        best = int(losses.argmin())
        limit = (losses[best] + known) / 2
        above = [i for i in range(best + 1, len(losses)) if losses[i] > limit]
        if not above or losses[best] >= known:
            yield (math.inf if not above else math.nan)
            continue
        i = above[0]
        share = (limit - losses[i - 1]) / (losses[i] - losses[i - 1])
        yield math.exp(rates[i - 1] + share * (rates[i] - rates[i - 1]))


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """The lowest failing rate by width and placement, how they fail, and the definition."""
    placements = list(dict.fromkeys(table["placement"]))
    widths = _widths(table)
    known_as = [core.PLACEMENT_NAMES[p] for p in placements]
    head = [f"{name}: {what}" for name in known_as for what in ("first fails at", "half")]
    rows = []
    for width in widths:
        cells = []
        for p in placements:
            halves = ", ".join(_rate(r, table) for r in half_gain(table, p, width))
            cells += [_rate(least_failing(table, p, width), table), halves]
        rows.append([str(width), *cells])
    known, steps = float(table["frequencies"].iloc[0]), int(table["steps"].iloc[0])
    yield (
        f"Runs of {steps} steps of 128 sums, AdamW at a constant rate with decay 0.01 on all "
        f"parameters, {_seeds(table)} each. A run failed if a loss is "
        f"no number, if its last tenth is not below {known:.3f} nats (what knowing only the "
        "frequencies of targets gives), or if it lost again more than half of what it had gained "
        "on that. Half of the gain: the rate, interpolated, at which the last loss is half-way "
        "between that of the best rate and the frequencies' (one number for each seed).\n"
    )
    yield core.markdown(["width", *head], rows) + "\n"
    for placement in placements:
        mine = table[table["placement"] == placement]
        failed = mine[mine["failed"] == 1]
        cells = failed.groupby(["width", "rate", "why"]).size()
        kinds = "; ".join(
            f"width {width} at {rate:g}: {why}{f', {n} seeds' if n > 1 else ''}"
            for (width, rate, why), n in cells.items()
        )
        best = mine.loc[mine["loss"].idxmin()]
        yield (
            f"{core.PLACEMENT_NAMES[placement]}: {len(failed)} of {len(mine)} runs failed"
            f"{f' ({kinds})' if kinds else ''}; the lowest loss is {best['loss']:.3f} at the rate "
            f"{best['rate']:g} and width {best['width']}."
        )
    yield ""
    yield from (_in_words(compared(table, m), does) for m, does in _MEASURES)


def _seeds(table: pd.DataFrame) -> str:
    return core.counted(table["seed"].nunique(), "seed")


def _rate(rate: float, table: pd.DataFrame) -> str:
    return f"> {table['rate'].max():g}" if math.isinf(rate) else f"{rate:.2g}"


Measure = Callable[[pd.DataFrame, str, int], float]


def _half(table: pd.DataFrame, placement: str, width: int) -> float:
    """Geometric mean over seeds; inf where one seed's grid ends before."""
    return float(np.exp(np.log(half_gain(table, placement, width)).mean()))


def compared(table: pd.DataFrame, measure: Measure) -> dict[str, list[int]]:
    """Widths at which Pre-Norm has a lower, the same and a higher rate than QKV-Norm, or none."""
    out: dict[str, list[int]] = {"lower": [], "same": [], "higher": [], "neither": []}
    for width in _widths(table):
        pre, qkv = (measure(table, p, width) for p in ("pre", "qkv"))
        if math.isinf(pre) and math.isinf(qkv):
            out["neither"].append(width)
        else:
            out["lower" if pre < qkv else "higher" if pre > qkv else "same"].append(width)
    return out


def _same(found: dict[str, list[int]]) -> core.Verdict:
    """Widths without a difference count against the statement once another width has one."""
    if not found["lower"] and not found["higher"]:
        return core.decide(None)
    return core.decide(*(kind == "lower" for kind, widths in found.items() for _ in widths))


def _in_words(found: dict[str, list[int]], does: str) -> str:
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


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Fig. 24: which placement fails at 1e-3, and which at lower rates."""
    widths = _widths(table)
    at = table[np.isclose(table["rate"], 1e-3)]
    failed = {p: at[at["placement"] == p]["failed"] for p in ("pre", "qkv")}
    why = (
        f"2 layers of width {' or '.join(map(str, widths))}, runs of {int(table['steps'].iloc[0])} "
        "steps: the paper's Large has 12 layers of width 1024 and trains for days"
    )
    yield core.Claim(
        "training at a learning rate of 1e-3",
        "large Pre-Norm models fail, QKV-Norm ones do not; at 1e-4 both train (Fig. 24)",
        "; ".join(
            f"{core.PLACEMENT_NAMES[p]}: {f.sum()} of {len(f)} runs fail" for p, f in failed.items()
        ),
        core.decide(bool(failed["pre"].any() and not failed["qkv"].any())),
        why,
    )
    for measure, does in _MEASURES:
        found = compared(table, measure)
        yield core.Claim(
            f"Pre-Norm {does} at lower learning rates than QKV-Norm",
            "fails at 1e-3, where QKV-Norm trains, for large models (Fig. 24)",
            _in_words(found, does),
            _same(found),
            f"{why}; {_seeds(table)}",
        )
