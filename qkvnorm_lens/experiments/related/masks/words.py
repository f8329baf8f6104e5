"""What the experiment masks reads out of its table: figure, words and claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core

N: Final = 32  # tokens
D: Final = 32  # width
EVEN_MOST: Final = 30.0  # a decay rate that leaves nothing but rounding
SMALL: Final = 1e-3  # share of its start at which relative mu counts as collapsed
LINE: Final = 0.5  # nats about a line through ln mu (root mean square) up to which it is one
WITHOUT_CENTRE: Final = "two parts"
MASKS: Final[Mapping[str, tuple[str, int]]] = {
    "complete": ("complete", 0),
    "causal": ("causal", 0),
    **{f"window {width}": ("window", width) for width in (8, 4, 2)},
    **{f"one-way {width}": ("one-way", width) for width in (8, 4, 2)},
    WITHOUT_CENTRE: ("two parts", 0),
}
"""By name: its kind, and of a window how many tokens it shows to each side, or to the left."""
LOCAL: Final = {
    "two-way windows": ("complete", "window 8", "window 4", "window 2"),
    "one-way windows": ("causal", "one-way 8", "one-way 4", "one-way 2"),
}
"""Masks of one kind, from the smallest radius to the largest."""
FEW: Final = ("complete", "causal", "window 4", "one-way 4")
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "attention": {},
    "temperature 1/64": {"temperature": 1 / 64},
    "temperature 64": {"temperature": 64.0},
    "identity values": {"values": "identity"},
    "random values": {"values": "random"},
    "RMSNorm": {"norm": "rms"},
    "LayerNorm": {"norm": "layer"},
    "RMSNorm, random values": {"norm": "rms", "values": "random"},
    "residual": {"residual": True},
    "MLP": {"mlp": True},
    "residual, MLP": {"residual": True, "mlp": True},
    "residual, RMSNorm": {"residual": True, "norm": "rms"},
    "residual, MLP, RMSNorm": {"residual": True, "mlp": True, "norm": "rms"},
}


def runs(table: pd.DataFrame, setting: str, mask: str) -> pd.DataFrame:
    """One row per seed."""
    mine = table[(table["row"] == "run") & (table["setting"] == setting)]
    return mine[mine["mask"] == mask]


def rate(table: pd.DataFrame, setting: str, mask: str) -> core.Mean:
    """Decay rate over seeds."""
    return core.mean(runs(table, setting, mask)["rate"].astype(float).dropna().tolist())


def exponential(table: pd.DataFrame, setting: str, mask: str) -> bool:
    """Whether ln mu keeps to a line, within `LINE`, in every seed: only then is its rate one."""
    mine = runs(table, setting, mask)
    return bool((mine["rate"].notna() & (mine["off"] < LINE)).all())


def collapses(table: pd.DataFrame, setting: str, mask: str) -> core.Finding:
    """Whether mu falls in every seed, exponentially or not: its trend, or that it is gone."""
    mine = runs(table, setting, mask)
    gone = mine["end"] < SMALL * mine["start"]
    if not bool((gone | (mine["rate"] > 0)).all()):
        return False
    return True if bool(gone.all()) else core.above(rate(table, setting, mask))


def counts(table: pd.DataFrame, setting: str, masks: Sequence[str]) -> str:
    """``3 of 4 masks collapse (window 4: not decided), not exponential: complete (..., ...)``."""
    found = {mask: collapses(table, setting, mask) for mask in masks}
    said = {False: "not in every seed", None: "not decided"}
    rest = [f"{m}: {said[holds]}" for m, holds in found.items() if not holds]
    bent = [m for m in masks if not exponential(table, setting, m)]
    return "".join(
        (
            f"{len(found) - len(rest)} of {len(found)} masks collapse",
            f" ({', '.join(rest)})" if rest else "",
            ", not exponential: " + ", ".join(_gone(table, setting, m) for m in bent)
            if bent
            else "",
        )
    )


def _gone(table: pd.DataFrame, setting: str, mask: str) -> str:
    """``complete (off a line by up to 2 nats, gone after 3 layers)``, the seeds' median."""
    mine = runs(table, setting, mask)
    layers, off = _layers(mine), mine["off"].astype(float).max()
    line = "too fast for a line" if math.isnan(off) else f"off a line by up to {off:.2g} nats"
    gone = "not gone" if layers.startswith(">") else f"gone after {layers} layers"
    return f"{mask} ({line}, {gone})"


def masks_of(table: pd.DataFrame, setting: str) -> list[str]:
    """In the table's order."""
    return list(
        dict.fromkeys(table[(table["row"] == "run") & (table["setting"] == setting)]["mask"])
    )


# -- words ------------------------------------------------------------------------------------


def speed(table: pd.DataFrame, setting: str, mask: str) -> str:
    """The rate where there is one."""
    if not exponential(table, setting, mask):
        return "not exponential"
    return rate(table, setting, mask).words(".3g", ".2g")


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Rates by mask and setting beside the bound, the order by radius, the equilibria."""
    some = table[table["row"] == "run"]
    n_seeds, layers = some["seed"].nunique(), int(some["layers"].max())
    yield (
        f"{N} random tokens of length 1 and width {D} through {layers} layers of attention; fresh "
        "W_Q and W_K with entries N(0, 1) and fresh orthogonal W_V in each layer (unless said "
        f"otherwise), {n_seeds} seeds. Rate: of the exponential decay of mu/||X||_F per layer, a "
        "least-squares line through its logarithm over the later half of the layers above rounding "
        "(1e-10); mean over seeds with 95% interval. Not exponential: in one seed or more the "
        f"logarithm is off that line by {LINE:g} or more (root mean square, nats), or fewer than "
        "three layers are above rounding: no rate, only layers until it is gone. Even: the rate of "
        "attention that weighs all tokens in the mask alike, -ln of its matrix's second "
        f"eigenvalue. Layers: until mu/||X||_F is {SMALL:g} of its start (the seeds' median). "
        "Bound: -ln(1 - eps^r)/r with the least weight eps of each run and the radius r.\n"
    )
    yield core.markdown(
        ["mask", "radius", "rate", "even", "layers", "bound's rate"], _mask_rows(table)
    )
    yield ""
    yield (
        core.markdown(["setting", *(f"{m}: rate (layers)" for m in FEW)], _setting_rows(table))
        + "\n"
    )
    yield from _findings(table)
    yield ""
    yield from _held_text(table)


def _layers(mine: pd.DataFrame) -> str:
    reached = mine["reached"].astype(float).fillna(math.inf).median()
    return f"{reached:.0f}" if math.isfinite(reached) else f"> {mine['layers'].max():.0f}"


@core.listed
def _mask_rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for mask in masks_of(table, "attention"):
        mine = runs(table, "attention", mask)
        radius, bound = float(mine["radius"].iloc[0]), mine["bound_rate"].astype(float).mean()
        yield [
            mask,
            f"{radius:.0f}" if math.isfinite(radius) else "none",
            speed(table, "attention", mask),
            _even(mine),
            _layers(mine),
            f"{bound:.1e}" if math.isfinite(bound) else "none",
        ]


def _even(mine: pd.DataFrame) -> str:
    found = float(mine["even"].iloc[0])
    return f"{found:.3g}" if found < EVEN_MOST else "all at once"


def _setting_rows(table: pd.DataFrame) -> list[list[str]]:
    return [
        [setting]
        + [f"{speed(table, setting, mask)} ({_layers(runs(table, setting, mask))})" for mask in FEW]
        for setting in SETTINGS
    ]


def _in_order(table: pd.DataFrame, masks: tuple[str, ...]) -> bool:
    """Whether the layers that it takes rise with the radius from mask to mask, in every seed."""
    by_seed = [
        runs(table, "attention", mask).sort_values("seed")["reached"].astype(float).fillna(math.inf)
        for mask in masks
    ]
    return all(
        bool((a.to_numpy() < b.to_numpy()).all())
        for a, b in itertools.pairwise(by_seed)
        if not bool(np.isinf(a).all())
    )


def _findings(table: pd.DataFrame) -> Iterator[str]:
    with_centre = [m for m in masks_of(table, "attention") if m != WITHOUT_CENTRE]
    parts_ = runs(table, "attention", WITHOUT_CENTRE)
    violated = table[table["row"] == "run"]["violated"].astype(float)
    yield (
        f"With a centre: {counts(table, 'attention', with_centre)}. Without one (two parts that do "
        f"not see each other): mu/||X||_F {parts_['start'].mean():.2f} at the start, "
        f"{parts_['end'].mean():.2f} at the end. The bound was exceeded in {violated.sum():.0f} "
        f"layers of {violated.count()} runs for which there is one; it is far from tight."
    )
    for kind, masks in LOCAL.items():
        said = "rise" if _in_order(table, masks) else "do not always rise"
        taken = ", ".join(f"{m} {_layers(runs(table, 'attention', m))}" for m in masks)
        yield f"{kind.capitalize()}: the layers {said} with the radius ({taken})."
    yield _across(table)
    for group, settings in (
        ("Temperature", ("temperature 1/64", "attention", "temperature 64")),
        ("Norm, orthogonal values", ("RMSNorm", "LayerNorm")),
        ("Residual and MLP", ("residual", "MLP", "residual, MLP")),
    ):
        said = "; ".join(
            f"{'temperature 1' if s == 'attention' else s}: {counts(table, s, FEW)}"
            for s in settings
        )
        yield f"{group}: {said}."


def _across(table: pd.DataFrame) -> str:
    """Whether the radius also orders masks of different kinds."""
    two, one = "window 4", "one-way 4"
    radii = [float(runs(table, "attention", m)["radius"].iloc[0]) for m in (two, one)]
    bent = [m for m in (two, one) if not exponential(table, "attention", m)]
    if bent:
        return f"Across kinds: no rates to compare, {' and '.join(bent)} not exponential."
    rates = [rate(table, "attention", m) for m in (two, one)]
    slower = two if rates[0].value < rates[1].value else one
    larger = two if radii[0] > radii[1] else one
    agrees = "as the radius says" if slower == larger else "although its radius is the smaller one"
    said = [speed(table, "attention", m) for m in (two, one)]
    return (
        f"Across kinds: {two} (radius {radii[0]:.0f}) has the rate {said[0]}, {one} (radius "
        f"{radii[1]:.0f}) {said[1]}: {slower} is slower, {agrees}. (One way, the slowest is the "
        "second token, which halves its distance to the first in a layer of even attention: ln 2 = "
        "0.69 whatever the width, after a start that takes longer for narrow windows.)"
    )


def _held_text(table: pd.DataFrame) -> Iterator[str]:
    mine = table[table["row"] == "equilibrium"]
    for name, some in mine.groupby("setting", sort=False):
        kept = some[some["near_rank"] >= some["rank"]]
        stays = some[some["left"].isna()]
        yield (
            f"Equilibria ({name}): ranks {_ranks(some)}; a layer moves the tokens by at most "
            f"{some['moved'].max():.0e}; largest multiplier of a deviation "
            f"{_span(some['radius'])}. Started exactly, rounding included, {len(stays)} of "
            f"{len(some)} are still there after {some['layers'].max():.0f} layers{_left(some)}; "
            f"started 0.1% off, {len(kept)} of {len(some)} end with no lower rank."
        )


def _left(some: pd.DataFrame) -> str:
    gone = some["left"].dropna()
    if not len(gone):
        return ""
    return f" (the others go after {_span(gone)})"


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _ranks(some: pd.DataFrame) -> str:
    ranks = sorted(some["rank"].astype(int).unique())
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def claims(table: pd.DataFrame) -> list[core.Claim]:
    """Each of the paper's statements beside what was measured."""
    n_seeds = table[table["row"] == "run"]["seed"].nunique()
    how = f"{N} tokens of width {D}, {n_seeds} seeds, random weights in each layer"
    with_centre = [m for m in masks_of(table, "attention") if m != WITHOUT_CENTRE]
    apart = runs(table, "attention", WITHOUT_CENTRE)
    stays = bool((apart["end"] > 0.1 * apart["start"]).all())
    ordered = {kind: _in_order(table, masks) for kind, masks in LOCAL.items()}
    normed = [(s, m) for s in ("RMSNorm", "LayerNorm") for m in FEW]
    leaning = table[(table["row"] == "equilibrium") & (table["setting"] == "leaning")]
    stay = leaning["left"].isna() & (leaning["near_rank"] >= leaning["rank"])
    held_all = bool(stay.all())
    return [
        core.Claim(
            "mu falls, at least exponentially, for every mask with a centre",
            "exponentially, for every mask whose graph has a node from which all are reached",
            f"{counts(table, 'attention', with_centre)}; without a centre it "
            f"{'stays' if stays else 'falls too'}",
            core.decide(*(collapses(table, "attention", m) for m in with_centre), stays),
            f"{how}; here every token sees itself (the bound wants it of a centre). Where no line "
            "fits and it is gone after a few layers, it fell faster than one rate says",
        ),
        core.Claim(
            "local masks are slower",
            "the more local, the slower",
            "; ".join(
                f"{k}: {'in' if v else 'not in'} the order of the radius"
                for k, v in ordered.items()
            ),
            core.decide(*ordered.values()),
            f"{how}; {_across(table)}",
        ),
        core.Claim(
            "a norm with orthogonal values",
            "LayerNorm does not prevent the exponential collapse",
            "; ".join(f"{s}: {counts(table, s, FEW)}" for s in ("RMSNorm", "LayerNorm")),
            core.decide(*(collapses(table, *each) for each in normed)),
            how,
        ),
        core.Claim(
            "a norm with suitable values",
            "equilibria of any rank from one to full",
            f"ranks {_ranks(leaning)} of {leaning['width'].max():.0f} stay, also when started 0.1% "
            "off"
            if held_all
            else "not all ranks stay",
            core.graded(True, held_all),
            "our own construction, whose tokens return after a push; those solved for with random "
            "W_Q and W_K are equilibria too, but let go (see the multipliers)",
        ),
    ]
