"""Scores read where the model takes its softmax, for layers whose hooks do not show them.

Some bridges run Hugging Face's own attention: their scores hook carries the softmaxed pattern, or
nothing (sdpa). A `TorchFunctionMode` sees every torch function of a forward pass, and so the
softmax and the fused attention too: what goes into them are the model's scores. A fused attention
never makes its scores; they are made here, as many queries at a time as are asked for.
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

        ``n_key``: of so many keys only (what comes later may be known to be masked).
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
            later = torch.arange(n_key, device=scores.device) > at
            scores.masked_fill_(later, -math.inf)
        if self.attn_mask is None:
            return scores
        mask = self.attn_mask.expand(*self.attn_mask.shape[:-2], self.shape[2], every)
        mask = mask[..., first:end, :n_key]
        if mask.dtype == torch.bool:
            return scores.masked_fill_(~mask, -math.inf)
        return scores.add_(mask.to(wide))


@dataclass(frozen=True)
class Taken:
    """One attention as the model took it.

    Attributes:
        made: what the softmax was taken of, masked keys at -inf or the dtype's least number, and
            its result; None where the attention is fused and makes neither.
        fused: the arguments of a fused attention.
        q, k: the vectors whose dot product the scores came from, keys as they are shared among the
            query heads; None where no such product was seen.
    """

    made: tuple[Tensor, Tensor] | None
    fused: Fused | None = None
    q: Float[Tensor, "batch head query d_head"] | None = None
    k: Float[Tensor, "batch head key d_head"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores."""
        if self.fused is not None:
            return self.fused.shape
        return tuple(self.scores.shape)

    @property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """All scores; made anew at each call where the attention is fused."""
        if self.fused is not None:
            return self.fused.scores(0, self.fused.shape[2])
        assert self.made is not None
        return self.made[0]

    @property
    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Their softmax."""
        return torch.softmax(self.scores, dim=-1) if self.made is None else self.made[1]


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
        self._latest: tuple[Tensor, Tensor] | Fused | None = None
        self._operands: tuple[Tensor, Tensor] | None = None  # of the latest attention
        self._product: tuple[Tensor, Tensor] | None = None  # of the latest product
        self._armed: Factors | None = None
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
                self._latest, self._operands = (taken, out), self._product
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
        self._latest = Fused(
            given["query"],
            given["key"],
            given.get("attn_mask"),
            given.get("is_causal", False),
            given.get("scale"),
        )
        return (), given

    def take(self, batch: int) -> Taken | None:
        """The latest attention, its axes told apart; None where nothing was taken."""
        if self._latest is None:
            return None
        latest, operands = self._latest, self._operands
        self._latest, self._operands = None, None
        if isinstance(latest, Fused):
            if latest.query.ndim != 4 or operands is None:
                return None
            return Taken(None, latest, *operands)
        scores, pattern = latest
        if scores.ndim == 3 and scores.shape[0] % batch == 0:  # batch and heads in one axis
            scores, pattern = (x.unflatten(0, (batch, -1)) for x in (scores, pattern))
        elif scores.ndim == 5:  # key/value heads and the query heads of each
            scores, pattern = (x.flatten(1, 2) for x in (scores, pattern))
        if scores.ndim != 4:
            return None
        if operands is None or (*operands[0].shape[:3], operands[1].shape[2]) != scores.shape:
            return Taken((scores, pattern))
        return Taken((scores, pattern), None, *operands)
