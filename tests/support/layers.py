"""Layers of hand-made rows, and a strategy for random ones."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.engines import HandMade

NONE = -math.inf


def rows(*each: tuple[float, ...] | list[float], heads: int = 4) -> Tensor:
    """Scores with a matrix for each row, ``[row / heads, heads, 1, key]``."""
    widest = max(map(len, each))
    padded = [[*row, *[NONE] * (widest - len(row))] for row in each]
    padded += [[NONE] * widest] * (-len(padded) % heads)
    return torch.tensor(padded).view(-1, heads, 1, widest)


ROWS = rows(
    (10.0, 8.0),
    (-5.0, -7.0, -7.5),
    (12.0, 11.0, 10.5, 9.0, 3.0, -2.0, 0.0),
    (-1.0, -5.0, -6.0, -6.5, -20.0),
    (9.0, 9.0, 8.0),  # a tie
    (9.0, 9.0 * (1 - 1e-7), 3.0),  # one up to rounding
    (6.0, 5.0, -5.0, 0.0, 2.0),
    (0.0, -4.0, -5.0),
    (4.0, 0.0, 0.0),
    (3.0,),  # one visible key
    (NONE, NONE),
    (10.0, NONE, 6.0, -3.5e4, -1e9, 5.0),
    (20.0, *[13.0] * 60),
    (16.0, *np.linspace(12, -12, 400)),
    (5e4, 4e4, 3.9e4, *range(1000, 9000, 500)),
    (22.0, *np.linspace(10.0, 10.1, 2000)),
    (24.0, *np.random.default_rng(0).normal(12, 1, 2500)),
)
BIASED = HandMade(
    scores=rows((12.0, 9.5, 8.0, 2.0), (7.0, 1.0, -2.0), (9.0, 3.0, 3.0, 1.0), (3.0, -1.0, -6.0)),
    qk=rows((12.0, 9.0, 11.0, 12.0), (4.0, 6.0, -3.0), (9.0, 5.0, 0.0, 0.0), (-4.0, -5.0, 2.0)),
)
CAPPED = HandMade(
    14 * torch.tanh(rows((30, 9, 8), (12, 8, -8), (13.0, 12), (60, 1.0)) / 14), soft_cap=14.0
)
LAYERS = {
    "rows": HandMade(ROWS),
    "sinks": HandMade(ROWS, sink=(2.0, 0.0, -3.0, 8.0)),
    "some sinks": HandMade(ROWS, sink=(2.0, NONE, NONE, 8.0)),
    "bias": BIASED,
    "bias and sinks": HandMade(BIASED.scores, qk=BIASED.qk, sink=(1.0, 1.0, 0.0, -1.0)),
    "pattern": HandMade(ROWS.nan_to_num(neginf=-1e9), torch.softmax(ROWS, -1).nan_to_num(0.1)),
    "double": HandMade(ROWS.double()),
}


@st.composite
def layers(draw: st.DrawFn, widest: int = 200) -> HandMade:
    """Layers with masks, biases, ties, sinks, of any spread and width."""
    seed, n_key = (
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from([n for n in (2, 3, 7, 40, 200) if n <= widest])),
    )
    rng = torch.Generator().manual_seed(seed)
    shape = (draw(st.integers(1, 2)), 4, draw(st.integers(1, 5)), n_key)
    scale, level = draw(st.sampled_from([2.0, 6.0, 20.0])), draw(st.floats(-30, 30))
    scores = scale * torch.randn(shape, generator=rng) + level
    if draw(st.booleans()):  # ties
        scores = scores.round()
    top = torch.randint(n_key, (*shape[:3], 1), generator=rng)
    above = scores.amax(-1, keepdim=True) + draw(st.floats(0, 12))
    scores.scatter_(-1, top, above)
    if draw(st.booleans()):
        scores.masked_fill_(torch.rand(shape, generator=rng) < 0.3, draw(st.sampled_from(MASKS)))
    biased = draw(st.booleans()) and n_key < 100
    qk = scores + 3 * torch.randn(shape, generator=rng) if biased else None
    sink = (0.0, 3.0, -5.0, level) if draw(st.booleans()) else ()
    return HandMade(scores, qk=qk, sink=sink)


MASKS = (NONE, -1e9, float(torch.finfo(torch.float32).min), -65504.0)
