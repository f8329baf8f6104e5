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
        error: the standard error of the mean; NaN where it isn't known.
    """

    value: float
    half: float
    n: int
    error: float = math.nan

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

    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * error
    return Mean(float(x.mean()), float(half), len(x), error)


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
    error = math.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
    return Mean(value, float(interval.high - interval.low) / 2, min(len(x), len(y)), error)


def seeds_wanted(
    found: Mean, bound: float = 0.0, *, level: float = 0.95, most: int = 10_000
) -> int | None:
    """The fewest seeds n with t_{n-1} s / sqrt(n) < |x̄ - bound|; None where ``most`` do not do.

    What would decide a claim if the mean x̄ and the spread s of further seeds were those of the
    seeds so far. Of a difference n is that of each group, with the fewest degrees of freedom that
    Welch's interval may have.

    Args:
        found: a mean or a difference over several seeds.
        bound: what the interval has to leave outside.
        level: of the interval.
        most: the largest number looked at.
    """
    from scipy import stats

    n = np.arange(2, most + 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * found.error * math.sqrt(found.n) / np.sqrt(n)
    enough = np.flatnonzero(half < abs(found.value - bound))
    return int(n[enough[0]]) if len(enough) else None


def power(found: Mean, *bounds: float, either: bool = False) -> str:
    """What it would take to decide a claim that is open, in words.

    Args:
        found: the mean or difference that it hangs on.
        bounds: what its interval has to leave outside [0].
        either: leaving one of them outside is enough.
    """
    if math.isnan(found.error):
        return "one seed has no interval, and tells nothing of how many would decide it"
    choose = max if either else min
    bound = choose(bounds or (0.0,), key=lambda bound: abs(found.value - bound))
    wanted = seeds_wanted(found, bound)
    if wanted is None:
        return "with this mean and spread not even 10,000 seeds would decide it"
    return f"with this mean and spread it takes {wanted} seeds to decide it"
