"""What several experiments measure of a model's attention, as tidy rows.

A row has ``quantity``, ``variant``, ``layer`` (-1: the whole model), ``at`` (sigma of a collapse
rate, depth of a rank; 0 where there is none) and ``value``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import PLAIN, pick

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Ids = Sequence[Sequence[int]]
Row = dict[str, Any]
WHOLE: Final = -1
SIGMA: Final = 0.1
"""The noise at which rates are given by layer."""
RATE: Final = 0.01
VECTORS: Final = ("stream", "k", "v")
SHARES: Final = (
    "sparse share", "sink share", "first token's attention", "loose", "strict", "interference",
    "cache: rows moved",
)  # fmt: skip
"""Quantities between 0 and 1."""
_VARIANTS: Final = {
    ("loose", PLAIN): "loose",
    ("loose", "content"): "loose_content",
    ("loose", "centred gauge"): "loose_centred",
    ("strict", PLAIN): "strict",
}


def row(
    quantity: str, value: float, *, variant: str = PLAIN, layer: int = WHOLE, at: float = 0.0
) -> Row:
    """One number."""
    return {
        "quantity": quantity, "variant": variant, "layer": layer, "at": at, "value": float(value),
    }  # fmt: skip


def collapse_rows(model: TransformerBridge, ids: Ids, batch_size: int = 8) -> Iterator[Row]:
    """Sparse rows, sinks, score level and collapse: against sigma, and by layer at `SIGMA`.

    ``loose``, of all sparse rows, of those that attend to another than the first token
    (``content``) and in the centred gauge; ``strict``; ``sigma at 1%``, infinite if never.
    """
    import hooks

    report = hooks.collapse_probe(model, ids, batch_size=batch_size, progress=False)
    whole, layers = report.to_frame("model"), report.to_frame("layer")
    for (quantity, variant), column in _VARIANTS.items():
        for sigma, value in zip(whole["sigma"], whole[column], strict=True):
            yield row(quantity, value, variant=variant, at=float(sigma))
        near = layers[layers["sigma"] == SIGMA]
        for layer, value in zip(near["layer"], near[column], strict=True):
            yield row(quantity, value, variant=variant, layer=int(layer), at=SIGMA)
    for variant, content in ((PLAIN, False), ("content", True)):
        found: Any = report.sigma_at(RATE, content=content)
        yield row("sigma at 1%", float(found), variant=variant)
    counts = [whole.iloc[:1].assign(layer=WHOLE), layers[layers["sigma"] == SIGMA]]
    examined = report.examined.sum((1, 2))
    for frame, of in zip(counts, ([examined.sum()], examined), strict=True):
        for (_, each), rows in zip(frame.iterrows(), of, strict=True):
            layer, n = int(each["layer"]), float(each["rows"])
            yield row("sparse share", n / rows if rows else math.nan, layer=layer)
            yield row("sink share", each["sinks"] / n if n else math.nan, layer=layer)
            yield row("score level", each["score_level"], layer=layer)


def spread_rows(model: TransformerBridge, ids: Ids, batch_size: int = 16) -> Iterator[Row]:
    """Half-width of the band that holds 90% of the lengths, and the first token's attention."""
    import hooks

    for of in VECTORS:
        report = hooks.spread(model, ids, of=of, batch_size=batch_size, progress=False)
        frames = (report.to_frame("model").assign(layer=WHOLE), report.to_frame("layer"))
        for _, each in pd.concat(frames).iterrows():
            layer = int(each["layer"])
            yield row("spread", each["band"], variant=of, layer=layer)
            if of == VECTORS[0]:
                yield row("first token's attention", each["first_share"], layer=layer)


def interference_rows(
    model: TransformerBridge, ids: Ids, layers: Sequence[int], batch_size: int = 8
) -> Iterator[Row]:
    """Content rows that move when the norm before their layer uses one scale for all tokens.

    With the first token frozen too, and spared; and what independent noise of that size would move.

    Args:
        model: the model.
        ids: token ids of each prompt.
        layers: those with a norm before their attention, which :func:`norm_before` finds.
        batch_size: prompts at once.
    """
    import hooks

    for spared in (False, True) if layers else ():
        report = hooks.interference(
            model, ids, layers=layers, on=("k",), spare_first=spared, batch_size=batch_size,
            draws=0, progress=False,
        )  # fmt: skip
        frames = (report.to_frame("model").assign(layer=WHOLE), report.to_frame("layer"))
        for _, each in pd.concat(frames).iterrows():
            layer = int(each["layer"])
            variant = "first token spared" if spared else PLAIN
            yield row("interference", each["moved_content"], variant=variant, layer=layer)
            if not spared:
                noise = each["predicted_content"]
                yield row("interference", noise, variant="independent noise", layer=layer)


def norm_before(model: TransformerBridge, ids: Ids) -> dict[int, str]:
    """By layer, the norm that q, k and v are made behind; layers without one are left out."""
    import hooks
    from hooks.model import encode, evaluating, example_of
    from hooks.sites import inner_norms

    sites, found = hooks.attention_sites(model), {}
    with evaluating(model):
        example = example_of(model, encode(model, [list(ids[0])]))
        for each in sites.layers:
            try:
                (norm,) = inner_norms(model, sites, (each,), example)
            except hooks.UnsupportedModelError:
                continue
            found[each.layer] = "LayerNorm" if norm.centred else "RMSNorm"
    return found


def whole(table: pd.DataFrame, quantity: str, variant: str = PLAIN, at: float = 0.0) -> pd.Series:
    """A quantity of the whole model, by model."""
    rows = pick(table, quantity=quantity, variant=variant, layer=WHOLE, at=at)
    return rows.set_index("model")["value"].astype(float)


def by_layer(table: pd.DataFrame, quantity: str, variant: str = PLAIN) -> pd.DataFrame:
    """A quantity's rows by layer, in order; rates at `SIGMA`."""
    rows = pick(table, quantity=quantity, variant=variant)
    rows = rows[(rows["layer"] != WHOLE) & np.isin(rows["at"], (0.0, SIGMA))]
    return rows.sort_values(["model", "layer"], kind="stable")
