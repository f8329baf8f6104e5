"""How far the rows of a matrix are from being equal: what `rank_profile` reduces a tensor to.

All in float64, from the singular values themselves: those of a Gram matrix are squares, which keep
nothing below sqrt(eps) of the largest. A QR first loses nothing: each token keeps its own rounding.
"""

from __future__ import annotations

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

_ELEMENTS = 1 << 22  # of a tensor that is reduced at a time


def distance_to_mean(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch"]:
    """mu(X) = || X - 1 mean(X)^T ||_F, in the units of X; exactly 0 where all rows are equal.

    Source: Wu et al. 2024.
    """
    # The first row is subtracted first: what all rows share then leaves no rounding.
    apart = x - x[..., :1, :]
    mu: Tensor = torch.linalg.matrix_norm(apart - apart.mean(-2, keepdim=True))
    return mu


def mean_cosine(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch"]:
    """Mean |cosine| over pairs of different rows, without those of zero length; NaN if none.

    Source: Wu et al. 2024.
    """
    return _mean_of_pairs(_cosines(x))


def _cosines(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch token token"]:
    """|cosine| of each pair of rows; 0 for those of zero length."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / lengths.where(lengths > 0, torch.ones_like(lengths))
    cosines: Tensor = (unit @ unit.mT).abs().clamp(max=1)
    return cosines


def _mean_of_pairs(cosines: Float[Tensor, "*batch token token"]) -> Float[Tensor, "*batch"]:
    own = cosines.diagonal(dim1=-2, dim2=-1)
    n = (own > 0).sum(-1)
    mean = (cosines.sum((-2, -1)) - own.sum(-1)) / (n * (n - 1)).clamp_min(1)
    return mean.masked_fill(n < 2, torch.nan)


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
    (found,) = _parts(x[None], rounding, (0,))[0]
    return dict(zip(MEASURES, found.tolist(), strict=True))


def with_and_without_first(
    x: Float[Tensor, "prompt token d"], rounding: float
) -> Float[Tensor, "prompt 2 measure"]:
    """:func:`measures` of each prompt's tokens: of all of them, and without the first."""
    few = max(1, _ELEMENTS // max(1, x[0].numel()))
    return torch.cat([_parts(some, rounding, (0, 1)) for some in x.split(few)])


def _parts(
    x: Float[Tensor, "prompt token d"], rounding: float, starts: tuple[int, ...]
) -> Float[Tensor, "prompt start measure"]:
    """The measures of the rows from each of these on; one QR serves all, singular values stay."""
    top = x.abs().amax((-2, -1), keepdim=True).double() if x.numel() else x.new_zeros(len(x), 1, 1)
    # Squares of what is large or small in float32 stay in range.
    x = x.double() / top.where(top > 0, torch.ones_like(top))
    last, (tokens, d) = starts[-1], x.shape[1:]
    if tokens > d:
        end = _root(x[:, last:])
        roots = [torch.cat([x[:, i:last], end], 1) for i in starts]
    else:
        whole = _root(x.mT)
        roots = [whole[..., i:] for i in starts]
    cosines = _cosines(x)
    return torch.stack(
        [
            _measured(x[:, i:], _singular(root), cosines[:, i:, i:], top, rounding)
            for i, root in zip(starts, roots, strict=True)
        ],
        1,
    )


# One matrix at a time: in a batch where it lies in memory decides how LAPACK rounds it.


def _root(x: Float[Tensor, "prompt n m"]) -> Float[Tensor, "prompt _ m"]:
    """R of X = Q R, of the same singular values."""
    return torch.stack([torch.linalg.qr(one, mode="r").R for one in x])


def _singular(x: Float[Tensor, "prompt n m"]) -> Float[Tensor, "prompt value"]:
    return torch.stack([torch.linalg.svdvals(one) for one in x])


def _measured(
    x: Float[Tensor, "prompt token d"],
    s: Float[Tensor, "prompt value"],
    cosines: Float[Tensor, "prompt token token"],
    top: Float[Tensor, "prompt 1 1"],
    rounding: float,
) -> Float[Tensor, "prompt measure"]:
    """The measures of ``top x`` from the singular values of x; what has no token is X = 0."""
    s = torch.nn.functional.pad(s, (0, 0 if s.shape[-1] else 1))
    first, least, size = s[:, 0], s[:, -1], torch.linalg.vector_norm(s, dim=-1)
    p = s / s.sum(-1, keepdim=True)
    mu = distance_to_mean(x) if x.shape[1] else torch.zeros_like(size)
    own = max(x.shape[1:]) * torch.finfo(torch.float64).eps * first
    rank = (s > (rounding * size + own)[:, None]).sum(-1).double()
    top = top.flatten()
    found = {
        "mu": mu * top,
        "relative_mu": (mu / size).clamp(max=1.0),
        "stable_rank": (size / first).square().clamp_min(1.0),
        "effective_rank": torch.special.entr(p).sum(-1).exp().clamp_min(1.0),
        "rank": rank.masked_fill((rank == 0) & (size > 0), torch.nan),
        "least": least * top,
        "relative_least": least / first,
        "mean_cosine": _mean_of_pairs(cosines),
        "norm": size * top,
    }
    return torch.stack([found[name] for name in MEASURES], -1)


def first_share(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch"]:
    """The first token's share of ||X||_F^2; NaN for X = 0."""
    x = x.double()
    squares = (x / x.abs().amax((-2, -1), keepdim=True)).square().sum(-1)
    return squares[..., 0] / squares.sum(-1)
