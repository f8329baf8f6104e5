"""The strict rate of one row by drawing it, in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class StrictRow:
    """A row's visible scores cap(s + bias), and the noise on them; the first is the largest."""

    s: tuple[float, ...]
    bias: tuple[float, ...] = ()
    law: str = "uniform"
    on: str = "qk"
    sparse: float = 0.95
    soft_cap: float = 0.0
    sink: float = field(default=-math.inf)


def factors(law: str, sigma: float, rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Draws of 1 + kappa."""
    spread = math.sqrt(math.log1p(sigma**2))
    return {
        "uniform": lambda *n: 1 + math.sqrt(3) * sigma * rng.uniform(-1, 1, n),
        "gaussian": lambda *n: 1 + sigma * rng.standard_normal(n),
        "lognormal": lambda *n: np.exp(spread * rng.standard_normal(n) - spread**2 / 2),
    }[law]


def drawn_rate(row: StrictRow, sigma: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """Share of the draws in which another token than the first is sparse; its standard error."""
    draw = factors(row.law, sigma, np.random.default_rng(seed))
    s, bias = np.array(row.s), np.array(row.bias or (0.0,) * len(row.s))
    hits = 0
    for n in _parts(draws, max(1, _AT_ONCE // len(s))):
        q = draw(n, 1) if "q" in row.on else 1.0
        k = draw(n, len(s)) if "k" in row.on else 1.0
        scores = q * k * s + bias
        if row.soft_cap:
            scores = row.soft_cap * np.tanh(scores / row.soft_cap)
        top = scores.max(1)
        total = np.exp(scores - top[:, None]).sum(1) + np.exp(row.sink - top)
        hits += int(((1 / total >= row.sparse) & (scores.argmax(1) > 0)).sum())
    rate = hits / draws
    return rate, math.sqrt(max(rate * (1 - rate), 1 / draws) / draws)


def _parts(total: int, most: int) -> Iterator[int]:
    for first in range(0, total, most):
        yield min(most, total - first)
