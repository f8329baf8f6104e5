"""Whether a timed report is right: against sampling, and against the simple implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from benchmarks._side_by_side import Row

_MANY_DRAWS = 16


def against_sampling(report: Any, on_whole: list[Any], on_gathered: list[Any]) -> Row:
    """The timed probe's rates and those of the timed draws, within the draws' own error."""
    whole, gathered = (np.concatenate([c.numpy() for c in n]) for n in (on_whole, on_gathered))
    differing = float(np.abs(whole - gathered).sum() / max(1.0, whole.sum()))
    if differing > 1e-4:  # a scaled row's arg max may move where two products round alike
        raise SystemExit(f"the two ways to sample differ in {differing:.2%} of the shifted rows")
    rows = report.rows.sum((-1, -2))  # [layer, head]
    exact = report.loose.sum((-1, -2))  # [sigma, layer, head], in rows
    n = len(whole)
    limit = float(stats.t.ppf(0.9985, n - 1))  # 3 standard deviations; a few draws' tails are long
    error = whole.std(0, ddof=1) / math.sqrt(n)
    judged = ((whole > 0).sum(0) >= n / 3) & (error > 0)
    z = np.abs(whole.mean(0) - exact)[judged] / error[judged]
    pooled = whole.sum((-1, -2))
    far = np.abs(pooled.mean(0) - exact.sum((-1, -2)))
    of_all = far / np.maximum(pooled.std(0, ddof=1) / math.sqrt(n), 1 / n)
    # Rows that attend to one key move together: of a few draws a head's own error says too little.
    share = float((z > limit).mean()) if z.size and n >= _MANY_DRAWS else 0.0
    if share > 0.02 or of_all.max() > 2 * limit:
        raise SystemExit(
            f"exact and sampled rates differ: {share:.1%} of heads beyond {limit:.2g} errors, the "
            f"model by {of_all.max():.1f}"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        near = judged & (np.abs(exact / rows - 0.01) < 0.005)
        needed = n * (error / exact / 0.01) ** 2
    return {
        "draws compared": n,
        "heads and sigmas compared": int(judged.sum()),
        f"share beyond {limit:.2g} standard errors": share if n >= _MANY_DRAWS else None,
        "the model's largest distance, standard errors": float(of_all.max()),
        "median distance, standard errors": float(np.median(z)) if z.size else None,
        "draws for 1% relative error where a head's rate is near 1%": (
            float(np.median(needed[near])) if near.any() else None
        ),
    }


def against_reference(report: Any, cached: Any) -> Row:
    """One head of each layer by the simple implementation, on the scores of `run_with_cache`."""
    import torch

    import hooks

    law, sigmas = hooks.LAWS["uniform"], report.settings.sigmas
    worst = {"loose rate": 0.0, "centred rate": 0.0, "score level": 0.0, "critical half-width": 0.0}
    for layer, (scores, pattern) in enumerate(cached):
        head = layer % scores.shape[1]
        at, query = (pattern[:, head, 1:].amax(-1) >= report.settings.sparse).nonzero(as_tuple=True)
        s = scores[at, head, query + 1].double()
        if len(s) != int(report.rows[layer, head].sum()):
            raise SystemExit(f"L{layer}H{head}: wanted {len(s)} sparse rows; got another number")
        if not len(s):
            continue
        visible = torch.arange(s.shape[1]) <= query[:, None] + 1
        star = s.argmax(-1, keepdim=True)
        rivals = visible.scatter(1, star, False)
        s = s.masked_fill(~visible, 0.0)
        mean = s.sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        gauges = {"loose rate": s, "centred rate": (s - mean).masked_fill(~visible, 0.0)}
        for (name, values), sums in zip(
            gauges.items(), (report.loose, report.centred), strict=True
        ):
            ours = sums[:, layer, head].sum((-1, -2)) / len(s)
            for sigma, rate in zip(sigmas, ours, strict=True):
                each = torch.full((len(s),), sigma)
                wanted = hooks.collapse_probability(
                    values.gather(1, star).squeeze(1), values, each, law, valid=rivals
                )
                worst[name] = max(worst[name], abs(float(wanted.mean()) - rate))
        s_star = s.gather(1, star).squeeze(1)
        level = float(report.level[layer, head].sum())
        worst["score level"] = max(
            worst["score level"], abs(float(s_star.sum()) - level) / abs(level)
        )
        mine = report.table.half_width[(report.table.layer == layer) & (report.table.head == head)]
        widths = hooks.critical_half_width(s_star, s).masked_fill(~rivals, math.inf).amin(1)
        if len(mine):
            apart = abs(float(widths.min()) - float(mine.min()))
            worst["critical half-width"] = max(worst["critical half-width"], apart)
    if max(worst.values()) > 1e-6:
        raise SystemExit(f"wanted the simple implementation's numbers to 1e-6; apart by {worst}")
    return {f"{name}, one head a layer: apart by": value for name, value in worst.items()}
