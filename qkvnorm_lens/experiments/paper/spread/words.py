"""What the experiment found, in words and as claims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.spread.measure import VECTORS, rows_of

PUBLISHED: Final = 0.30  # the wider of the published bands
_WIDER: Final = {
    True: "QKV-Norm is wider",
    False: "QKV-Norm is narrower",
    None: "which of the two is wider is not decided",
}


@core.joined
def text(table: pd.DataFrame) -> Iterator[str]:
    """Bands by group, what they are by layer, and where the first token lies."""
    head = ["models", "seeds", "embeddings", "by layer", "keys", "values", "first: share", "norm"]
    rows = []
    for group, mine in core.by_group(table):
        bands = {of: core.group_mean(rows_of(mine, of, "model"), "band") for of in VECTORS}
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
                f"{core.group_share(stream, 'first_share').percent(0)}",
                f"{core.group_mean(stream, 'first_norm').value:.3g}",
            ]
        )
    yield core.markdown(head, rows) + "\n"
    yield (
        "Half-width of the band around each head's median that holds 90% of the attention's "
        "weight, in percent (heads pooled; mean over seeds with 95% intervals). Embeddings: at the "
        "input of the layer's block; keys and values: as they enter the dot product and the "
        "average. The first token is left out; beside: its share of all attention, in percent, and "
        "its embedding's norm over the median.\n"
    )
    yield from _findings(table)


def _findings(table: pd.DataFrame) -> Iterator[str]:
    models = rows_of(table, "stream", "model")
    for group, mine in core.by_group(models):
        layers = rows_of(table[table["group"] == group], "stream", "layer")
        widest = layers.nlargest(1, "band").iloc[0]
        published = ""
        if core.placement_of(mine) == "pre":
            published = " (published for Pre-Norm: ±20% Baseline, ±30% Alternate and Large)"
        yield (
            f"{group}: ±{100 * mine['band'].mean():.0f}%{published}; the widest layer, "
            f"{widest['label']}, reaches from {widest['low']:.2g} to {widest['high']:.2g} of the "
            "median."
        )
    for size, gap in core.placement_gaps(models, "band"):
        yield (
            f"Pre-Norm minus QKV-Norm ({size}): {gap.percent()} points, {gap.n} seeds each: "
            f"{_WIDER[core.below(gap)]}; published: QKV-Norm is wider."
        )


@core.listed
def claims(table: pd.DataFrame) -> Iterator[core.Claim]:
    """The width of the band under Pre-Norm, and whether QKV-Norm's is wider."""
    models = rows_of(table, "stream", "model")
    for group, mine in core.by_group(models):
        if core.placement_of(mine) != "pre":
            continue
        band = core.group_mean(mine, "band")
        yield core.Claim(
            f"90% of the attended norms, {core.PLACEMENT_NAMES['pre']} ({group})",
            "within ±20% of the median (Baseline), ±30% (Alternate, Large); Fig. 1, 9-12",
            f"within ±{band.percent()}% ({band.seeds})",
            core.decide(core.below(band, PUBLISHED)),
            "held against the wider published band; a smaller model of another width and "
            "recipe, and nothing in Pre-Norm fixes the lengths: training does",
            core.power(band, PUBLISHED),
        )
    gap = core.study_difference(models, "band")
    if gap is not None:
        yield core.Claim(
            "band of QKV-Norm against Pre-Norm",
            "QKV-Norm's is wider (Fig. 9-12)",
            f"Pre-Norm minus QKV-Norm {gap.percent()} points ({gap.n} seeds each)",
            core.decide(core.below(gap)),
            "under QKV-Norm no score reads the length of an embedding, so nothing holds it",
            core.power(gap),
        )
