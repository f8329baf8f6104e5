"""The three laws of a multiplicative factor f = 1 + kappa on a vector's L2 norm.

Every law has mean 1 and root mean square relative change ``sigma`` = sqrt(E[(f - 1)^2]), the
x-axis of Menary et al. 2024, Fig. 2 and 3. A law knows how a uniform number in (0, 1) becomes a
factor, its distribution function and where this is smooth: sampling and quadrature need no more.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import check_choice, check_number, read_list

_NORMAL_REACH = 8.5  # the normal law's mass beyond is 2e-17


@runtime_checkable
class Law(Protocol):
    """Distribution of the factor f = 1 + kappa."""

    name: str
    limit: float
    """``sigma`` must be below this (at or below, where ``limit_included``)."""
    limit_included: bool
    reason: str
    """Why larger values are refused."""

    def factor(self, u: Float[Tensor, "*shape"], sigma: float) -> Float[Tensor, "*shape"]:
        """The factor whose distribution function has the value u, 0 < u < 1 (inverse CDF)."""
        ...

    def base(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The number from which a factor is made: the same draw at every sigma."""
        ...

    def cdf(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """P(factor <= f)."""
        ...

    def knots(self, sigma: Float[Tensor, "rows"]) -> Float[Tensor, "rows knots"]:
        """Ascending factors; the first and last bound the support (up to 1e-16 of the mass).

        Between two of them the density is smooth enough for a short Gauss-Legendre rule: its jumps
        and corners are all among them.
        """
        ...

    def density(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Probability density at f, inside the support."""
        ...


class Uniform:
    """f uniform on [1 - a, 1 + a], a = sqrt(3) sigma (the paper's law).

    a < 1, so sigma < 1/sqrt(3): a factor never turns negative. Source: Menary et al. 2024, Fig. 2.
    """

    name = "uniform"
    limit = 1 / math.sqrt(3)
    limit_included = False
    reason = "its half-width sqrt(3) sigma would reach 1 and factors could turn negative"

    def factor(self, u: Float[Tensor, "*shape"], sigma: float) -> Float[Tensor, "*shape"]:
        """The factor at which the distribution function is u."""
        return 1 + (math.sqrt(3) * sigma) * self.base(u)

    def base(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Uniform in (-1, 1)."""
        return 2 * u - 1

    def cdf(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """P(factor <= f)."""
        a = math.sqrt(3) * sigma
        return ((f - 1 + a) / (2 * a)).clamp(0, 1)

    def knots(self, sigma: Float[Tensor, "rows"]) -> Float[Tensor, "rows knots"]:
        """Factors between which the density is smooth."""
        a = math.sqrt(3) * sigma
        return torch.stack([1 - a, 1 + a], dim=-1)

    def density(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Probability density at f."""
        return torch.ones_like(f) / (2 * math.sqrt(3) * sigma)


class Gaussian:
    """f normal with mean 1 and standard deviation sigma; refused above sigma = 0.2."""

    name = "gaussian"
    limit = 0.2
    limit_included = True
    reason = "factors could turn negative"
    _z = (-_NORMAL_REACH, -5.5, -3.0, -1.0, 1.0, 3.0, 5.5, _NORMAL_REACH)

    def factor(self, u: Float[Tensor, "*shape"], sigma: float) -> Float[Tensor, "*shape"]:
        """The factor at which the distribution function is u."""
        return 1 + sigma * self.base(u)

    def base(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Standard normal."""
        z: Tensor = torch.special.ndtri(u)
        return z

    def cdf(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """P(factor <= f)."""
        below: Tensor = torch.special.ndtr((f - 1) / sigma)
        return below

    def knots(self, sigma: Float[Tensor, "rows"]) -> Float[Tensor, "rows knots"]:
        """Factors between which the density is smooth."""
        return 1 + sigma[:, None] * sigma.new_tensor(self._z)

    def density(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Probability density at f."""
        z = (f - 1) / sigma
        return torch.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi))


class LogNormal:
    """f = exp(s z - s^2 / 2), z standard normal, s^2 = ln(1 + sigma^2): mean 1, never negative."""

    name = "lognormal"
    limit = math.inf
    limit_included = False
    reason = "it must be finite"
    # Close together: the density stretches by exp(s) for each unit of z.
    _z = (-8.5, -7.0, -5.5, -4.25, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.25, 5.5, 7.0, 8.5)

    @staticmethod
    def _s(sigma: Tensor) -> Tensor:
        return torch.log1p(sigma * sigma).sqrt()

    def factor(self, u: Float[Tensor, "*shape"], sigma: float) -> Float[Tensor, "*shape"]:
        """The factor at which the distribution function is u."""
        s = math.sqrt(math.log1p(sigma * sigma))
        return torch.exp(s * self.base(u) - s * s / 2)

    def base(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Standard normal."""
        z: Tensor = torch.special.ndtri(u)
        return z

    def cdf(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """P(factor <= f)."""
        s = self._s(sigma)
        # A factor is positive: at and below zero the distribution function is zero.
        z = torch.log(f.clamp_min(torch.finfo(f.dtype).tiny)) / s + s / 2
        return torch.where(f > 0, torch.special.ndtr(z), torch.zeros_like(z))

    def knots(self, sigma: Float[Tensor, "rows"]) -> Float[Tensor, "rows knots"]:
        """Factors between which the density is smooth."""
        s = self._s(sigma)[:, None]
        return torch.exp(s * sigma.new_tensor(self._z) - s * s / 2)

    def density(
        self, f: Float[Tensor, "*shape"], sigma: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*shape"]:
        """Probability density at f."""
        s = self._s(sigma)
        z = torch.log(f) / s + s / 2
        return torch.exp(-0.5 * z * z) / (f * s * math.sqrt(2 * math.pi))


LAWS: dict[str, Law] = {law.name: law for law in (Uniform(), Gaussian(), LogNormal())}


def get_law(name: str) -> Law:
    """The law with this name."""
    return LAWS[check_choice("law", name, sorted(LAWS))]


def check_sigma(sigma: float, law: Law, name: str = "sigma") -> float:
    """A sigma that the law can have, as Python's own float.

    Raises:
        TypeError: not a number.
        ValueError: negative, not finite, or too large for the law.
    """
    value = check_number(name, sigma, "a finite number >= 0", lambda s: 0 <= s < math.inf)
    if value > law.limit or (value == law.limit and not law.limit_included):
        relation = "<=" if law.limit_included else "<"
        raise ValueError(
            f"{name}: wanted {relation} {law.limit:.6g} for {law.name} noise ({law.reason}); "
            f"got {value!r} (a share, not percent: 0.05 is 5%)"
        )
    return value


def read_sigmas(sigmas: Any, law: str, default: tuple[float, ...]) -> list[float]:
    """Sigmas that the law can have, as floats; None means the default ones that it can.

    Raises:
        TypeError: not a list of numbers.
        ValueError: a sigma that the law can't have.
    """
    known = get_law(law)
    if sigmas is None:
        top = known.limit
        return [s for s in default if s < top or (s == top and known.limit_included)]
    given = read_list("sigmas", sigmas, "a list of numbers")
    values = [check_sigma(sigma, known, "sigmas") for sigma in given]
    return sorted(values) if isinstance(sigmas, Set) else values
