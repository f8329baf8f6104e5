"""What is measured: a table for each part."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Final

import pandas as pd

from qkvnorm_lens.experiments.core import Mean, Part, Size, Subject, about, by_size, pick, share

SUMS: Final = by_size(400, 4_000, 20_000)
KINDS: Final = ("in distribution", "interpolation", "extrapolation")
PUBLISHED: Final = {
    "pre": dict(zip(KINDS, (0.9138, 0.8746, 0.6665), strict=True)),
    "qkv": dict(zip(KINDS, (0.9099, 0.8254, 0.4676), strict=True)),
}


def accuracies(subject: Subject, sums: int) -> pd.DataFrame:
    """Accuracy on freshly drawn sums of each kind, teacher forced."""
    from qkvnorm_lens.training import SPLITS, TEST_SEED, evaluate, tests_of

    model, split = subject.load(), subject.split
    name = next(name for name, known in SPLITS.items() if known == split)
    rows = [
        {"kind": kind, "counts": "-".join(map(str, SPLITS[of].counts))}
        | dataclasses.asdict(evaluate(model, of, rows=sums, seed=TEST_SEED))
        for kind, of in tests_of(name, int(model.cfg.n_ctx)).items()
    ]
    return about(subject, rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    sums = SUMS[size]
    return [Part(s.name, partial(accuracies, s, sums), s, {"sums": sums}) for s in subjects]


def over_seeds(table: pd.DataFrame, group: str, kind: str, column: str = "per_token") -> Mean:
    """A group's accuracy with its interval."""
    return share(pick(table, group=group, kind=kind)[column].tolist())
