"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import AMOUNT, PLAIN, Part, Size, Subject, reading

DRAWS: Final[dict[Size, int]] = {"smoke": 8, "quick": 32, "full": 64}
RATE: Final = 0.01


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Exact and sampled rates of one model, against sigma; by layer too."""
    import hooks

    model = subject.load()
    tokens = reading(subject, AMOUNT[size]).ids
    exact = hooks.collapse_probe(model, tokens, draws=DRAWS[size], progress=False)
    sampled = hooks.collapse_probe(
        model, tokens, draws=DRAWS[size], seed=1, method="sample", progress=False
    )
    rows: list[dict[str, Any]] = []

    def add(
        quantity: str, variant: str, frame: pd.DataFrame, value: str, error: str | None = None
    ) -> None:
        about = {"quantity": quantity, "variant": variant}
        layers = frame["layer"] if "layer" in frame else [-1] * len(frame)
        errors = frame[error] if error else [math.nan] * len(frame)
        rows.extend(
            {**about, "layer": layer, "sigma": s, "value": v, "se": e, "rows": n}
            for layer, s, v, e, n in zip(
                layers, frame["sigma"], frame[value], errors, frame["rows"], strict=True
            )
        )

    whole, layers = exact.to_frame("model"), exact.to_frame("layer")
    add("loose", PLAIN, whole, "loose", "se_prompts")
    add("loose", "without sinks", whole, "loose_content")
    add("loose", "centred gauge", whole, "loose_centred")
    add("strict", PLAIN, whole, "strict_drawn", "se_strict")
    add("loose", PLAIN, layers, "loose")
    add("loose", "sampled", sampled.to_frame("model"), "loose", "se")
    facts = {
        ("sparse share", PLAIN): exact.n_sparse / max(int(exact.examined.sum()), 1),
        ("sink share", PLAIN): float(whole["sinks"].iloc[0]) / max(exact.n_sparse, 1),
        ("score level", PLAIN): float(whole["score_level"].iloc[0]),
        ("sigma at 1%", PLAIN): _at(exact, content=False),
        ("sigma at 1%", "without sinks"): _at(exact, content=True),
        ("sigma at 1%", "strict"): crossing(whole["sigma"], whole["strict_drawn"], RATE),
    }
    n, nowhere = exact.n_sparse, {"layer": -1, "sigma": math.nan}
    rows += [
        {"quantity": quantity, "variant": variant, **nowhere, "value": v, "se": math.nan, "rows": n}
        for (quantity, variant), v in facts.items()
    ]
    frame = pd.DataFrame(rows)
    return pd.concat([pd.DataFrame([subject.columns] * len(frame)), frame], axis=1)


def _at(report: Any, *, content: bool) -> float:
    sigma = report.sigma_at(RATE, content=content)
    return float(sigma)


def crossing(sigma: pd.Series, rate: pd.Series, wanted: float) -> float:
    """Sigma at which a measured curve first reaches a rate, linear between points; inf if never."""
    x, y = sigma.to_numpy(dtype=float), rate.to_numpy(dtype=float)
    if not np.isfinite(y).all():
        return math.nan
    above = np.flatnonzero(y >= wanted)
    if not len(above):
        return math.inf
    i = int(above[0])
    if i == 0:
        return float(x[0])
    return float(np.interp(wanted, y[i - 1 : i + 1], x[i - 1 : i + 1]))


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return [
        Part(
            s.name, partial(measure, s, size), s, {**AMOUNT[size].settings(s), "draws": DRAWS[size]}
        )
        for s in subjects
    ]
