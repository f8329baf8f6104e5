"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.sparsity.measure import BINS

SHARP: Final = 3.0
TOP, BESIDE = 0.98, 0.80  # a peak: maxima from 0.98 on, against those from 0.80 to 0.98


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model: shares of its rows, and how high the peak at 1 is.

    Columns ``sparse``, ``non_sparse``: of all rows; ``sinks``: rows whose maximum is the first
    token; ``sinks_of_sparse``: of the sparse ones; ``sparse_content``: sparse rows among those
    whose maximum is another token; ``peak``: density of maxima from 0.98 on over that from 0.80 to
    0.98, all rows; ``peak_content``: the same without sinks.
    """
    heads, bins = (table[table["what"] == what] for what in ("head", "histogram"))
    out = []
    for name, mine in heads.groupby("model", sort=False):
        count = mine.groupby("kind")[["rows", "sparse", "non_sparse"]].sum()
        rows, sparse = count["rows"], count["sparse"]
        own, none = bins[bins["model"] == name], np.nan
        out.append(
            {
                **{c: mine[c].iloc[0] for c in ("model", "group", "placement", "seed")},
                "rows": int(rows.sum()),
                "sparse": sparse.sum() / rows.sum(),
                "non_sparse": count["non_sparse"].sum() / rows.sum(),
                "sinks": rows["sink"] / rows.sum(),
                "sinks_of_sparse": sparse["sink"] / sparse.sum() if sparse.sum() else none,
                "sparse_content": sparse["content"] / rows["content"] if rows["content"] else none,
                "peak": peak_of(own),
                "peak_content": peak_of(own[own["kind"] == "content"]),
            }
        )
    return pd.DataFrame(out)


def peak_of(bins: pd.DataFrame) -> float:
    """Density of the maxima from 0.98 on over that from 0.80 to 0.98."""
    low = (bins["low"] + 0.5 / BINS).to_numpy()
    rows = bins["rows"].to_numpy(dtype=float)
    top = float(rows[low > TOP].sum()) / (1 - TOP)
    beside = float(rows[(low > BESIDE) & (low < TOP)].sum()) / (TOP - BESIDE)
    if not beside:
        return np.inf if top else np.nan
    return top / beside


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Shares of sparse and non-sparse rows by group, sinks apart, and the peak at 1."""
    models = shares(table)
    head = [
        "models",
        "seeds",
        "max ≥ 0.95",
        "max < 0.70",
        "on the first token",
        "of the sparse",
        "max ≥ 0.95, first token apart",
        "peak",
        "peak, first token apart",
    ]
    percents = ("sparse", "non_sparse", "sinks", "sinks_of_sparse", "sparse_content")
    rows = []
    for group, mine in core.by_group(models):
        cells = [core.group_share(mine, column).percent() for column in percents]
        peaks = [_number(mine, column) for column in ("peak", "peak_content")]
        rows.append([group, str(len(mine)), *cells, *peaks])
    yield core.markdown(head, rows) + "\n"
    yield (
        "Shares of attention rows in percent, rows with one visible key left out, with 95% "
        "intervals over seeds. On the first token: rows whose maximum is the first token (`[` in "
        "addition, the attention sink in language models); then the same among the sparse rows; "
        f"then sparse rows among all others. Peak: density of maxima from {TOP} on over that from "
        f"{BESIDE} to {TOP}.\n"
    )
    for column, what in (("sparse", "sparse rows"), ("sparse_content", "the same, sinks apart")):
        for size, gap in core.placement_gaps(models, column, shares=True):
            yield (
                f"Pre-Norm minus QKV-Norm ({size}), {what}: {gap.percent()} points "
                f"({gap.n} seeds each)."
            )
    yield (
        "Published: Pre-Norm has a sharp peak at 1, QKV-Norm none; there the scores of both are "
        "scaled to a standard deviation of 0.1 at the start, here by 1/sqrt(d_head) (see the "
        "experiment `confound`)."
    )
    shown = table[(table["what"] == "map") & (table["rank"] == 0)]
    named = [f"{group} {mine['label'].iloc[0]}" for group, mine in core.by_group(shown)]
    yield f"Shown as maps, the heads with most sparse rows: {', '.join(named)}."


def _number(mine: pd.DataFrame, column: str) -> str:
    found = core.group_mean(mine, column)
    if np.isnan(found.value):
        return "none"
    return found.words(".1f")


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """Is there a peak at 1, under Pre-Norm and under QKV-Norm?"""
    models = shares(table)
    for group, mine in core.by_group(models):
        placement = core.placement_of(mine)
        if placement not in ("pre", "qkv"):
            continue
        peak, sparse = core.group_mean(mine, "peak"), core.group_share(mine, "sparse")
        decided, sharp = core.above(peak, SHARP), peak.value > SHARP
        yield core.Claim(
            f"row maxima, {core.PLACEMENT_NAMES[placement]} ({group})",
            {"pre": "a sharp peak at 1", "qkv": "no peak at 1"}[placement] + " (Fig. 25-27)",
            f"{'a sharp' if sharp else 'no sharp'} peak: maxima from {TOP} on are "
            f"{_number(mine, 'peak')} times as dense as those from {BESIDE} to {TOP}; "
            f"{sparse.percent()}% of the rows are sparse ({peak.seeds})",
            core.decide(decided if placement == "pre" else core.denied(decided)),
            "scores scaled by 1/sqrt(d_head); the paper's start at a standard deviation of "
            "0.1, from which a QKV-Norm head can hardly reach a maximum of 0.95; sharp: more "
            f"than {SHARP:g} times",
            core.power(peak, SHARP),
        )
