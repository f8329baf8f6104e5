"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import AMOUNT, PLAIN, Part, Size, Subject, reading

DRAWS: Final = core.by_size(8, 32, 64)
RATE: Final = 0.01
COLUMNS: Final = ("quantity", "variant", "layer", "sigma", "value", "se", "rows")


def measure(subject: Subject, size: Size) -> pd.DataFrame:
    """Exact and sampled rates of one model, against sigma; by layer too."""
    import hooks

    model, ids = subject.load(), reading(subject, AMOUNT[size]).ids
    probe = partial(hooks.collapse_probe, model, ids, draws=DRAWS[size], progress=False)
    exact, sampled = probe(), probe(seed=1, method="sample")
    whole = exact.to_frame("model").assign(layer=-1, none=math.nan)
    layers = exact.to_frame("layer").assign(none=math.nan)
    rows = [
        dict(zip(COLUMNS, (quantity, variant, *numbers), strict=True))
        for quantity, variant, frame, value, error in (
            ("loose", PLAIN, whole, "loose", "se_prompts"),
            ("loose", "without sinks", whole, "loose_content", "none"),
            ("loose", "centred gauge", whole, "loose_centred", "none"),
            ("strict", PLAIN, whole, "strict_drawn", "se_strict"),
            ("loose", PLAIN, layers, "loose", "none"),
            ("loose", "sampled", sampled.to_frame("model").assign(layer=-1), "loose", "se"),
        )
        for numbers in frame[["layer", "sigma", value, error, "rows"]].itertuples(index=False)
    ]
    facts = {
        ("sparse share", PLAIN): exact.n_sparse / max(int(exact.examined.sum()), 1),
        ("sink share", PLAIN): float(whole["sinks"].iloc[0]) / max(exact.n_sparse, 1),
        ("score level", PLAIN): float(whole["score_level"].iloc[0]),
        ("sigma at 1%", PLAIN): float(exact.sigma_at(RATE)),  # type: ignore[arg-type]
        ("sigma at 1%", "without sinks"): float(exact.sigma_at(RATE, content=True)),  # type: ignore[arg-type]
        ("sigma at 1%", "strict"): crossing(whole["sigma"], whole["strict_drawn"], RATE),
    }
    rows += [
        dict(zip(COLUMNS, (*what, -1, math.nan, v, math.nan, exact.n_sparse), strict=True))
        for what, v in facts.items()
    ]
    return core.about(subject, rows)


def crossing(sigma: pd.Series, rate: pd.Series, wanted: float) -> float:
    """Sigma at which a measured curve first reaches a rate, linear between points; inf if never."""
    x, y = sigma.to_numpy(dtype=float), rate.to_numpy(dtype=float)
    if not np.isfinite(y).all():
        return math.nan
    above = np.flatnonzero(y >= wanted)
    if not len(above):
        return math.inf
    i = int(above[0])
    return float(np.interp(wanted, y[i - 1 : i + 1], x[i - 1 : i + 1])) if i else float(x[0])


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    draws = {"draws": DRAWS[size]}
    return [
        Part(s.name, partial(measure, s, size), s, AMOUNT[size].settings(s) | draws)
        for s in subjects
    ]
