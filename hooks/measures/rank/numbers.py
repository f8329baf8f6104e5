"""How far the rows of a matrix are from being equal: what `rank_profile` reduces a tensor to.

All in float64, from the singular values themselves: those of a Gram matrix are squares, which keep
nothing below sqrt(eps) of the largest.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

MEASURES: Final = (
    "mu",
    "relative_mu",
    "stable_rank",
    "effective_rank",
    "rank",
    "least",
    "relative_least",
    "mean_cosine",
    "norm",
)


def distance_to_mean(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch"]:
    """mu(X) = || X - 1 mean(X)^T ||_F, in the units of X; exactly 0 where all rows are equal.

    Source: Wu et al. 2024.
    """
    # The first row is subtracted first: what all rows share then leaves no rounding.
    apart = x - x[..., :1, :]
    mu: Tensor = torch.linalg.matrix_norm(apart - apart.mean(-2, keepdim=True))
    return mu


def mean_cosine(x: Float[Tensor, "token d"]) -> float:
    """Mean |cosine| over pairs of different rows, without those of zero length; NaN if none.

    Source: Wu et al. 2024.
    """
    lengths = torch.linalg.vector_norm(x, dim=-1)
    unit = x[lengths > 0] / lengths[lengths > 0, None]
    n = len(unit)
    if n < 2:
        return math.nan
    cosines = (unit @ unit.T).abs().clamp(max=1)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


def measures(
    x: Float[Tensor, "token d"], rounding: float = torch.finfo(torch.float64).eps / 2
) -> dict[str, float]:
    """The measures of one prompt's tokens, s its min(token, d) singular values.

        mu                || X - 1 mean(X)^T ||_F
        relative_mu       mu / ||X||_F, in [0, 1]
        stable_rank       ||X||_F^2 / ||X||_2^2 = sum s^2 / max s^2
        effective_rank    exp(-sum p ln p), p = s / sum s
        rank              number of s > rounding ||X||_F
        least             min s
        relative_least    min s / max s
        mean_cosine       mean over pairs of different tokens of |cos|
        norm              ||X||_F

    ``stable_rank`` is that of X itself, squares over a square (Rudelson and Vershynin 2007); that
    of X X^T, sum s^4 / max s^4, is another number (Naderi et al. 2024; `theory.markov`).

    ``rank`` counts what rounding can't have made. Numbers stored with a relative error of u are
    off by E with ||E||_F <= u ||X||_F, and no singular value moves by more than ||E||_2 <= ||E||_F
    (Weyl): of tokens of rank r at most r lie above u ||X||_F. Beside it the error of the
    decomposition itself, max(token, d) 2^-52 max s. As max s >= ||X||_F / sqrt(min(token, d)), the
    rank is at least 1 for X != 0 while u sqrt(min(token, d)) < 1 (bfloat16, u = 2^-8: up to 65535);
    beyond, where no singular value is above, it can't be told and is NaN. Errors from before X was
    stored are part of X.

    1 <= stable_rank and 1 <= effective_rank, both at most the number of s that aren't zero. The
    numerical rank is that number, or less: many s of the size of rounding count in effective_rank
    and not in rank. For X = 0 mu, rank, least and norm are 0 and the rest is NaN.
    Source: Wu et al. 2024 (mu, rank, least, cosine); Roy and Vetterli 2007 (effective rank).

    Args:
        x: finite numbers; widened to float64.
        rounding: u, the relative error of the numbers in x: half the machine epsilon of the model's
            dtype. ``least`` is given as it is.
    """
    x = x.double()
    top = float(x.abs().max()) if x.numel() else 0.0
    if top == 0:
        zero = dict.fromkeys(("mu", "rank", "least", "norm"), 0.0)
        return {name: zero.get(name, math.nan) for name in MEASURES}
    scaled = x / top  # squares of what is large or small in float32 stay in range
    s = torch.linalg.svdvals(scaled)
    first = float(s[0])
    p = s[s > 0] / s.sum()
    size = float(torch.linalg.vector_norm(s))
    mu = float(distance_to_mean(scaled))
    least = float(s[-1])
    own = max(x.shape) * torch.finfo(torch.float64).eps * first
    rank = float((s > rounding * size + own).sum())
    return {
        "mu": mu * top,
        "relative_mu": min(mu / size, 1.0),
        "stable_rank": max((size / first) ** 2, 1.0),
        "effective_rank": max(math.exp(-float((p * p.log()).sum())), 1.0),
        "rank": rank if rank else math.nan,
        "least": least * top,
        "relative_least": least / first,
        "mean_cosine": mean_cosine(scaled),
        "norm": size * top,
    }


def first_share(x: Float[Tensor, "token d"]) -> float:
    """The first token's share of ||X||_F^2; NaN for X = 0."""
    squares = (x.double() / x.double().abs().max()).square().sum(-1)
    return float(squares[0] / squares.sum())
