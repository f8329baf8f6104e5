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
_FUSED = functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Taken:
    """One attention as the model took it.

    Attributes:
        scores: what the softmax was taken of, masked keys at -inf or the dtype's least number.
        pattern: its result (recomputed for a fused attention, which keeps none).
    """

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]


class AttentionTap(TorchFunctionMode):
    """Keeps the operands of the latest softmax or fused attention of a forward pass.

    One layer's scores at a time: the next attention replaces them, and :meth:`take` lets go of
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.attentions = 0  # fused ones, and softmaxes with an axis for heads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _SOFTMAX:
            taken = args[0] if args else kwargs["input"]
            self.attentions += taken.ndim >= 4
            if taken.ndim >= 3:
                self._latest = lambda: (taken, out)
        elif func is _FUSED:
            self.attentions += 1
            self._latest = lambda: _of_fused(*args, **kwargs)
        return out

    def take(self, batch: int) -> Taken | None:
        """The latest attention, its axes told apart; None where nothing was taken."""
        if self._latest is None:
            return None
        scores, pattern = self._latest()
        self._latest = None
        if scores.ndim == 3 and scores.shape[0] % batch == 0:  # batch and heads in one axis
            scores, pattern = (x.unflatten(0, (batch, -1)) for x in (scores, pattern))
        elif scores.ndim == 5:  # key/value heads and the query heads of each
            scores, pattern = (x.flatten(1, 2) for x in (scores, pattern))
        return Taken(scores, pattern) if scores.ndim == 4 else None


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
