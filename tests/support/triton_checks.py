"""What a process with triton's interpreter checks."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.support import models
from tests.support.engines import HandMade, assert_same
from tests.support.probes import probe

NONE = -math.inf


def check() -> None:
    """Hand-made rows in several dtypes, with patterns and sinks; a model."""
    rng = np.random.default_rng(0)
    each = [
        [10.0, 6.0], [-5.0, -9.0, -9.5], [12.0, 7.0, 6.5, 6.0, 3.0, -2.0, 0.0], [3.0], [NONE],
        [9.0, 9.0, 8.0], [9.0, 5.0, -5.0, 0.0, 2.0], [0.0, -4.0, -5.0], [20.0, *[12.5] * 60],
        [16.0, *np.linspace(12, -12, 150)], [24.0, *rng.normal(12, 1, 200)], [9.0, -1e9, 4.0, 2.0],
    ]  # fmt: skip
    widest = max(map(len, each))
    rows = torch.tensor([[*row, *[NONE] * (widest - len(row))] for row in each])
    scores = rows.view(-1, 4, 1, widest)
    pattern = torch.softmax(scores, -1).nan_to_num(0.1)
    how = {"sigmas": (0.1, 0.25, 0.5), "strict": "sampled"}
    for layer in (
        HandMade(scores),
        HandMade(scores.nan_to_num(neginf=-1e9), pattern),
        HandMade(scores.to(torch.bfloat16)),
        HandMade(scores.double(), sink=(1.0, NONE, 0.0, 2.0)),
        HandMade(scores, qk=scores - 1),
    ):
        mine = layer.reduced("triton", **how)
        assert mine.rows.sum() >= 4
        assert mine.sums["loose"].sum() > 0.5
        assert_same(mine, layer.reduced("torch", **how), loose=1e-8, strict=None)
        assert_same(mine, layer.reduced("compiled", **how), strict=None)
    ids, llama = models.tokens(batch=1, pos=12), models.tiny_llama()
    reports = [
        probe(llama, ids, draws=0, engine=engine, sigmas=[0.1, 0.4])
        for engine in ("triton", "compiled")
    ]
    assert reports[0].model["engine"] == "triton"
    assert_same(*reports)
