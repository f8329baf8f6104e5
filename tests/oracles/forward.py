"""What a model's own forward pass shows, in plain Hugging Face and PyTorch.

Nothing here imports from `hooks` or TransformerLens. A pass of the model, on eager attention and
best in float64, is watched as the stream of its torch calls: the last product of queries and keys
before a softmax over keys is an attention's, and the product behind it averages the values. Where
an experiment edits them (noise, a user's own hook), the edit is made on the operands there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.oracles import shifts as reference

HIDDEN = reference.HIDDEN
Edits = Mapping[int, Mapping[str, Callable[[Tensor], Tensor]]]
"""By attention, in order of the pass: what becomes of its "q", "k", "v", "pattern" or "z"."""

_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")


@dataclass(frozen=True)
class Attention:
    """One attention of a batch, [batch, head, query, key], float64.

    ``w`` is what the softmax is taken of; ``product`` the dot product, unscaled; ``pattern`` sums
    below one where a sink takes a share; ``k`` and ``v`` are repeated for the query heads.
    """

    w: Tensor
    product: Tensor
    pattern: Tensor
    k: Tensor


@dataclass(frozen=True)
class Pass:
    """A forward pass: its attentions, logits and each block's input."""

    attentions: tuple[Attention, ...]
    logits: Tensor
    streams: tuple[Tensor, ...]


def run(hf: Any, inputs: Mapping[str, Any], *, n_heads: int, edits: Edits | None = None) -> Pass:
    """One pass of a model in eval mode, on eager attention."""
    streams: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in blocks(hf)]
    tap = _Tap(n_heads, edits or {})
    try:
        with torch.no_grad(), tap:
            out = hf(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = out if isinstance(out, Tensor) else out.logits
    return Pass(tuple(tap.seen), logits.double(), tuple(x.double() for x in streams))


def blocks(hf: Any) -> list[Any]:
    """Blocks in the order of the pass: those of every list of layers."""
    names = ("h", "layers", "layer", "block")
    return [
        block
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.split(".")[-1] in names
        # T5 keeps the parts of a block in a list of that name too.
        and "block." not in name
        for block in module
    ]


class _Tap(TorchFunctionMode):
    def __init__(self, n_heads: int, edits: Edits) -> None:
        super().__init__()
        self.n_heads, self.edits = n_heads, edits
        self.seen: list[Attention] = []
        self._product: tuple[Tensor, Tensor] | None = None  # q.k, k
        self._pattern: Tensor | None = None  # of an attention that has not averaged yet

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("grouped_mm", "_grouped_mm"):
            return reference.grouped_mm(*args, **named)
        if name in _PRODUCTS:
            return self._multiply(func, list(args), named)
        if name != "softmax":
            return func(*args, **named)
        x = args[0] if args else named["input"]
        if x.dtype == torch.float64:  # many models take theirs in float32, which has no room ...
            named.pop("dtype", None)  # ... for the least float64, a mask: rows of padding are NaN
        self._softmax(x)
        return func(*args, **named)

    def _multiply(self, func: Any, args: list[Any], named: dict[str, Any]) -> Tensor:
        first = int(func.__name__ == "baddbmm")
        places: list[tuple[Any, Any]] = [
            (args, first + i) if len(args) > first + i else (named, name)
            for i, name in enumerate(("batch1", "batch2") if first else ("input", "mat2"))
        ]
        if any(isinstance(where, dict) and key not in where for where, key in places):
            return func(*args, **named)  # type: ignore[no-any-return]
        # Batch and heads lie in one axis in BLOOM's products alone (experts look like that too).
        three = bool(first) or (func.__name__ == "bmm" and self._pattern is not None)
        left, right = (self._four(where[key], three) for where, key in places)
        if left is None or right is None:
            return func(*args, **named)  # type: ignore[no-any-return]
        averaging = self._pattern is not None and left.shape == self._pattern.shape
        if averaging:
            left, right = self._edit("pattern", left), self._edit("v", right)
            if "pattern" in self.edits.get(len(self.seen) - 1, {}):
                self.seen[-1] = replace(self.seen[-1], pattern=left.double())
        else:
            left, right = self._edit("q", left), self._edit("k", right.mT).mT
        for (where, key), x in zip(places, (left, right), strict=True):
            where[key] = x.reshape(where[key].shape)
        out: Tensor = func(*args, **named)
        if averaging:
            edited = self._edit("z", out.reshape(*left.shape[:-1], right.shape[-1]))
            self._pattern = self._product = None
            return edited.reshape(out.shape)
        self._product = (left.double() @ right.double(), right.mT.double())
        return out

    def _edit(self, what: str, x: Tensor) -> Tensor:
        at = len(self.seen) - (self._pattern is not None)
        edit = self.edits.get(at, {}).get(what)
        return x if edit is None else edit(x).to(x.dtype)

    def _softmax(self, x: Tensor) -> None:
        if self._product is None or x.ndim != 4:
            return
        product, k = self._product
        n_key = product.shape[-1]
        if x.shape[:3] != product.shape[:3] or x.shape[-1] not in (n_key, n_key + 1):
            return
        wide = x.double()
        pattern = wide.softmax(-1)[..., :n_key]
        self.seen.append(Attention(wide[..., :n_key], product, pattern, k))
        self._pattern = pattern

    def _four(self, x: Tensor, three: bool) -> Tensor | None:
        """[batch, head, ...] of an operand; None where it has no heads."""
        if x.ndim == 4 and x.shape[1] == self.n_heads:
            return x
        return x.unflatten(0, (-1, self.n_heads)) if x.ndim == 3 and three else None


# --- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of one attention for one prompt, without padding: arrays [head, query, key].

    ``s`` is the q.k part of the scores, ``bias`` what is added to it (None: nothing), ``cap`` their
    soft cap; ``near`` is how far a score of the model's own dtype may lie from these.
    """

    s: np.ndarray
    bias: np.ndarray | None
    pattern: np.ndarray
    visible: np.ndarray
    cap: float | None
    near: float

    def softmax(self, s: np.ndarray) -> np.ndarray:
        """Weights with other q.k parts; a sink takes its share as in the clean rows."""
        clean, other = self._scores(self.s), self._scores(s)
        with np.errstate(divide="ignore"):
            seen = self.pattern.sum(-1, keepdims=True)
            sink = np.log(np.maximum(1 - seen, 0)) - np.log(seen) + _log_sum(clean)
        sink = np.where(seen > 1 - 1e-12, -np.inf, sink)
        out: np.ndarray = np.exp(other - np.logaddexp(_log_sum(other), sink))
        return out

    def _scores(self, s: np.ndarray) -> np.ndarray:
        total = s if self.bias is None else s + self.bias
        total = self.cap * np.tanh(total / self.cap) if self.cap else total
        return np.where(self.visible, total, -np.inf)

    @property
    def star(self) -> np.ndarray:
        total = self.s if self.bias is None else self.s + self.bias
        return np.where(self.visible, total, -np.inf).argmax(-1)

    def sparse(self, threshold: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Rows that are sparse for certain, and perhaps: scores off by d move odds by exp(2 d)."""
        top = self.pattern.max(-1)
        with np.errstate(divide="ignore"):
            odds = np.log(top) - np.log1p(-np.minimum(top, 1 - 1e-16))
        bar = math.log(threshold / (1 - threshold))
        two = self.visible.sum(-1) >= 2
        slack = 2 * self.near + 1e-6
        return two & (odds >= bar + slack), two & (odds >= bar - slack)


def unpacked(
    attention: Attention,
    prompt: int,
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    scale: float | None,
    biased: bool,
    cap: float | None,
    near: float,
) -> Rows:
    """Rows of real tokens.

    Args:
        attention: of a batch.
        prompt: its index in the batch.
        queries, keys: real positions.
        scale: of the dot product; None: the scores are the q.k part.
        biased: whether what the scores have beyond it is a bias.
        cap: soft cap of the scores.
        near: as in `Rows`.
    """

    def part(x: Tensor) -> np.ndarray:
        return x[prompt][:, list(queries)][:, :, list(keys)].numpy()

    w, pattern = part(attention.w), part(attention.pattern)
    visible = w > HIDDEN
    s, bias = w, None
    if cap:
        s = cap * np.arctanh(np.clip(w / cap, -1 + 1e-16, 1 - 1e-16))
    if scale is not None:
        s = part(attention.product) * scale
        bias = w - s if biased else None
    return Rows(s, bias, pattern, visible, cap, near)


def _log_sum(w: np.ndarray) -> np.ndarray:
    top = w.max(-1, keepdims=True)
    out: np.ndarray = np.log(np.exp(w - top).sum(-1, keepdims=True)) + top
    return out


# --- the probability that a row collapses, under uniform noise ----------------------------------


def collapse(
    s_star: np.ndarray,
    s: np.ndarray,
    beta: np.ndarray | None,
    sigma: float,
    *,
    on_q: bool = True,
    on_k: bool = True,
) -> np.ndarray:
    """P(some t: f_q (f_t s_t - f_* s_*) > beta_t) of each row, factors uniform on 1 -+ a.

    Args:
        s_star: [row].
        s: [row, competitor], -inf where there is none.
        beta: [row, competitor]; None for 0.
        sigma: a = sqrt(3) sigma, below 1.
        on_q, on_k: which are noised.
    """
    a = math.sqrt(3) * sigma
    assert a < 1
    if beta is None:
        if not on_k:
            return np.zeros(len(s_star))
        return _given_q(s_star, s, np.zeros_like(s), a)
    if not on_q:
        return _given_q(s_star, s, beta, a)
    if not on_k:
        # f (s_t - s_*) > beta_t holds above or below a factor: exactly, too.
        with np.errstate(divide="ignore", invalid="ignore"):
            turn = beta / (s - s_star[:, None])
        above = np.where(s > s_star[:, None], turn, np.inf).min(1)
        below = np.where(np.isfinite(s) & (s < s_star[:, None]), turn, -np.inf).max(1)
        stays = np.clip(above, 1 - a, 1 + a) - np.clip(below, 1 - a, 1 + a)
        left: np.ndarray = 1 - np.maximum(stays, 0) / (2 * a)
        return left
    x, weights = np.polynomial.legendre.leggauss(40)
    each = [_given_q(s_star, s, beta / (1 + a * q), a) for q in x]
    total: np.ndarray = np.tensordot(weights / 2, np.array(each), 1)
    return total


def _given_q(s_star: np.ndarray, s: np.ndarray, beta: np.ndarray, a: float) -> np.ndarray:
    """1 - E over f_* of prod_t P(f_t s_t <= f_* s_* + beta_t), exactly.

    Between the points where a competitor's distribution function has a corner the integrand is a
    polynomial of degree at most the number of competitors: one Gauss-Legendre rule is exact.
    """
    out = np.empty(len(s_star))
    step = max(1, 200_000 // (2 * s.shape[1] ** 2 * (s.shape[1] // 2 + 1) + 1))
    for at in range(0, len(s_star), step):
        rows = slice(at, at + step)
        out[rows] = _some(s_star[rows], s[rows], beta[rows], a)
    return out


def _some(s_star: np.ndarray, s: np.ndarray, beta: np.ndarray, a: float) -> np.ndarray:
    none = ~np.isfinite(s)
    s, beta = np.where(none, 0.0, s), np.where(none, 1.0, beta)
    star = np.where(s_star == 0, 1e-300, s_star)[:, None]
    corners = [((1 + sign * a) * s - beta) / star for sign in (-1, 1)]
    edges = np.concatenate([np.full_like(star, 1 - a), np.full_like(star, 1 + a), *corners], 1)
    edges = np.sort(np.clip(edges, 1 - a, 1 + a), 1)
    x, weights = np.polynomial.legendre.leggauss(s.shape[1] // 2 + 1)
    half, centre = np.diff(edges)[..., None] / 2, (edges[:, 1:] + edges[:, :-1])[..., None] / 2
    f_star = centre + half * x  # [row, piece, node]
    bound = f_star[..., None] * star[:, None, None] + beta[:, None, None]
    t = s[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.clip((bound / t - 1 + a) / (2 * a), 0, 1)
    stays = np.where(t > 0, below, np.where(t < 0, 1 - below, bound >= 0))
    stays = np.where(none[:, None, None], 1.0, stays).prod(-1)
    total: np.ndarray = 1 - (stays * weights * half).sum((1, 2)) / (2 * a)
    return total


def collapse_bounds(
    rows: Rows, chosen: tuple[np.ndarray, ...], sigma: float, *, on: str
) -> tuple[np.ndarray, np.ndarray]:
    """The probability of these rows, least and most, where each score may be off by ``near``.

    It falls with s_* and beta and rises with every s_t.
    """
    s, star = rows.s[chosen], rows.star[chosen]
    at = np.arange(len(star))
    own = s[at, star]
    others = np.where(rows.visible[chosen], s, -np.inf)
    others[at, star] = -np.inf
    beta = None
    if rows.bias is not None:
        bias = rows.bias[chosen]
        beta = np.where(np.isfinite(others), bias[at, star][:, None] - bias, 0.0)
    options = {"on_q": "q" in on, "on_k": "k" in on}
    d = rows.near
    low = collapse(own + d, others - d, beta, sigma, **options)
    high = collapse(own - d, others + d, beta, sigma, **options)
    return low, high
