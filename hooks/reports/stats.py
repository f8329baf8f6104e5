"""Standard errors of pooled numbers."""

from __future__ import annotations

import math

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
        found = np.sqrt(n / (n - 1) * rest) / total
    return np.where((n > 1) & (total > 0), found, np.nan)
