"""What the experiments let a model read: sums of the kind it was trained on, or windows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core.base import Part, Subject, by_size

UNSCORED: Final = -100
SEED: Final = 20_240_617  # of the sums: no training run draws from it


@dataclass(frozen=True)
class Amount:
    """How much is read.

    Args:
        sums: by an addition model.
        windows: of the built-in passage, by a language model.
        length: tokens of a window at most.
    """

    sums: int
    windows: int
    length: int = 128

    def settings(self, subject: Subject) -> dict[str, int]:
        """What of it a part about this model depends on."""
        if subject.kind == "addition":
            return {"sums": self.sums}
        return {"windows": self.windows, "length": self.length}


AMOUNT: Final = by_size(Amount(16, 1), Amount(64, 4), Amount(256, 16))
"""What most experiments read; one of twelve models takes seconds."""


@dataclass(frozen=True)
class Reading:
    """Token ids of each prompt, and beside each the token that should follow it.

    Attributes:
        ids: of each prompt; the first is ``[`` or the text's first token.
        targets: the same shape, `UNSCORED` where nothing is scored: in sums all but the answer and
            ``]``, in texts the last position.
    """

    ids: list[list[int]]
    targets: list[list[int]]


def reading(subject: Subject, amount: Amount) -> Reading:
    """Sums drawn with a fixed seed, or windows of the built-in passage."""
    from qkvnorm_lens import text

    if subject.kind == "language":
        model = subject.load()
        length = min(amount.length, int(getattr(model.cfg, "n_ctx", 0) or amount.length))
        ids = text.windows(model, text.passage(), length=length, limit=amount.windows).ids
        return Reading(ids, [[*row[1:], UNSCORED] for row in ids])
    from qkvnorm_lens.training import PAD, draw

    batch = draw(subject.split, amount.sums, seed=SEED)
    ids, targets = [], []
    for row, wanted in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        real = [token for token in row if token != PAD]
        ids.append(real)
        targets.append([UNSCORED if t == PAD else t for t in wanted[: len(real)]])
    return Reading(ids, targets)


def reading_parts(
    subjects: Iterable[Subject],
    amount: Amount,
    measure: Callable[[Subject, Amount], pd.DataFrame],
    **settings: Any,
) -> list[Part]:
    """A part for each model.

    Args:
        subjects: the models.
        amount: what each reads.
        measure: gives a model's rows.
        settings: what else they depend on.
    """
    return [
        Part(s.name, partial(measure, s, amount), s, {**amount.settings(s), **settings})
        for s in subjects
    ]
