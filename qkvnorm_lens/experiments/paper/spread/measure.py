"""What is measured: a table for each part."""

from __future__ import annotations

from typing import Final, Literal, get_args

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, reading_parts

AMOUNT: Final = core.by_size(Amount(64, 1, 64), Amount(500, 4), Amount(2_000, 8))
Vectors = Literal["stream", "k", "v"]
VECTORS: Final[tuple[Vectors, ...]] = get_args(Vectors)


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """`hooks.spread` of the stream, the keys and the values, by head, layer and model."""
    import hooks

    model, read = subject.load(), reading(subject, amount)
    frames = []
    for of in VECTORS:
        report = hooks.spread(model, read.ids, of=of, batch_size=64, progress=False)
        frames += [report.to_frame(by).assign(of=of, by=by) for by in ("head", "layer", "model")]
    rows = pd.concat(frames, ignore_index=True)
    rows["label"] = rows["label"].fillna("all")
    rows[["layer", "head"]] = rows[["layer", "head"]].fillna(-1).astype(int)
    return core.about(subject, rows, "of", "by", "layer", "head", "label")


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return reading_parts(subjects, AMOUNT[size], measure)


def rows_of(table: pd.DataFrame, of: str, by: str) -> pd.DataFrame:
    """The table's rows of these vectors, added up so."""
    return core.pick(table, of=of, by=by)
