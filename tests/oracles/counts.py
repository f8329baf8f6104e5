"""Rows that collapse in forward passes with the noise in them, counted on what hooks show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hooks import NormNoise
from tests.support.probes import ids, probe
from tests.support.watching import (
    attn,
    watch,
)


def real_counts(
    model: Any, layer: int, noise: NormNoise, sparse: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows that collapse in a forward pass with this noise, per head and kind (content, sink).

    Loose and strict, each as a least and a largest number: rows whose margin lies within
    rounding count for the second only.
    """
    scores, pattern = attn(layer, "attn_scores"), attn(layer, "pattern")
    clean = watch(model, ids, [scores, pattern])
    noisy = watch(model, ids, [scores, pattern], noise.hooks(model))
    star = clean[scores].argmax(-1, keepdim=True)
    rows = clean[pattern].amax(-1) >= sparse
    rows &= (clean[scores] > -1e30).sum(-1) > 1
    w = noisy[scores].double()
    own = w.gather(-1, star).squeeze(-1)
    lead = w.scatter(-1, star, -math.inf).amax(-1) - own
    near = lead.abs() < 1e-4 * (1 + own.abs())
    moved = rows & (lead > 0)
    top = noisy[pattern].amax(-1)
    out = {}
    for name, surely, maybe in (
        ("loose", moved & ~near, moved | (rows & near)),
        (
            "strict",
            moved & ~near & (top > sparse + 1e-4),
            (moved | (rows & near)) & (top > sparse - 1e-4),
        ),
    ):
        out[name] = tuple(
            np.stack(
                [
                    (x & (star.squeeze(-1) != 0)).sum((0, 2)),
                    (x & (star.squeeze(-1) == 0)).sum((0, 2)),
                ],
                -1,
            )
            for x in (surely, maybe)
        )
    return out


def assert_sample_is_real(model: Any, *, moves: int, **options: Any) -> None:
    sigma, sparse = options.pop("sigma", 0.35), options.pop("sparse", 0.95)
    report = probe(
        model, sigmas=[sigma], method="sample", draws=3, seed=7, sparse=sparse, **options
    )
    how = {k: v for k, v in options.items() if k in ("law", "shared")}
    doubtful = seen = 0
    for index, layer in enumerate(report.settings.layers):
        for draw in range(3):
            noise = NormNoise(
                sigma=sigma, on=report.settings.on, layers=(layer,), seed=7, draw=draw, **how
            )
            for name, (least, most) in real_counts(model, layer, noise, sparse).items():
                got = getattr(report, f"{name}_draws")[0, draw, index]
                got = np.round(got).astype(int)
                assert (least <= got).all(), (layer, draw, name)
                assert (got <= most).all(), (layer, draw, name)
                doubtful += int((most - least).sum())
                seen += int(got.sum()) if name == "loose" else 0
    assert seen >= moves
    assert doubtful <= 0.02 * seen + 2
