"""Hand-built attention rows and random ones, and what the simple implementation says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooks import collapse_probability
from hooks.noise.laws import get_law


@dataclass(frozen=True)
class Row:
    """One hand-built attention row: q.k parts, and b_* - b_t where a bias is added."""

    name: str
    s_star: float
    s: tuple[float, ...]
    sigma: float
    law: str = "uniform"
    beta: tuple[float, ...] | None = None
    on: str = "qk"

    def __str__(self) -> str:
        return f"{self.name}-{self.law}-{self.on}"

    @property
    def how(self) -> dict[str, bool]:
        return {"on_q": "q" in self.on, "on_k": "k" in self.on}


_SAME_SIGN = (
    Row("positive", 10.0, (8.0,), 0.11),
    Row("negative", -5.0, (-7.0,), 0.25),
    Row("many", 12.0, (11.0, 10.5, 9.0, 3.0, -2.0, 0.0), 0.1),
    Row("all negative", -4.0, (-5.0, -6.0, -6.5, -20.0), 0.3),
    Row("tie", 9.0, (9.0,), 0.05),
    Row("ties", 9.0, (9.0, 9.0, 8.0), 0.2),
    Row("negative tie", -9.0, (-9.0, -9.5), 0.2),
    Row("mixed", 6.0, (5.0, -5.0, 0.0, 2.0), 0.35),
    Row("zero star", 0.0, (-1.0, -2.0), 0.3),
    Row("zero rival", 3.0, (0.0,), 0.5),
)


_BIASED = (
    Row("one", 10.0, (9.0,), 0.1, beta=(0.5,)),
    Row("one, the bias alone wins", 4.0, (6.0,), 0.15, beta=(3.0,)),
    Row("one, the bias loses", 9.0, (5.0,), 0.3, beta=(-2.5,)),
    Row("mixed", 6.0, (7.0, 4.0, -3.0, 0.0), 0.25, beta=(2.5, -1.0, 8.5, 3.0)),
    Row("negative", -6.0, (-5.0, -9.0), 0.2, beta=(2.0, -1.0)),
    Row("zero star", 0.0, (1.0, -2.0), 0.4, beta=(1.25, -0.5)),
    Row("zero rival", 3.0, (0.0, 0.0), 0.5, beta=(-2.0, 1.0)),
    Row("tie", 5.0, (6.0,), 0.1, beta=(1.0,)),
)


def _rows() -> list[Row]:
    out = list(_SAME_SIGN)
    for row in (*_SAME_SIGN[:3], _SAME_SIGN[4]):
        out.append(Row(row.name, row.s_star, row.s, min(row.sigma, 0.2), "gaussian"))
        out.append(Row(row.name, row.s_star, row.s, 0.4, "lognormal"))
    for row in _BIASED:
        out += [Row(row.name, row.s_star, row.s, row.sigma, "uniform", row.beta, "qk")]
        out += [Row(row.name, row.s_star, row.s, row.sigma, "uniform", row.beta, "k")]
        out += [Row(row.name, row.s_star, row.s, row.sigma, "uniform", row.beta, "q")]
    for row in _BIASED[:4]:
        out += [Row(row.name, row.s_star, row.s, min(row.sigma, 0.2), "gaussian", row.beta, "qk")]
        out += [Row(row.name, row.s_star, row.s, min(row.sigma, 0.2), "gaussian", row.beta, "q")]
        out += [Row(row.name, row.s_star, row.s, 0.8, "lognormal", row.beta, "k")]
        out += [Row(row.name, row.s_star, row.s, 0.8, "lognormal", row.beta, "q")]
    out.append(Row("one", 10.0, (9.0,), 0.8, "lognormal", (0.5,)))
    return out


ROWS = _rows()


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def probability(row: Row, **options: bool) -> float:
    p = collapse_probability(
        f64([row.s_star]),
        f64([row.s]),
        f64([row.sigma]),
        get_law(row.law),
        beta=None if row.beta is None else f64([row.beta]),
        noise_on_q="q" in row.on,
        noise_on_k="k" in row.on,
        **options,
    )
    return float(p[0])


SCORES = st.floats(-20, 20).map(lambda x: round(x, 3))
GAPS = st.floats(0, 12).map(lambda x: round(x, 3))


@st.composite
def biased_rows(draw: st.DrawFn, law: str = "uniform", most: int = 6) -> Row:
    """w_* = s_* + b_* is the largest score: beta_t = b_* - b_t >= s_t - s_*."""
    s_star = draw(SCORES)
    s = draw(st.lists(SCORES, min_size=1, max_size=most))
    beta = [t - s_star + draw(GAPS) for t in s]
    sigma = draw(st.floats(0.01, 0.57 if law == "uniform" else 0.2))
    on = draw(st.sampled_from(["q", "k", "qk"]))
    return Row("random", s_star, tuple(s), sigma, law, tuple(beta), on)
