"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Final, Literal

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading

AMOUNT: Final = core.by_size(Amount(16, 1, 32), Amount(64, 4), Amount(256, 16))
CONSTANTS: Final = {"addition": (0.25, 0.5, 1.0, 2.0, 4.0), "language": (1.0,)}
ON: Final = {"addition": ("k", "qk"), "language": ("k",)}
DRAWS: Final = 8
BY: Final[tuple[Literal["head", "layer", "model"], ...]] = ("head", "layer", "model")
SPARED: Final = {False: "frozen too", True: "spared"}
MOVED: Final = "moved_content"
_FACTS: Final = ("by", "first", "on", "constant", "layer", "head", "label")
_BOTH: Final = ("", "_content")
NUMBERS: Final = (
    "rows", "sinks", "moved", "moved_content", "moved_sinks", "strict", "to_first",
    *(f"{name}{kind}" for name in ("factored", "permuted", "predicted") for kind in _BOTH),
    "sigma", "lognormal", "scale_spread", "scale_spread_rest",
    *(f"{name}_share{of}" for of in ("", "_sparse", "_rest") for name in ("length", "direction")),
    "se", "se_content", "kl", "agree", "loss_change",
)  # fmt: skip


def measure(subject: Subject, amount: Amount, *, few_layers: bool = False) -> pd.DataFrame:
    """`hooks.interference` of one model, the first token frozen too and spared; or why not.

    Args:
        subject: the model.
        amount: what it reads.
        few_layers: only the first, the middle and the last attention layer.
    """
    import hooks

    model, read = subject.load(), reading(subject, amount)
    layers = None
    if few_layers:
        every = [sites.layer for sites in hooks.attention_sites(model)]
        layers = sorted({every[0], every[len(every) // 2], every[-1]})
    frames: list[pd.DataFrame] = []
    reason, sums = "-", subject.kind == "addition"
    try:
        for spared, first in SPARED.items():
            report = hooks.interference(
                model,
                read.ids,
                constants=CONSTANTS[subject.kind],
                on=ON[subject.kind],
                spare_first=spared,
                layers=layers,
                output=sums,
                targets=read.targets if sums else None,
                draws=DRAWS,
                batch_size=64 if sums else 4,
                progress=False,
            )
            frames += [report.to_frame(by).assign(by=by, first=first) for by in BY]
    except hooks.UnsupportedModelError as error:
        reason = str(error)
        frames = [pd.DataFrame([{"by": "model", "first": "-", "on": "-", "constant": math.nan}])]
    rows = pd.concat(frames, ignore_index=True)
    for name, none in (("layer", -1), ("head", -1), ("label", "all")):
        rows[name] = rows[name].fillna(none) if name in rows else none
    rows[["layer", "head"]] = rows[["layer", "head"]].astype(int)
    rows = rows.reindex(columns=[*_FACTS, *NUMBERS]).assign(reason=reason)
    return core.about(subject, rows, "reason")


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model, those without a norm before attention too: they say so."""
    amount, out = AMOUNT[size], []
    for s in subjects:
        few = size == "smoke" and s.kind == "language"  # each layer is a pass of its own
        settings = {"constants": list(CONSTANTS[s.kind]), "draws": DRAWS, "few_layers": few}
        work = partial(measure, s, amount, few_layers=few)
        out.append(Part(s.name, work, s, {**amount.settings(s), **settings}))
    return out


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the models that have such a norm."""
    return table[table["reason"] == "-"]


def of(
    table: pd.DataFrame, by: str, *, first: str = SPARED[False], on: str = "k", constant: float = 1
) -> pd.DataFrame:
    """Rows of one kind."""
    return core.pick(table, by=by, first=first, on=on, constant=constant)
