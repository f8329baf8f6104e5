"""What the noise experiment's conditions are called, and what its table says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import Mean, mean, pick, share

if TYPE_CHECKING:
    from hooks.noise import At, Rows

LOST: Final = 0.1  # the share of the accuracy whose loss gives a sigma
ALL, WITHOUT_END, NEXT = "with ]", "without ]", "next token"


@dataclass(frozen=True)
class Condition:
    """Which noise."""

    on: str
    at: At = "dot"
    rows: Rows = "all"

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """Its rows of the table."""
        return pick(table, on=self.on, at=self.at, rows=self.rows)


VECTORS: Final = tuple(Condition(on) for on in ("q", "k", "v", "qkv"))
EVERY: Final = VECTORS[-1]
SHIELDED: Final = Condition("qkv", at="projection")
ANY_ROWS: Final = Condition("qk")
SPARSE_ROWS: Final = Condition("qk", rows="sparse")
OTHER_ROWS: Final = Condition("qk", rows="non-sparse")
ROWS: Final = (ANY_ROWS, SPARSE_ROWS, OTHER_ROWS)
LABELS: Final = {
    **{c: c.on for c in VECTORS},
    EVERY: "q, k and v",
    SHIELDED: "q, k and v before the norm",
    ANY_ROWS: "all rows",
    SPARSE_ROWS: "sparse rows",
    OTHER_ROWS: "non-sparse rows",
}


def main_targets(table: pd.DataFrame) -> pd.DataFrame:
    """The rows where all targets are scored: with ``]``, or the next token."""
    return table[table["scored"] != WITHOUT_END]


def kept(table: pd.DataFrame, sigma: float) -> pd.DataFrame:
    """One row for each model: accuracy at sigma over its clean accuracy, and half of its interval.

    The interval is over prompts (95%, Student's t). Noise is drawn for each prompt anew, so that
    it has the draws' error in it.

    Args:
        table: rows of one condition and one set of targets.
        sigma: one that was measured.
    """
    noisy = table[table["sigma"] == sigma].set_index("model")
    clean = table[table["sigma"] == 0].set_index("model")["accuracy"]
    from scipy import stats

    half = stats.t.ppf(0.975, noisy["prompts"] - 1) * noisy["se_prompts"] / clean
    return pd.DataFrame({"kept": noisy["accuracy"] / clean, "half": half})


def kept_mean(table: pd.DataFrame, sigma: float) -> Mean:
    """Share of the accuracy kept: over seeds, or, of one model, over prompts.

    More than all of it, where noise happens to help, counts as all.
    """
    each = kept(table, sigma)
    most = each["kept"].clip(upper=1).tolist()
    if len(each) == 1:
        return Mean.around(most[0], float(each["half"].iloc[0]), 1).cut(0.0, 1.0)
    return share(most)


def lost_at(table: pd.DataFrame) -> str:
    """Sigma (%) at which a tenth of the accuracy is lost: mean over seeds, or a bound."""
    sigmas = table.groupby("model", sort=False)["sigma_lost"].first()
    top = table["sigma"].max()
    inside = sigmas[np.isfinite(sigmas)]
    if sigmas.isna().all():
        return "-"
    if not len(inside):
        return f"> {100 * top:g}"
    if len(inside) < len(sigmas):
        return f"{100 * inside.min():.3g} to > {100 * top:g}"
    return mean((100 * inside).tolist()).words(".3g", ".2g")


def telling(table: pd.DataFrame) -> float:
    """The measured sigma at which noise on q and k of all rows is nearest to taking a tenth.

    Far above it noise on either kind of rows alone is felt; far below it neither is.
    """
    rows = ANY_ROWS.of(table)
    sigmas = sorted((s for s in rows["sigma"].unique() if s > 0), reverse=True)
    return float(min(sigmas, key=lambda s: abs(kept_mean(rows, s).value - (1 - LOST))))
