"""What is measured: a table for each part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, traits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

AMOUNT: Final = core.by_size(Amount(16, 1, 48), Amount(64, 2), Amount(256, 8))
BATCH: Final = {"addition": 64, "language": 2}
NONE: Final = "none"
NORMS: Final = ("before", "on_q", "on_k", "on_v")
"""Columns that say what a model's norms are."""
_SHIELDS: Final = {"none": NONE, "removed": "per head", "mixed": "all heads"}


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """One model's norms, and the numbers of its attention."""
    model, ids = subject.load(), reading(subject, amount).ids
    batch = BATCH[subject.kind]
    before = traits.norm_before(model, ids)
    rows = [
        *traits.collapse_rows(model, ids, batch),
        *traits.spread_rows(model, ids, batch),
        *traits.interference_rows(model, ids, list(before), batch),
    ]
    return core.about(subject, pd.DataFrame(rows).assign(**norms_of(model, before)), *NORMS)


def norms_of(model: TransformerBridge, before: dict[int, str]) -> dict[str, str]:
    """The norm before q, k and v are made, and those that follow the projections.

    ``none``, ``RMSNorm``, or ``RMSNorm in 3 of 12 layers``; on q, k and v ``per head`` (QK-norm,
    QKV-Norm) or over ``all heads`` together (OLMo 2).

    Args:
        model: the model.
        before: of :func:`traits.norm_before`.
    """
    import hooks

    layers = hooks.attention_sites(model).layers
    kinds = {"before": [before.get(each.layer, NONE) for each in layers]}
    for role in ("q", "k", "v"):
        kinds[f"on_{role}"] = [_SHIELDS[each.vector(role).shield] for each in layers]
    return {name: _together(found) for name, found in kinds.items()}


def _together(found: list[str]) -> str:
    """What all layers have; else how many have what."""
    each = list(dict.fromkeys(found))
    if len(each) == 1:
        return each[0]
    some = [f"{kind} in {found.count(kind)}" for kind in each if kind != NONE]
    return f"{', '.join(some)} of {len(found)} layers"


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return core.reading_parts(subjects, AMOUNT[size], measure)
