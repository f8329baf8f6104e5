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
        windows: at most, by a language model: the first of the built-in passage, of which there
            are some nine of 128 tokens, or windows that lie evenly over the held-out books.
        length: tokens of a window at most.
        books: the held-out books.
    """

    sums: int
    windows: int
    length: int = 128
    books: bool = False

    def settings(self, subject: Subject) -> dict[str, int | str]:
        """What of it a part about this model depends on."""
        if subject.kind == "addition":
            return {"sums": self.sums}
        read = {"windows": self.windows, "length": self.length}
        return read | ({"text": "held-out books"} if self.books else {})


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
    """Sums drawn with a fixed seed, or windows of a text."""
    if subject.kind == "language":
        model = subject.load()
        length = min(amount.length, int(getattr(model.cfg, "n_ctx", 0) or amount.length))
        ids = _over_books(model, amount, length) if amount.books else _first(model, amount, length)
        return Reading(ids, [[*row[1:], UNSCORED] for row in ids])
    from qkvnorm_lens.training import PAD, draw

    batch = draw(subject.split, amount.sums, seed=SEED)
    ids, targets = [], []
    for row, wanted in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        real = [token for token in row if token != PAD]
        ids.append(real)
        targets.append([UNSCORED if t == PAD else t for t in wanted[: len(real)]])
    return Reading(ids, targets)


def _first(model: Any, amount: Amount, length: int) -> list[list[int]]:
    from qkvnorm_lens.text import passage, windows

    return windows(model, passage(), length=length, limit=amount.windows).ids


def _over_books(model: Any, amount: Amount, length: int) -> list[list[int]]:
    """Whole windows that lie evenly over the held-out books."""
    from qkvnorm_lens.text import windows
    from qkvnorm_lens.training.texts import held_out_text

    text = held_out_text().replace("\f", "\n")
    cut = windows(model, text, length=length, limit=len(text)).ids
    whole = [ids for ids in cut if len(ids) == length]
    n = min(amount.windows, len(whole))
    return [whole[(2 * i + 1) * len(whole) // (2 * n)] for i in range(n)]


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
