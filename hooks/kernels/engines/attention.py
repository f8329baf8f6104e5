"""What a fused attention's scores are made of, for an engine that makes them itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.kernels import MASKED


@dataclass(frozen=True)
class Operands:
    """What a fused attention's scores are made of: scale q.k, plus a mask.

    Attributes:
        query: ``[batch, head, query, d]``.
        key: ``[batch, kv_head, key, d]``; consecutive query heads share one.
        mask: True where a key is visible, or numbers to add; or None.
        first, end: keys that a query sees lie between these, ``[batch, head, query]``.
        scale: of the product.
    """

    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch kv_head key d"]
    mask: Tensor | None
    first: Int[Tensor, "batch head query"]
    end: Int[Tensor, "batch head query"]
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores: batch, head, query, key."""
        batch, n_heads, n_query = self.query.shape[:3]
        return (batch, n_heads, n_query, self.key.shape[2])


def operands(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch kv_head key d"],
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    lengths: Int[Tensor, "batch"] | None = None,
) -> Operands:
    """Operands, and which keys each query sees.

    Args:
        lengths: queries of each prompt; later ones are padding, to which no key is visible.
    """
    batch, n_heads, n_query, d = query.shape
    n_key, device = key.shape[2], query.device
    at = torch.arange(n_query, device=device, dtype=torch.int32)
    first = torch.zeros_like(at)[None, None]
    end = ((at + 1).clamp_max(n_key) if causal else torch.full_like(at, n_key))[None, None]
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        # Prompts and heads that share a mask are looked at once.
        shared = (slice(0, 1 if stride == 0 else None) for stride in mask.stride()[:2])
        one = mask[tuple(shared)]
        one = one if one.dtype == torch.bool else one > MASKED
        one = one.expand(*one.shape[:-1], n_key)
        begins = one.to(torch.int8).argmax(-1).to(torch.int32)
        ends = n_key - one.flip(-1).to(torch.int8).argmax(-1).to(torch.int32)
        first = torch.maximum(first, begins)
        end = torch.minimum(end, torch.where(one.any(-1), ends, 0))
        mask = mask.expand(batch, n_heads, n_query, n_key)
    if lengths is not None:
        end = torch.where(at < lengths[:, None, None], end, 0)
    return Operands(
        query, key, mask, first.expand(batch, n_heads, n_query),
        end.expand(batch, n_heads, n_query), 1 / math.sqrt(d) if scale is None else scale,
    )  # fmt: skip
