"""What is measured: a table for each part."""

from __future__ import annotations

from typing import Final, Literal, get_args

import pandas as pd

from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, reading_parts

AMOUNT: Final[dict[Size, Amount]] = {
    "smoke": Amount(sums=64, windows=1, length=64),
    "quick": Amount(sums=500, windows=4),
    "full": Amount(sums=2_000, windows=8),
}
Vectors = Literal["stream", "k", "v"]
VECTORS: Final[tuple[Vectors, ...]] = get_args(Vectors)


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """`hooks.spread` of the stream, the keys and the values, by head, layer and model."""
    import hooks

    model, read = subject.load(), reading(subject, amount)
    frames = []
    for of in VECTORS:
        report = hooks.spread(model, read.ids, of=of, batch_size=64, progress=False)
        for by in ("head", "layer", "model"):
            frame = report.to_frame(by)
            frames.append(frame.assign(of=of, by=by))
    rows = pd.concat(frames, ignore_index=True)
    rows["label"] = rows["label"].fillna("all")
    rows[["layer", "head"]] = rows[["layer", "head"]].fillna(-1).astype(int)
    names = [*subject.columns, "of", "by", "layer", "head", "label"]
    rows = rows.assign(**subject.columns)
    return rows[[*names, *(c for c in rows.columns if c not in names)]]


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return reading_parts(subjects, AMOUNT[size], measure)


def rows_of(table: pd.DataFrame, of: str, by: str) -> pd.DataFrame:
    """The table's rows of these vectors, added up so."""
    return table[(table["of"] == of) & (table["by"] == by)]
