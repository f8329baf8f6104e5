"""What is measured: a table for each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core import PLAIN, Part, Size, Subject, about, by_size, trained

PREFIX: Final = "order-"
CELLS: Final = {
    "order-rotary": "rotary",
    "order-rotary-no-attn": "rotary,\nno skip of\nattention",
    "order-rotary-no-skip": "rotary,\nno skips",
    "order-nope": "no positions",
    "order-nope-no-attn": "no positions,\nno skip of\nattention",
    "order-nope-no-skip": "no positions,\nno skips",
}
SUMS: Final = by_size(400, 4_000, 20_000)
QUESTIONS: Final = by_size(8, 48, 256)
PERMUTATIONS: Final = by_size(2, 4, 8)
SEED: Final = 20_240_617
LOSSES: Final = (1.0, 0.3, 0.1)  # nats per token
SHARES: Final = (0.5, 0.9)  # of tokens right
LEAST: Final = 1e-8  # of the figure's logarithmic axis
AS_IS, SWAPPED = "as is", "operands swapped"
GAPS: Final = {
    AS_IS: ("permuted", "o"),
    SWAPPED: ("operands swapped", "D"),
    "positions removed": ("permuted, positions removed", "s"),
    "mask removed": ("permuted, mask removed", "^"),
}
"""Variants of the total variation: what they are called, and their marks."""
Fact = tuple[str, str, float, float]
"""Quantity, variant (of the symmetry gap), where (a step, a layer, a level), and value."""


# -- measuring --------------------------------------------------------------------------------


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Accuracy, learning curve, symmetry gap and neighbours of one trained model."""
    import hooks
    from qkvnorm_lens.training import TEST_SEED, evaluate

    model = subject.load()
    accuracy = evaluate(model, subject.split, rows=SUMS[size], seed=TEST_SEED)
    facts: list[Fact] = [
        ("per token", PLAIN, 0, accuracy.per_token),
        ("per token without ]", PLAIN, 0, accuracy.per_token_without_end),
        ("exact", PLAIN, 0, accuracy.exact),
        *of_log(subject),
    ]
    ids, swap = questions(subject, QUESTIONS[size])
    report = hooks.symmetry_gap(
        model, ids, permutations=PERMUTATIONS[size], keep_first=True, batch_size=64, progress=False
    )
    for row in report.to_frame().to_dict("records"):
        none = {"none": 1.0, "gap": 0.0, "undecided": math.nan}[row["verdict"]]
        found = {"tv": row["tv"], "rounding": row["floor_tv"], "no gap": none}
        facts += [(name, row["variant"], 0, value) for name, value in found.items()]
    unequal = [row for row in ids if [row[i] for i in swap] != row]
    whole: dict[str, Any] = {"positions": True, "mask": True}
    swapped = hooks.symmetry_gap(
        model, unequal, permutations=[swap], batch_size=64, progress=False, **whole
    )
    facts.append(("tv", SWAPPED, 0, float(swapped.to_frame()["tv"].iloc[0])))
    layers = report.to_frame("layer")
    for row in layers[layers["variant"] == "as is"].to_dict("records"):
        facts.append(("nearer", PLAIN, row["layer"], row["nearer"]))
    return about(subject, pd.DataFrame(facts, columns=["quantity", "variant", "at", "value"]))


def questions(subject: Subject, n: int) -> tuple[list[list[int]], list[int]]:
    """Questions up to ``=``, and the permutation that swaps the two integers, of equal digits."""
    from qkvnorm_lens.training import EQUALS, draw

    split = subject.split
    if split.counts != (2,) or len(split.digits) != 1 or split.signed:
        raise ValueError(
            f"{subject.name}: wanted a model trained on sums of two positive integers of as many "
            f"digits; got {split}"
        )
    rows = draw(split, n, seed=SEED).tokens.tolist()
    digits = split.digits[0]
    first = list(range(1, 1 + digits))
    second = list(range(2 + digits, 2 + 2 * digits))
    swap = [0, *second, 1 + digits, *first, 2 + 2 * digits]
    return [row[: row.index(EQUALS) + 1] for row in rows], swap


def of_log(subject: Subject) -> list[Fact]:
    """The learning curve, and the steps until so low a loss, or so many right tokens.

    Every sum is new, so that the training loss (a mean over the steps between two rows of the log)
    is a test loss. Steps to a loss are interpolated in its logarithm; accuracy is measured seldom,
    and its steps are those of the first measurement that reached it.
    """
    assert subject.path is not None
    log = pd.read_csv(subject.path / "log.csv")
    steps, losses = (log[name].astype(float).tolist() for name in ("step", "loss"))
    facts: list[Fact] = [
        ("loss", PLAIN, step, loss) for step, loss in zip(steps, losses, strict=True)
    ]
    facts += [("steps to loss", PLAIN, x, steps_to(steps, losses, x)) for x in LOSSES]
    seen = log.dropna(subset=["per_token"])
    for share in SHARES:
        reached = seen[seen["per_token"] >= share]["step"]
        first = float(reached.min()) if len(reached) else math.inf
        facts.append(("steps to share", PLAIN, share, first))
    facts.append(("steps between measurements", PLAIN, 0.0, float(seen["step"].min())))
    return facts


def steps_to(steps: Sequence[float], losses: Sequence[float], level: float) -> float:
    """Steps until the loss first is at most ``level``; inf if never.

    Interpolated in the loss's logarithm between two rows; the first row's step where that row is
    low enough.
    """
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if loss <= level:
            if i == 0:
                return step
            before, at = losses[i - 1], steps[i - 1]
            share = math.log(before / level) / math.log(before / max(loss, 1e-12))
            return at + share * (step - at)
    return math.inf


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each trained model; two of them in the smoke form.

    Raises:
        ValueError: none is trained.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    names = sorted(trained(PREFIX), key=_order)
    if not names:
        raise ValueError(
            "positions: wanted trained models order-*; got none. To train them: "
            "python -m qkvnorm_lens.experiments.train"
        )
    if size == "smoke":
        names = [names[0], names[-1]] if len(names) > 1 else names
    settings = {"sums": SUMS[size], "questions": QUESTIONS[size]}
    settings["permutations"] = PERMUTATIONS[size]
    return [Part(s.name, partial(measure, s, size), s, settings) for s in find_subjects(names)]


def _order(name: str) -> tuple[int, str]:
    known, cell = list(CELLS), name.rpartition("-")[0]
    return known.index(cell) if cell in known else len(known), name


# -- reading the table --------------------------------------------------------------------------


def cell_name(group: str) -> str:
    """A group's name on one line."""
    return CELLS.get(group, group).replace("\n", " ")
