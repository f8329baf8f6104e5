"""Scores read where the model takes its softmax, for layers whose hooks do not show them.

Some bridges run Hugging Face's own attention: their scores hook carries the softmaxed pattern, or
nothing (sdpa). A `TorchFunctionMode` sees every torch function of a forward pass, and so the
softmax and the fused attention too: what goes into them are the model's scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAX: frozenset[Callable[..., Any]] = frozenset(
    {functional.softmax, torch.softmax, torch.Tensor.softmax}
)
_PRODUCT: frozenset[Callable[..., Any]] = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
)
_FUSED = functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Taken:
    """One attention as the model took it.

    Attributes:
        scores: what the softmax was taken of, masked keys at -inf or the dtype's least number.
        pattern: its result, or one made of the scores where the attention is ``fused`` and keeps
            none.
        q, k: the vectors whose dot product the scores came from, keys as they are shared among the
            query heads; None where no such product was seen.
    """

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    fused: bool = False
    q: Float[Tensor, "batch head query d_head"] | None = None
    k: Float[Tensor, "batch head key d_head"] | None = None


@dataclass(frozen=True)
class Factors:
    """What multiplies the next attention's queries and keys, the keys' by query head."""

    q: Float[Tensor, "batch query head"]
    k: Float[Tensor, "batch key head"]

    def fit(self, q: Tensor, k: Tensor) -> bool:
        """Whether these are the operands ``[batch, head, pos, d_head]`` that are meant."""
        (batch, n_query, n_heads), n_key = self.q.shape, self.k.shape[1]
        return q.shape[:3] == (batch, n_heads, n_query) and k.shape[:3] == (batch, n_heads, n_key)

    def scale(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both operands times their factors."""
        f_q, f_k = (f.transpose(1, 2)[..., None] for f in (self.q, self.k))
        return (q * f_q).to(q.dtype), (k * f_k).to(k.dtype)


class AttentionTap(TorchFunctionMode):
    """Keeps the operands of the latest softmax or fused attention of a forward pass.

    One layer's scores at a time: the next attention replaces them, and :meth:`take` lets go of
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._operands: tuple[Tensor, Tensor] | None = None  # of the latest attention
        self._product: tuple[Tensor, Tensor] | None = None  # of the latest product
        self._armed: Factors | None = None
        self._is_fused = False
        self.attentions = 0  # fused ones, and softmaxes with an axis for heads

    def arm(self, factors: Factors) -> None:
        """Multiply the queries and keys of the next attention, where no hook lies behind a norm."""
        self._armed = factors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCT:
            args = self._multiplied(args)
        elif func is _FUSED:
            args, kwargs = self._fused(args, kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX:
            taken = args[0] if args else kwargs["input"]
            self.attentions += taken.ndim >= 4
            if taken.ndim >= 3:
                self._latest, self._operands = (lambda: (taken, out)), self._product
                self._is_fused = False
        return out

    def _multiplied(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands of a product, remembered and, where it is the one meant, multiplied."""
        left, right = args[:2]
        if left.ndim != 4 or right.ndim != 4:
            return args
        q, k = left, right.transpose(-1, -2)
        self._product = (q, k)
        if self._armed is None or not self._armed.fit(q, k):
            return args
        factors, self._armed = self._armed, None
        left, k = factors.scale(q, k)
        return (left, k.transpose(-1, -2), *args[2:])

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a fused attention, its operands remembered and multiplied."""
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        if args[4:]:  # nobody gives the rest by position
            return args, kwargs
        self.attentions += 1
        q, k = given["query"], given["key"]
        group = q.shape[-3] // k.shape[-3]
        k = k if group == 1 else k.repeat_interleave(group, -3)
        self._operands = (q, k)
        if self._armed is not None and self._armed.fit(q, k):
            q, k = self._armed.scale(q, k)
            self._armed = None
            given |= {"query": q, "key": k, "value": given["value"].repeat_interleave(group, -3)}
        self._latest, self._is_fused = (lambda: _of_fused(**given)), True
        return (), given

    def take(self, batch: int) -> Taken | None:
        """The latest attention, its axes told apart; None where nothing was taken."""
        if self._latest is None:
            return None
        scores, pattern = self._latest()
        operands, self._latest, self._operands = self._operands, None, None
        if scores.ndim == 3 and scores.shape[0] % batch == 0:  # batch and heads in one axis
            scores, pattern = (x.unflatten(0, (batch, -1)) for x in (scores, pattern))
        elif scores.ndim == 5:  # key/value heads and the query heads of each
            scores, pattern = (x.flatten(1, 2) for x in (scores, pattern))
        if scores.ndim != 4:
            return None
        if operands is None or (*operands[0].shape[:3], operands[1].shape[2]) != scores.shape:
            return Taken(scores, pattern, self._is_fused)
        return Taken(scores, pattern, self._is_fused, *operands)


def _of_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scores and pattern of `scaled_dot_product_attention`, as its documentation defines them."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(wide)
    return scores, torch.softmax(scores, dim=-1)
