"""What is measured: a table for each part."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd
import torch

from qkvnorm_lens.experiments import core

SIGMAS: Final = (0.05, 0.1, 0.2)
LEVELS: Final = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 150.0, 300.0, 600.0)
ROWS: Final = core.by_size(60, 300, 1000)
SAMPLED: Final = "sampled rows"
_SEED: Final = 5


def measure(subject: core.Subject, size: core.Size) -> pd.DataFrame:
    """Rates of one model by sigma and score level, on a sample of its sparse rows."""
    import hooks

    model = subject.load()
    tokens = core.reading(subject, core.AMOUNT[size]).ids
    report = hooks.collapse_probe(model, tokens, sigmas=SIGMAS, draws=0, progress=False)
    whole = report.to_frame("model")
    own = float(whole["score_level"].iloc[0])
    rows: list[tuple[Any, ...]] = [
        (quantity, variant, sigma, level, rate, report.n_sparse)
        for quantity, variant, column, level in (
            ("own level", core.PLAIN, "loose", own),
            ("own level", "without sinks", "loose_content", own),
            ("centred gauge", core.PLAIN, "loose_centred", math.nan),
        )
        for sigma, rate in zip(SIGMAS, whole[column].astype(float), strict=True)
    ]
    s_star, s, rivals = sparse_rows(model, tokens, ROWS[size])
    if len(s_star):
        level, n = float(s_star.mean()), len(s_star)
        for sigma in SIGMAS:
            rate = rate_at(s_star, s, rivals, sigma, 0.0)
            rows.append(("own level", SAMPLED, sigma, level, rate, n))
            for wanted in LEVELS:
                rate = rate_at(s_star, s, rivals, sigma, wanted - level)
                rows.append(("level", core.PLAIN, sigma, wanted, rate, n))
    names = ["quantity", "variant", "sigma", "level", "value", "rows"]
    return core.about(subject, pd.DataFrame(rows, columns=names))


def sparse_rows(
    model: Any, tokens: Any, limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sample of the sparse rows: attended q.k part, all q.k parts, which keys are competitors.

    Rows of a layer with added biases are left out: there a constant on s is not one on w.
    """
    from hooks import SPARSE, attention_sites
    from hooks.model import encode
    from hooks.sites import LayerView, observe

    sites = [s for s in attention_sites(model) if not s.has_bias]
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_layer(view: LayerView) -> None:
        top = view.pattern.amax(-1)
        chosen = (top >= SPARSE) & (view.visible.sum(-1) > 1)
        s, seen = view.parts.s[chosen], view.visible[chosen]
        star = view.scores[chosen].argmax(-1, keepdim=True)
        found.append((s.gather(1, star).squeeze(1), s, seen.scatter(1, star, False)))

    observe(model, sites, encode(model, tokens), on_layer)
    width = max((s.shape[1] for _, s, _ in found), default=0)
    total = sum(len(s) for s, _, _ in found)
    if not total:
        return torch.zeros(0), torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool)
    sample = np.sort(np.random.default_rng(_SEED).permutation(total)[:limit])
    wide = [
        (star, *(torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (s, rivals)))
        for star, s, rivals in found
    ]
    s_star, s, rivals = (torch.cat(each)[sample] for each in zip(*wide, strict=True))
    return s_star.double(), s.double(), rivals


def rate_at(
    s_star: torch.Tensor, s: torch.Tensor, rivals: torch.Tensor, sigma: float, shift: float
) -> float:
    """Mean collapse probability with a constant added to every row's q.k parts."""
    import hooks

    sigmas, law = torch.full((len(s),), sigma, dtype=s.dtype), hooks.LAWS["uniform"]
    p = hooks.collapse_probability(s_star + shift, s + shift, sigmas, law, valid=rivals)
    return float(p.mean())


def parts(subjects: tuple[core.Subject, ...], size: core.Size) -> list[core.Part]:
    """One for each model."""
    return [
        core.Part(
            s.name,
            partial(measure, s, size),
            s,
            {**core.AMOUNT[size].settings(s), "rows": ROWS[size]},
        )
        for s in subjects
    ]


def at_level(table: pd.DataFrame, group: str, sigma: float, level: float) -> core.Mean:
    """A group's rate at another score level, between the levels computed, over seeds."""
    moved = (table["quantity"] == "level") | (table["variant"] == SAMPLED)
    chosen = core.pick(table[moved], group=group, sigma=sigma)
    rates = []
    for _, one in chosen.groupby("model", sort=False):
        known = one[one["level"] > 0].sort_values("level")
        rates.append(float(np.interp(math.log(level), np.log(known["level"]), known["value"])))
    return core.share(rates)
