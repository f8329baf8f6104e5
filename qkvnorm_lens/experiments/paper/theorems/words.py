"""What the experiment found, in words and as claims."""

from __future__ import annotations

from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core

NOT_RHO: Final = ("query noise", "moved", "stays")
"""Series of theorem 7 that are not of one ratio of scores."""
EXACT: Final = 1e-9
"""Up to this a value that was calculated in float64 agrees with a prediction."""


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
    return [s for s in series if s not in NOT_RHO]


def _relative(table: pd.DataFrame) -> float:
    """Largest relative deviation of theorem 8 at the smallest noise."""
    mine = table[table["series"] == "each key its own"]
    least = mine[mine["x"] == mine["x"].min()]
    return float(((least["value"] - least["predicted"]) / least["predicted"]).abs().max())


def claims(table: pd.DataFrame) -> list[core.Claim]:
    """Each theorem beside what our blocks do."""
    pre = table["placement"] == "pre"
    interferes = (table[pre & table["panel"].isin(("turning", "growing"))]["value"] - 1).abs().max()
    moved = float(table[table["series"] == "query noise"]["value"].max())
    exact = "computed in float64 on our own blocks"
    off = max(deviation(table, p) for p in ("turning", "growing", "matching", "offset"))
    boundary = deviation(table, "boundary", *_rhos(table))
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
            f"scores change by up to {interferes:.0%}, as 1/|x| to {off:.0e}",
            interferes > 0.1 and off < EXACT,
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
            f"boundary to {boundary:.0e}; query noise moved {moved:.0%}",
            boundary < EXACT and moved == 0,
        ),
        (
            "theorem 8",
            "isotropic key noise moves the output by w <m~_t k_t>",
            f"to {_relative(table):.1%} at 2% noise",
            _relative(table) < 0.02,
        ),
    ]
    return [
        core.Claim(what, f"{published} (Section 3)", ours, core.decide(bool(holds)), exact)
        for what, published, ours, holds in checks
    ]
