"""Tokens that attention with a norm keeps apart: equilibria of any rank, and whether they attract.

    x_i = normalise( sum_j A_ij(X) x_j W_V ),   |x_i| = 1

Source: Wu et al. 2024 (with LayerNorm and suitable value matrices there are equilibria of
any rank between one and full). The constructions here are our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from qkvnorm_lens.theory.dynamics import FLOOR, Dynamics, normalise
from qkvnorm_lens.theory.graphs import causal_mask, star_mask

HELD = 1e-9  # by which a token may move in a layer


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """Tokens that a layer leaves unchanged.

    Args:
        dynamics: with norm ``"rms"``.
        tokens: ``[N, d]``, of length 1.

    Raises:
        ValueError: another norm, or tokens that a layer changes.
    """

    dynamics: Dynamics
    tokens: Float[Tensor, "n d"] = field(repr=False)

    def __post_init__(self) -> None:
        if self.dynamics.norm != "rms":
            raise ValueError(f"dynamics: wanted the norm 'rms'; got {self.dynamics.norm!r}")
        if not self.moved < HELD:
            raise ValueError(
                f"tokens: wanted an equilibrium; got tokens that a layer moves by {self.moved:.2g}"
            )

    @property
    def moved(self) -> float:
        """The largest distance by which a layer moves a token."""
        after = self.dynamics.step(self.tokens)
        return float(torch.linalg.vector_norm(after - self.tokens, dim=1).max())

    @property
    def rank(self) -> int:
        """Rank of the tokens: singular values above 1e-10 of the largest."""
        return int(torch.linalg.matrix_rank(self.tokens, rtol=FLOOR))

    @cached_property
    def multipliers(self) -> Float[Tensor, "_"]:
        """|eigenvalues| of a layer's Jacobian on the product of N spheres, descending: N (d - 1).

        A deviation along an eigenvector grows by this factor in a layer: the equilibrium attracts
        what is near if all are below 1, and is unstable if one is above.
        """
        n, d = self.tokens.shape
        whole = torch.autograd.functional.jacobian(self.dynamics.step, self.tokens)
        tangent = torch.zeros(n * d, n * (d - 1), dtype=torch.float64)
        for i, x in enumerate(self.tokens):
            basis = torch.linalg.svd(x[None], full_matrices=True)[2][1:]  # orthogonal to x
            tangent[i * d : (i + 1) * d, i * (d - 1) : (i + 1) * (d - 1)] = basis.T
        jacobian = tangent.T @ whole.reshape(n * d, n * d) @ tangent
        found: Tensor = torch.linalg.eigvals(jacobian).abs().sort(descending=True).values
        return found

    @property
    def spectral_radius(self) -> float:
        """The largest multiplier."""
        return float(self.multipliers[0]) if len(self.multipliers) else 0.0


def two_tokens(ratio: float = 3.0) -> Equilibrium:
    """N = 2, d = 2, causal, uniform attention, W_V = diag(1, ratio): rank 2.

        x_1 = (1, 0),   x_2 = (cos t, sin t)   with   cos t = 1 / (ratio - 1)

    The first token sees only itself, and (1, 0) is an eigenvector. The second becomes the direction
    of (1 + cos t, ratio sin t), so that tan t -> ratio tan(t/2), with the fixed points t = 0
    (multiplier ratio/2) and cos t = 1/(ratio - 1) (multiplier 1/(ratio - 1)). The first token's own
    multiplier is ``ratio``: it must be exactly on its eigenvector.

    Args:
        ratio: above 2, below which the only equilibrium with x_1 = (1, 0) is x_2 = x_1.

    Raises:
        ValueError: a ratio that is not above 2.
    """
    if not (math.isfinite(ratio) and ratio > 2):
        raise ValueError(f"ratio: wanted a number > 2; got {ratio!r}")
    c = 1 / (ratio - 1)
    none = torch.zeros(2, 2, dtype=torch.float64)
    w_v = torch.tensor([[1.0, 0.0], [0.0, ratio]], dtype=torch.float64)
    tokens = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]], dtype=torch.float64)
    return Equilibrium(Dynamics(causal_mask(2), none, none, w_v, norm="rms"), tokens)


def hold(
    tokens: Float[Tensor, "n d"], mask: Tensor, w_q: Tensor, w_k: Tensor, temperature: float = 1.0
) -> Equilibrium:
    """The value matrix that keeps these tokens: A(X) X W_V = X, by least squares.

    There is one where the columns of X lie in the span of those of A(X) X: for linearly independent
    tokens whenever A(X) is invertible (with a causal mask it is), and for tokens in k groups of
    equals where equal tokens attend alike (a complete mask): rank k for any k <= min(N, d).

    Raises:
        ValueError: no value matrix holds these tokens.
    """
    x = normalise(tokens, "rms")
    d = x.shape[1]
    seen = Dynamics(
        mask, w_q, w_k, torch.eye(d, dtype=torch.float64), temperature=temperature, norm="rms"
    )
    w_v = torch.linalg.pinv(seen.attention(x) @ x, rtol=FLOOR) @ x
    return Equilibrium(replace(seen, w_v=w_v), x)


def anchored(
    n: int, d: int, rank: int, *, ratio: float = 0.5, angle: float = 2 * math.pi / 3
) -> Equilibrium:
    """Equilibria of any rank that attract what is near them: each token is held by the first.

    Star mask (each token sees the first and itself; for N = 2 the causal mask), and

        W_V = diag(1, ratio, ..., ratio),   scores diag(b_1, b_2, ..., b_2),
        x_1 = e_1,   x_i = cos(angle) e_1 + sin(angle) u_i,   u_i one of rank - 1 directions.

    With rho the weight on the first token over that on itself, a layer takes the angle t to t' with
    ratio cot t' = rho / sin t + cot t. It is fixed for rho = -(1 - ratio) cos t, which needs an
    obtuse angle, and with a constant rho it would be unstable. The two numbers b_1, b_2 give rho at
    this angle the value that fixes it and the slope d rho / dt = (1 + rho cos t) / sin t, for which
    the angle's multiplier is 0. x_1 returns to e_1 by ``ratio`` per layer, and the directions u_i
    are kept (multiplier 1): nearby tokens go to a nearby equilibrium, of no lower rank.

    Args:
        n: tokens, at least ``rank``.
        d: width, at least ``rank``.
        rank: from 1 (all tokens equal: the first one) to min(n, d).
        ratio: in (0, 1).
        angle: in (pi/2, pi), radians.

    Raises:
        ValueError: a rank that tokens of this number and width can't have; a ratio or angle out of
            range.
    """
    if not 1 <= rank <= min(n, d):
        raise ValueError(f"rank: wanted 1 to {min(n, d)}; got {rank!r}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: wanted a number in (0, 1); got {ratio!r}")
    if not math.pi / 2 < angle < math.pi:
        raise ValueError(f"angle: wanted radians in (pi/2, pi); got {angle!r}")
    c, s = math.cos(angle), math.sin(angle)
    rho = -(1 - ratio) * c
    slope = (1 + rho * c) / s / rho  # of ln rho
    # ln rho = b_1 cos t - b_1 cos^2 t - b_2 sin^2 t, and its derivative.
    system = torch.tensor([[c - c * c, -s * s], [-s + 2 * c * s, -2 * s * c]], dtype=torch.float64)
    wanted = torch.tensor([math.log(rho), slope], dtype=torch.float64)
    b1, b2 = torch.linalg.solve(system, wanted).tolist()
    one = torch.eye(d, dtype=torch.float64)
    w_k = math.sqrt(d) * torch.diag(torch.tensor([b1] + [b2] * (d - 1), dtype=torch.float64))
    w_v = torch.diag(torch.tensor([1.0] + [ratio] * (d - 1), dtype=torch.float64))
    tokens = one[:1].repeat(n, 1)
    for i in range(1, n if rank > 1 else 1):
        tokens[i] = c * one[0] + s * one[1 + (i - 1) % (rank - 1)]
    return Equilibrium(Dynamics(star_mask(n), one, w_k, w_v, norm="rms"), tokens)
