"""Standard errors of pooled numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped


def se_draws(rates: Float[np.ndarray, "sigma draw *group"]) -> Float[np.ndarray, "sigma *group"]:
    """Standard error of the mean over draws; NaN for fewer than two."""
    n = rates.shape[1]
    if n < 2:
        return np.full((len(rates), *rates.shape[2:]), np.nan)
    return np.asarray(rates.std(axis=1, ddof=1) / math.sqrt(n))


def se_prompts(
    sums: Float[np.ndarray, "*group prompt"], counts: Shaped[np.ndarray, "*#group prompt"]
) -> Float[np.ndarray, "*group"]:
    """Standard error over prompts of R = sum(sums) / sum(counts); NaN for one prompt.

    The linearised ratio estimator, n/(n-1) sum_i (x_i - R c_i)^2 / (sum_i c_i)^2 under the root,
    over the n prompts that have any (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    n, total = (counts > 0).sum(-1), counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = sums.sum(-1) / total
    rest = ((sums - rate[..., None] * counts) ** 2).sum(-1)
    return _se(n, rest, total)


def moments(
    sums: Float[np.ndarray, "sigma *group prompt"], counts: Shaped[np.ndarray, "*group prompt"]
) -> Float[np.ndarray, "moment *group"]:
    """What :func:`se_moments` needs of x and c, added over prompts: n, sum c^2, sum xc, sum x^2.

    n counts the prompts with any c; xc and x^2 have an entry for each sigma.
    """
    c = np.asarray(counts, float)
    few = np.stack([(c > 0).sum(-1), (c * c).sum(-1)])
    return np.concatenate([few, (sums * c).sum(-1), (sums * sums).sum(-1)])


def se_moments(
    of: Float[np.ndarray, "moment *group"],
    sums: Float[np.ndarray, "sigma *group"],
    counts: Shaped[np.ndarray, "*group"],
) -> Float[np.ndarray, "sigma *group"]:
    """:func:`se_prompts` from moments, and from what x and c add up to.

    sum_i (x_i - R c_i)^2 = sum x^2 - 2 R sum xc + R^2 sum c^2.
    """
    cross, squares = np.split(of[2:], 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = sums / counts
    rest = np.maximum(squares - 2 * rate * cross + rate**2 * of[1], 0)
    return _se(of[0], rest, counts)


def _se(n: Any, rest: Any, total: Any) -> np.ndarray:
    """n prompts, their squared residuals added, and the sum of the denominators."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.sqrt(n / (n - 1) * rest) / total
    return np.where((n > 1) & (total > 0), found, np.nan)
