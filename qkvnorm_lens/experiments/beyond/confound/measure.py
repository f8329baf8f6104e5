"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.paper.accuracy import accuracies

SUMS: Final = core.by_size(200, 2_000, 10_000)
CELLS: Final = {
    "confound-pre": "Pre-Norm,\n1/√d",
    "confound-qkv": "QKV-Norm,\n1/√d",
    "confound-pre-paper": "Pre-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-paper": "QKV-Norm,\ncalibrated,\ndecay on all",
    "confound-qkv-calibrated": "QKV-Norm,\ncalibrated,\nno decay\non gains",
    "confound-qkv-learned": "QKV-Norm,\nlearned\ntemperature",
}


def measure(subject: core.Subject, size: core.Size) -> pd.DataFrame:
    """Accuracy by kind of sums, and how sparse attention is, of one trained cell."""
    import hooks

    table = accuracies(subject, SUMS[size])
    facts: dict[tuple[str, str], float] = {
        ("accuracy", kind): float(value)
        for kind, value in zip(table["kind"], table["per_token"], strict=True)
    }
    model, ids = subject.load(), core.reading(subject, core.AMOUNT[size]).ids
    report = hooks.collapse_probe(model, ids, sigmas=[0.05, 0.1, 0.2], draws=0, progress=False)
    whole = report.to_frame("model")
    facts |= {
        ("sparse share", core.PLAIN): report.n_sparse / int(report.examined.sum()),
        ("score level", core.PLAIN): float(whole["score_level"].iloc[0]),
        ("collapse at 10%", core.PLAIN): float(whole["loose"].iloc[1]),
        ("collapse at 10%", "centred gauge"): float(whole["loose_centred"].iloc[1]),
        ("sigma at 1%", core.PLAIN): float(report.sigma_at()) if report.n_sparse else math.nan,  # type: ignore[arg-type]
        ("largest score", core.PLAIN): _largest_score(model, ids),
    }
    rows = [{"quantity": q, "variant": variant, "value": v} for (q, variant), v in facts.items()]
    return core.about(subject, rows).assign(rows=report.n_sparse)


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


def parts(subjects: tuple[core.Subject, ...], size: core.Size) -> list[core.Part]:
    """One for each trained cell and seed; two of them in the smoke form.

    Raises:
        ValueError: none is trained.
    """
    from qkvnorm_lens.experiments.core import find_subjects

    names = sorted(core.trained("confound-"), key=_order)[: 2 if size == "smoke" else None]
    if not names:
        raise ValueError(
            "confound: wanted trained cells; got none. To train them: "
            "python -m qkvnorm_lens.experiments.train"
        )
    settings = {"sums": SUMS[size], "steps": core.CONFOUND_STEPS}
    return [
        core.Part(
            s.name, partial(measure, s, size), s, {**settings, **core.AMOUNT[size].settings(s)}
        )
        for s in find_subjects(names)
    ]


def _order(name: str) -> tuple[int, str]:
    cell = name.removeprefix("confound-").rpartition("-")[0]
    return list(core.CONFOUNDS).index(cell), name
