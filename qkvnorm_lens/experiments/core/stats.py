"""Means over seeds and their intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95% interval; NaN ends for one seed.

    Attributes:
        value: the mean.
        low: the interval's lower end.
        high: its upper end.
        n: seeds.
        error: the standard error of the mean; NaN where it isn't known.
        of_shares: its interval is a share's (:func:`share`), no longer Student's t.
    """

    value: float
    low: float
    high: float
    n: int
    error: float = math.nan
    of_shares: bool = False

    @classmethod
    def around(cls, value: float, half: float, n: int, error: float = math.nan) -> Mean:
        """A mean whose interval reaches equally far to both sides."""
        return cls(value, value - half, value + half, n, error)

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    @property
    def sides(self) -> tuple[float, float]:
        """How far the interval reaches below the mean and above it; 0 for one seed."""
        if math.isnan(self.low):
            return 0.0, 0.0
        return self.value - self.low, self.high - self.value

    def words(self, value: str, half: str = "") -> str:
        """``97.8 ± 0.4``; ``0.8 (0.0 to 14.3)`` if the sides differ; one seed's value alone.

        Args:
            value: format of the value.
            half: of the interval; default: the same.
        """
        said = f"{self.value:{value}}"
        if math.isnan(self.low):
            return said
        below, above = (f"{side:{half or value}}" for side in self.sides)
        if below == above:
            return f"{said} ± {below}"
        return f"{said} ({self.low:{value}} to {self.high:{value}})"

    def percent(self, digits: int = 1, sign: str = "") -> str:
        """``97.8 ± 0.4``, in percent; ``sign``: ``"+"`` to write that of a positive number too."""
        ends = {name: 100 * getattr(self, name) for name in ("value", "low", "high")}
        return replace(self, **ends).words(f"{sign}.{digits}f", f".{digits}f")

    def cut(self, low: float, high: float) -> Mean:
        """The interval without what lies outside these ends."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    @property
    def rest(self) -> Mean:
        """What a share leaves of one."""
        return replace(self, value=1 - self.value, low=1 - self.high, high=1 - self.low)

    @property
    def seeds(self) -> str:
        """``3 seeds``."""
        return counted(self.n, "seed")

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; never for one seed."""
        return self.low > 0 or self.high < 0


def counted(n: int, what: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n} {what}{'s' * (n != 1)}"


def mean(values: Sequence[float], level: float = 0.95) -> Mean:
    """Mean and interval over seeds: x̄ ± t s / sqrt(n)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Mean.around(float(x.mean()) if len(x) else math.nan, math.nan, len(x))
    from scipy import stats

    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * error
    return Mean.around(float(x.mean()), float(half), len(x), error)


def share(values: Sequence[float], level: float = 0.95) -> Mean:
    """Mean and interval over seeds of numbers between 0 and 1.

    The interval holds every p with |x̄ - p| <= t s/sqrt(n) sqrt(p (1 - p) / (x̄ (1 - x̄))): Wilson's
    score interval (1927, J. Am. Stat. Assoc. 22), with t for z and x̄ (1 - x̄) n / s² for the
    number of trials, as where the variance over seeds is a constant times p (1 - p). It stays
    within [0, 1], is Student's where it is narrow, and reaches further towards one half than away
    from it. Where all seeds are 0, or all 1, it is that point: seeds alone then tell nothing of
    how often others would be.
    """
    found = mean(values, level)
    x, reach = found.value, found.half
    if not 0 < x < 1 or math.isnan(reach):
        return replace(found, of_shares=True)
    k = reach**2 / (x * (1 - x))
    middle, half = x + k / 2, math.sqrt(reach**2 + k**2 / 4)
    low, high = ((middle + side * half) / (1 + k) for side in (-1, 1))
    low, high = max(0.0, min(low, x)), min(1.0, max(high, x))  # but for rounding they are
    return Mean(x, low, high, found.n, found.error, of_shares=True)


def difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, *, shares: bool = False
) -> Mean:
    """Mean of a minus mean of b, with Welch's interval; that of ``shares`` ends at -1 and 1."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    value, n = float(x.mean() - y.mean()), min(len(x), len(y))
    if n < 2:
        return Mean.around(value, math.nan, n)
    with warnings.catch_warnings():  # seeds that all give one number have no spread, and may
        warnings.filterwarnings("ignore", message="Precision loss occurred")
        from scipy import stats

        interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    error = math.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
    found = Mean.around(value, float(interval.high - interval.low) / 2, n, error)
    return found.cut(-1.0, 1.0) if shares else found


def seeds_wanted(
    found: Mean, bound: float = 0.0, *, level: float = 0.95, most: int = 10_000
) -> int | None:
    """The fewest seeds n with t_{n-1} s / sqrt(n) < |x̄ - bound|; None where ``most`` do not do.

    What would decide a claim if the mean x̄ and the spread s of further seeds were those of the
    seeds so far. Of a difference n is that of each group, with the fewest degrees of freedom that
    Welch's interval may have. Of a share the left side is times sqrt(p (1 - p) / (x̄ (1 - x̄))), with
    p the bound (:func:`share`).

    Args:
        found: a mean or a difference over several seeds.
        bound: what the interval has to leave outside.
        level: of the interval.
        most: the largest number looked at.
    """
    from scipy import stats

    n, spread = np.arange(2, most + 1), found.error * math.sqrt(found.n)
    if found.of_shares and 0 < found.value < 1:
        spread *= math.sqrt(max(bound * (1 - bound), 0) / (found.value * (1 - found.value)))
    half = stats.t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n)
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
