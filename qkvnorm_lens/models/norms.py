"""The small parts of which the three placements are composed.

    RMSNorm(z; g) = sqrt(n) g * z / |z|        LayerNorm(z; g) = RMSNorm of z minus its mean

Menary et al. 2024 (arXiv 2406.17837), Section 2.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import nn


class Norm(nn.Module):
    """``z -> g * (z - [mean z]) / sqrt(mean z^2 + eps)`` over the last `dims` dimensions.

    Menary et al. 2024, Section 2.

    Args:
        kind: ``"rms"``, or ``"layer"`` to subtract the mean first.
        gain: the shape of the learned gain, which broadcasts to the input; None for no gain.
        dims: how many of the last dimensions one norm covers.
        eps: added to the mean square.
    """

    weight: nn.Parameter | None

    def __init__(
        self, kind: str, *, gain: tuple[int, ...] | None, dims: int = 1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.kind = kind
        self.dims = dims
        self.eps = eps
        self.weight = None if gain is None else nn.Parameter(torch.ones(gain))

    def forward(self, x: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
        """Norm in float32 (or float64), then cast back before the gain."""
        over = tuple(range(-self.dims, 0))
        z = x if x.dtype == torch.float64 else x.float()
        if self.kind == "layer":
            z = z - z.mean(over, keepdim=True)
        z = (z * torch.rsqrt(z.square().mean(over, keepdim=True) + self.eps)).to(x.dtype)
        return z if self.weight is None else z * self.weight

    def extra_repr(self) -> str:
        """What `repr` shows."""
        gain = None if self.weight is None else tuple(self.weight.shape)
        return f"{self.kind}, gain={gain}, dims={self.dims}, eps={self.eps}"


class Gain(nn.Module):
    """``x -> g * x``: one of the three gains that Pre-Norm gives q, k and v."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
        """Multiply by the gain."""
        return x * self.weight


class Calibrated(nn.Module):
    """``x -> c x`` with c fixed once, so that the output's standard deviation is `std`.

    The "checkpoints" of Menary et al. 2024, appendix on training. c is one until `measuring` is
    set; afterwards it only multiplies.
    """

    weight: torch.Tensor  # the factor; TransformerLens keeps only states of this name

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std
        self.measuring = False
        self.register_buffer("weight", torch.ones(()))

    def forward(
        self, x: Float[torch.Tensor, "*shape"], where: Bool[torch.Tensor, "..."] | None = None
    ) -> Float[torch.Tensor, "*shape"]:
        """Multiply; while measuring, set the factor first, from the entries `where` selects."""
        if self.measuring:
            seen = x if where is None else x[where.expand(x.shape)]
            self.weight.copy_(self.std / seen.detach().float().std())
        return x * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"std={self.std}"
