"""What the experiment found, in words and as claims."""

from __future__ import annotations

from typing import Final

import pandas as pd

from qkvnorm_lens.experiments.core import (
    PLACEMENT_NAMES,
    Claim,
    below,
    by_group,
    decide,
    group_mean,
    markdown,
    placement_of,
    study_difference,
)
from qkvnorm_lens.experiments.paper.spread.measure import VECTORS, rows_of

PUBLISHED: Final = 0.30  # the wider of the published bands
_WIDER: Final = {
    True: "QKV-Norm is wider",
    False: "QKV-Norm is narrower",
    None: "which of the two is wider is not decided",
}


def text(table: pd.DataFrame) -> str:
    """Bands by group, what they are by layer, and where the first token lies."""
    head = ["models", "seeds", "embeddings", "by layer", "keys", "values", "first: share", "norm"]
    rows = []
    for group, mine in by_group(table):
        bands = {of: group_mean(rows_of(mine, of, "model"), "band") for of in VECTORS}
        layers = rows_of(mine, "stream", "layer").groupby("layer")["band"].mean()
        stream = rows_of(mine, "stream", "model")
        rows.append(
            [
                group,
                str(bands["stream"].n),
                f"±{bands['stream'].percent()}",
                f"{100 * layers.min():.0f} to {100 * layers.max():.0f}",
                f"±{bands['k'].percent()}",
                f"±{bands['v'].percent()}",
                f"{group_mean(stream, 'first_share').percent(0)}",
                f"{group_mean(stream, 'first_norm').value:.3g}",
            ]
        )
    lines = [
        markdown(head, rows),
        "",
        "Half-width of the band around each head's median that holds 90% of the attention's "
        "weight, in percent (heads pooled; mean over seeds with 95% intervals). Embeddings: at the "
        "input of the layer's block; keys and values: as they enter the dot product and the "
        "average. The first token is left out; beside: its share of all attention, in percent, and "
        "its embedding's norm over the median.",
        "",
        *_findings(table),
    ]
    return "\n".join(lines)


def _findings(table: pd.DataFrame) -> list[str]:
    models = rows_of(table, "stream", "model")
    lines = []
    for group, mine in by_group(models):
        layers = rows_of(table[table["group"] == group], "stream", "layer")
        widest = layers.nlargest(1, "band").iloc[0]
        published = ""
        if placement_of(mine) == "pre":
            published = " (published for Pre-Norm: ±20% Baseline, ±30% Alternate and Large)"
        lines.append(
            f"{group}: ±{100 * mine['band'].mean():.0f}%{published}; the widest layer, "
            f"{widest['label']}, reaches from {widest['low']:.2g} to {widest['high']:.2g} of the "
            "median."
        )
    gap = study_difference(models, "band")
    if gap is not None:
        lines.append(
            f"Pre-Norm minus QKV-Norm (study models): {gap.percent()} points, {gap.n} seeds each: "
            f"{_WIDER[below(gap)]}; published: QKV-Norm is wider."
        )
    return lines


def claims(table: pd.DataFrame) -> list[Claim]:
    """The width of the band under Pre-Norm, and whether QKV-Norm's is wider."""
    models = rows_of(table, "stream", "model")
    out = []
    for group, mine in by_group(models):
        if placement_of(mine) != "pre":
            continue
        band = group_mean(mine, "band")
        out.append(
            Claim(
                f"90% of the attended norms, {PLACEMENT_NAMES['pre']} ({group})",
                "within ±20% of the median (Baseline), ±30% (Alternate, Large); Fig. 1, 9-12",
                f"within ±{band.percent()}% ({band.seeds})",
                decide(below(band, PUBLISHED)),
                "held against the wider published band; a smaller model of another width and "
                "recipe, and nothing in Pre-Norm fixes the lengths: training does",
            )
        )
    gap = study_difference(models, "band")
    if gap is not None:
        out.append(
            Claim(
                "band of QKV-Norm against Pre-Norm",
                "QKV-Norm's is wider (Fig. 9-12)",
                f"Pre-Norm minus QKV-Norm {gap.percent()} points ({gap.n} seeds each)",
                decide(below(gap)),
                "under QKV-Norm no score reads the length of an embedding, so nothing holds it",
            )
        )
    return out
