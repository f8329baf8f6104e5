"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments.core import (
    AMOUNT,
    CONFOUND_STEPS,
    CONFOUNDS,
    PLAIN,
    Part,
    Size,
    Subject,
    reading,
    trained,
)
from qkvnorm_lens.experiments.paper.accuracy import accuracies

SUMS: Final[dict[Size, int]] = {"smoke": 200, "quick": 2_000, "full": 10_000}
CELLS: Final = {
    "confound-pre": "Pre-Norm,\n1/√d",
    "confound-qkv": "QKV-Norm,\n1/√d",
    "confound-pre-paper": "Pre-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-paper": "QKV-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-calibrated": "QKV-Norm,\ncalibrated,\nno decay\non gains",
    "confound-qkv-learned": "QKV-Norm,\nlearned\ntemperature",
}


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Accuracy by kind of sums, and how sparse attention is, of one trained cell."""
    import hooks

    table = accuracies(subject, SUMS[size])
    facts: dict[tuple[str, str], float] = {
        ("accuracy", kind): float(value)
        for kind, value in zip(table["kind"], table["per_token"], strict=True)
    }
    model = subject.load()
    report = hooks.collapse_probe(
        model, reading(subject, AMOUNT[size]).ids, sigmas=[0.05, 0.1, 0.2], draws=0, progress=False
    )
    examined = int(report.examined.sum())
    whole = report.to_frame("model")
    facts |= {
        ("sparse share", PLAIN): report.n_sparse / examined,
        ("score level", PLAIN): float(whole["score_level"].iloc[0]),
        ("collapse at 10%", PLAIN): float(whole["loose"].iloc[1]),
        ("collapse at 10%", "centred gauge"): float(whole["loose_centred"].iloc[1]),
        ("sigma at 1%", PLAIN): float(report.sigma_at()) if report.n_sparse else math.nan,  # type: ignore[arg-type]
        ("largest score", PLAIN): _largest_score(model, reading(subject, AMOUNT[size]).ids),
    }
    return pd.DataFrame(
        [
            {**subject.columns, "quantity": q, "variant": of, "value": v, "rows": report.n_sparse}
            for (q, of), v in facts.items()
        ]
    )


def _largest_score(model: Any, tokens: Any) -> float:
    """Greatest |w| over all layers, heads and visible keys."""
    from hooks import attention_sites
    from hooks.model import encode
    from hooks.sites import LayerView, observe

    top = [0.0]

    def on_layer(view: LayerView) -> None:
        top[0] = max(top[0], float(view.scores[view.visible].abs().max()))

    observe(model, list(attention_sites(model)), encode(model, tokens), on_layer)
    return top[0]


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each trained cell and seed; two of them in the smoke form.

    Raises:
        ValueError: none is trained.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    names = sorted(trained("confound-"), key=_order)
    if not names:
        raise ValueError(
            "confound: wanted trained cells; got none. To train them: "
            "python -m qkvnorm_lens.experiments.train"
        )
    if size == "smoke":
        names = names[:2]
    settings = {"sums": SUMS[size], "steps": CONFOUND_STEPS}
    return [
        Part(s.name, partial(measure, s, size), s, {**settings, **AMOUNT[size].settings(s)})
        for s in find_subjects(names)
    ]


def _order(name: str) -> tuple[int, str]:
    cell = name.removeprefix("confound-").rpartition("-")[0]
    return list(CONFOUNDS).index(cell), name
