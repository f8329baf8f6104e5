"""One attention as the model computed it: the input of its softmax, and its operands.

A fused attention never makes its scores; they are made here, for as many queries at a time as
requested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.model.protocol import ROLES, Role


@dataclass(frozen=True)
class Fused:
    """The arguments of a `scaled_dot_product_attention`, from which its scores can be made."""

    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores: batch, head, query, key."""
        batch, n_heads, n_query = self.query.shape[:3]
        return (batch, n_heads, n_query, self.key.shape[-2])

    def scores(
        self, first: int, end: int, *, n_key: int | None = None
    ) -> Float[Tensor, "batch head query key"]:
        """Scores of some of the queries, as the function's documentation defines them.

        ``n_key``: only for this many keys (later ones may be known to be masked).
        """
        wide = torch.promote_types(self.query.dtype, torch.float32)
        batch, n_heads, _, every = self.shape
        n_key = every if n_key is None else n_key
        n_kv = self.key.shape[1]
        # The query heads of a key/value head follow each other: its keys need no copies.
        q = self.query[:, :, first:end].to(wide).reshape(batch, n_kv, -1, self.query.shape[-1])
        scale = 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale
        scores = (q * scale) @ self.key[:, :, :n_key].to(wide).transpose(-1, -2)
        scores = scores.reshape(batch, n_heads, end - first, n_key)
        if self.is_causal:
            at = torch.arange(first, end, device=scores.device)[:, None]
            later = torch.arange(first, n_key, device=scores.device) > at
            scores[..., first:].masked_fill_(later, -math.inf)
        if self.attn_mask is None:
            return scores
        mask = self.attn_mask.expand(*self.attn_mask.shape[:-2], self.shape[2], every)
        mask = mask[..., first:end, :n_key]
        if mask.dtype == torch.bool:
            return scores.masked_fill_(~mask, -math.inf)
        return scores.add_(mask.to(wide))

    def split(self, n: int) -> list[tuple[int, Fused]]:
        """Parts that n threads can share, each of one prompt or more, or of some of its heads.

        Each with the index of its first matrix, where a matrix is a (prompt, head).
        """
        batch, n_heads = self.shape[:2]
        n_kv = self.key.shape[1]
        group = n_heads // n_kv
        prompts = _edges(batch, n)
        heads = _edges(n_kv, math.ceil(n / len(prompts)))
        if len(heads) > 1:  # some heads of several prompts are no range of matrices
            prompts = _edges(batch, batch)
        return [
            (first * n_heads + low * group, self._some(first, end, low * group, high * group))
            for first, end in prompts
            for low, high in heads
        ]

    def _some(self, first: int, end: int, low: int, high: int) -> Fused:
        """Some prompts and query heads."""
        group = self.shape[1] // self.key.shape[1]
        mask = self.attn_mask
        if mask is not None:
            mask = mask[None] if mask.ndim == 3 else mask
            mask = mask[None, None] if mask.ndim == 2 else mask
            mask = mask if mask.shape[0] == 1 else mask[first:end]
            mask = mask if mask.shape[1] == 1 else mask[:, low:high]
        return replace(
            self,
            query=self.query[first:end, low:high],
            key=self.key[first:end, low // group : high // group],
            attn_mask=mask,
        )


def _edges(n: int, parts: int) -> list[tuple[int, int]]:
    """0 to n in at most so many ranges."""
    parts = min(n, parts)
    edges = [n * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Taken:
    """One attention as the model computed it.

    Attributes:
        made: the softmax's input, masked keys at -inf or the dtype's least number, and its result;
            None where the attention is fused and makes neither.
        fused: the arguments of a fused attention.
        q, k: the vectors whose dot product gave the scores, as they came, keys as shared among the
            query heads; None where no such product was seen.
        v, z: what the pattern averages, as it came, and the average; None where that was not seen,
            or is not finished.
    """

    made: tuple[Tensor, Tensor] | None
    fused: Fused | None = None
    q: Float[Tensor, "batch head query d_head"] | None = None
    k: Float[Tensor, "batch head key d_head"] | None = None
    v: Float[Tensor, "batch head key d_value"] | None = None
    z: Float[Tensor, "batch head query d_value"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores."""
        if self.fused is not None:
            return self.fused.shape
        return tuple(self.scores.shape)

    @property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """All scores; computed anew at each call where the attention is fused."""
        if self.fused is not None:
            return self.fused.scores(0, self.fused.shape[2])
        assert self.made is not None
        return self.made[0]

    @property
    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Their softmax."""
        return torch.softmax(self.scores, dim=-1) if self.made is None else self.made[1]

    def vectors(self, kv_leaders: list[int]) -> dict[Role, Float[Tensor, "batch pos head d"]]:
        """q, k and v as hooks would carry them: keys and values once for all that share them."""
        assert self.q is not None
        assert self.k is not None
        assert self.v is not None
        own = {"q": self.q, "k": self.k[:, kv_leaders], "v": self.v[:, kv_leaders]}
        return {role: own[role].transpose(1, 2) for role in ROLES}
