"""Means over seeds and their intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95% interval (Student's t); NaN half-width for one seed.

    Attributes:
        value: the mean.
        half: half the interval's width.
        n: seeds.
    """

    value: float
    half: float
    n: int

    def words(self, value: str, half: str = "") -> str:
        """``97.8 ± 0.4``, the value alone for one seed.

        Args:
            value: format of the value.
            half: of the interval; default: the same.
        """
        alone = math.isnan(self.half)
        return f"{self.value:{value}}" + ("" if alone else f" ± {self.half:{half or value}}")

    def percent(self, digits: int = 1) -> str:
        """``97.8 ± 0.4``, in percent."""
        return Mean(100 * self.value, 100 * self.half, self.n).words(f".{digits}f")

    @property
    def seeds(self) -> str:
        """``3 seeds``."""
        return counted(self.n, "seed")

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; never for one seed."""
        return abs(self.value) > self.half


def counted(n: int, what: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n} {what}{'s' * (n != 1)}"


def mean(values: Sequence[float], level: float = 0.95) -> Mean:
    """Mean and interval over seeds: x̄ ± t s / sqrt(n)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Mean(float(x.mean()) if len(x) else math.nan, math.nan, len(x))
    from scipy import stats

    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Mean(float(x.mean()), float(half), len(x))


def difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Mean:
    """Mean of a minus mean of b, with Welch's interval."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    value = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return Mean(value, math.nan, min(len(x), len(y)))
    with warnings.catch_warnings():  # seeds that all give one number have no spread, and may
        warnings.filterwarnings("ignore", message="Precision loss occurred")
        from scipy import stats

        interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    return Mean(value, float(interval.high - interval.low) / 2, min(len(x), len(y)))
