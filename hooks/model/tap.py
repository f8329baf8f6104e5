"""Reads and writes attention where the model computes it, for layers whose hooks do not show it.

Some bridges run Hugging Face's own attention: their scores hook carries the softmaxed pattern, or
nothing (sdpa); some have no hook in their attention at all. A `TorchFunctionMode` sees every torch
function of a forward pass: the product of queries and keys, the softmax, its product with the
values, and the fused attention that does all three.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hooks.model.protocol import Anchor, Role, Watched
from hooks.model.taken import Fused, Taken

__all__ = ["AttentionTap", "Factors", "Fused", "Taken"]

_FUSED = functional.scaled_dot_product_attention
_KINDS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((functional.softmax, torch.softmax, torch.Tensor.softmax), "softmax"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), "product"),
    **dict.fromkeys((torch.sub, torch.Tensor.sub, torch.Tensor.__sub__), "difference"),
    _FUSED: "fused",
}

Factors = Callable[[Role, int], Float[Tensor, "batch pos head"] | None]
"""What multiplies a role's vectors, by query head, given how many there are; None for nothing."""
Show = Callable[[Taken], None]


class _Open(threading.local):
    """The taps that are open in this thread, the outermost first."""

    def __init__(self) -> None:
        self.taps: list[AttentionTap] = []


_open = _Open()


@dataclass
class _Product:
    """A product that may enter the softmax: of queries and keys, as they came."""

    q: Float[Tensor, "#batch #head query d_head"]
    k: Float[Tensor, "#batch #head key d_head"]
    written: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores."""
        batch, heads = torch.broadcast_shapes(self.q.shape[:2], self.k.shape[:2])
        return (batch, heads, self.q.shape[2], self.k.shape[2])


@dataclass
class _Expected:
    """The attention of the layer whose anchor the pass has last passed."""

    sites: Watched
    anchor: Anchor
    batch: int
    n_query: int
    factors: Factors | None
    show: Show | None
    fitting: int = 0
    written: bool = False

    def fits(self, q: Tensor, k: Tensor) -> bool:
        """Whether these are operands ``[batch, head, pos, d_head]`` of the expected shape."""
        wanted = (self.batch, self.sites.n_heads, self.n_query, self.anchor.d_head)
        return tuple(q.shape) == wanted and k.shape[1] in (1, self.sites.n_heads)

    def unwritten(self, product: _Product) -> bool:
        """Whether this product should have been multiplied by factors, but was not."""
        if self.factors is None or product.written:
            return False
        return self.fits(product.q, product.k)

    def scaled(self, role: Role, vectors: Tensor) -> Tensor:
        """Vectors ``[batch, head, pos, d]`` times their factors."""
        factor = None if self.factors is None else self.factors(role, vectors.shape[2])
        if factor is None:
            return vectors
        wide = torch.promote_types(vectors.dtype, factor.dtype)
        by = factor.to(vectors.device, wide).transpose(1, 2)[..., None]
        return (vectors.to(wide) * by).to(vectors.dtype)

    def error(self, what: str) -> RuntimeError:
        """The error for a model that does not do what the self-check saw."""
        return RuntimeError(
            f"layer {self.sites.layer}: wanted the attention that the self-check saw after "
            f"{self.anchor.hook}; got {what}"
        )


class AttentionTap(TorchFunctionMode):
    """Keeps the operands of the latest attention of a forward pass, or waits for a layer's.

    One layer at a time: the next attention replaces the latest, and :meth:`take` frees it. Taps may
    be nested: the inner sees what the outer writes.

    Args:
        on_attention: called with each attention once its average of values exists.
        on_softmax: called with the shape of each softmax of four or more axes that belongs to no
            such attention.
    """

    def __init__(
        self,
        on_attention: Show | None = None,
        on_softmax: Callable[[tuple[int, ...]], None] | None = None,
    ) -> None:
        super().__init__()
        self.on_attention = on_attention
        self.on_softmax = on_softmax
        self.needed = False  # whether a hook of ours waits for it
        self.products: list[tuple[int, ...]] = []  # shapes of scores and width, where asked for
        self._latest: Taken | None = None
        self._product: _Product | None = None  # the latest
        self._difference: tuple[Tensor, Tensor] | None = None  # and what a number was taken from
        self._pending: Taken | None = None  # an attention whose values are still to come
        self._expected: _Expected | None = None

    def __enter__(self) -> AttentionTap:
        _open.taps.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _open.taps.remove(self)
        if error[0] is None:
            self.finish()
        self._expected = None

    @contextmanager
    def of_passes(self, module: nn.Module | None) -> Iterator[None]:
        """Inside, the tap is open, and restarts at each call of ``module``."""
        handles: list[Any] = []
        if module is not None:
            handles.append(module.register_forward_pre_hook(lambda *_: self.reset()))
            handles.append(module.register_forward_hook(lambda *_: self.finish()))
        try:
            with self:
                yield
                if module is not None:  # an aborted pass is the user's business
                    self.reset()
        finally:
            self.reset()
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """End a pass.

        Raises:
            RuntimeError: the attention of the last layer was not seen.
        """
        expected, self._expected = self._expected, None
        if expected is not None:
            raise expected.error("none")

    def reset(self) -> None:
        """Forget what an aborted pass left."""
        self._expected = self._pending = self._latest = None
        self._product = self._difference = None

    def expect(
        self,
        sites: Watched,
        entering: Tensor,
        *,
        factors: Factors | None = None,
        show: Show | None = None,
    ) -> None:
        """The next attention is this layer's: multiply its operands, and report it at its end.

        Called at the layer's anchor, with the anchor's input ``[batch, pos, ...]``.

        Raises:
            RuntimeError: the previous layer was not seen, or this thread is not the tap's.
        """
        if self not in _open.taps:
            raise RuntimeError(
                "wanted a forward pass in the thread that opened the noise's context; got another"
            )
        if self._expected is not None:
            raise self._expected.error("none")
        batch, n_query = entering.shape[:2]
        self._product = self._pending = None
        assert sites.anchor is not None
        self._expected = _Expected(sites, sites.anchor, batch, n_query, factors, show)

    def take(self, batch: int) -> Taken | None:
        """The latest attention, with its axes identified; None where there was none."""
        latest, self._latest = self._latest, None
        if latest is None or latest.fused is not None:
            return latest
        assert latest.made is not None
        scores, pattern = latest.made
        if scores.ndim == 3 and scores.shape[0] % batch == 0:  # batch and heads in one axis
            scores, pattern = (x.unflatten(0, (batch, -1)) for x in (scores, pattern))
        elif scores.ndim == 5:  # key/value heads and the query heads of each
            scores, pattern = (x.flatten(1, 2) for x in (scores, pattern))
        return replace(latest, made=(scores, pattern)) if scores.ndim == 4 else None

    # -- what the model calls ---------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or not _open.taps or _open.taps[-1] is not self:
            return func(*args, **kwargs)  # the innermost tap does it for all
        if kind == "fused":
            return _take_fused(_open.taps, args, kwargs)
        if kind == "product" and len(args) > 1:
            for tap in _open.taps:
                args = tap._multiplied(args)
        out = func(*args, **kwargs)
        for tap in _open.taps:
            if kind == "softmax":
                tap._softmaxed(args, kwargs, out)
            elif kind == "difference":
                tap._subtracted(args, out)
            else:
                tap._averaged(out)
        return out

    def _multiplied(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Remembers the operands of a product and, where they are expected, multiplies them."""
        left, right = args[:2]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return args
        if left.ndim != 4 or right.ndim != 4:
            return args
        if self._pending is not None and _averages(self._pending, left, right):
            v = _of_each_head(right, left.shape[1])
            self._pending = replace(self._pending, v=v)
            expected = self._expected
            return (left, right if expected is None else expected.scaled("v", right), *args[2:])
        self._pending = None
        q, k = left, right.transpose(-1, -2)
        self._product = product = _Product(q, k)
        if self.on_attention is not None:
            self.products.append((*product.shape, q.shape[-1]))
        expected = self._expected
        if expected is None or not expected.fits(q, k):
            return args
        expected.fitting += 1
        if expected.factors is None or expected.fitting != expected.anchor.product:
            return args
        product.written = expected.written = True
        return (expected.scaled("q", left), expected.scaled("k", k).transpose(-1, -2), *args[2:])

    def _subtracted(self, args: tuple[Any, ...], out: Any) -> None:
        """Remembers a subtraction of one number from a whole row, which no softmax sees."""
        if len(args) < 2 or not isinstance(args[1], Tensor) or not isinstance(args[0], Tensor):
            return
        if args[0].ndim == 4 and args[1].ndim == 4 and args[1].shape[-1] == 1:
            self._difference = (args[0], out)

    def _softmaxed(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A softmax over the last axis: an attention's, if its scores came from a product."""
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        difference, self._difference = self._difference, None
        if scores.ndim < 3 or dim not in (-1, scores.ndim - 1):
            return
        if difference is not None and difference[1] is scores:
            scores = difference[0]
        product, pattern = self._product, out
        if product is None or not _of_shape(product, scores):
            self._latest = Taken((scores, out))
            if scores.ndim >= 4 and self.on_softmax is not None:
                self.on_softmax(tuple(scores.shape))
            return
        n_key = product.k.shape[2]  # a sink's score may follow them
        if scores.shape[-1] > n_key:
            scores, pattern = scores[..., :n_key], pattern[..., :n_key]
        expected, self._product = self._expected, None
        if expected is not None and expected.unwritten(product):
            raise expected.error("another product before its softmax")
        q, k = (_of_each_head(x, product.shape[1]) for x in (product.q, product.k))
        self._pending = self._latest = Taken((scores, pattern), None, q, k)

    def _averaged(self, z: Tensor) -> None:
        """The product of a pattern and its values ends an attention."""
        if self._pending is None or self._pending.v is None:
            return
        taken, self._pending = replace(self._pending, z=z), None
        self._show(taken)

    def _show(self, taken: Taken) -> None:
        expected = self._expected
        if expected is not None:
            if taken.q is None or taken.k is None or not expected.fits(taken.q, taken.k):
                return
            if expected.factors is not None and not expected.written:
                raise expected.error("one that was not written")
            self._expected = self._latest = None
            if expected.show is not None:
                expected.show(taken)
        if self.on_attention is not None:
            self.on_attention(taken)


def _take_fused(taps: list[AttentionTap], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A fused attention, its operands multiplied and remembered by each tap."""
    given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
    if args[4:] or given["query"].ndim != 4:  # nobody gives the rest by position
        return _FUSED(*args, **kwargs)
    seen = []
    for tap in taps:
        q, k, v = given["query"], given["key"], given["value"]
        group = q.shape[-3] // k.shape[-3]
        if group > 1:
            k, v = (x.repeat_interleave(group, -3) for x in (k, v))
        expected = tap._expected
        if expected is not None and expected.factors is not None and expected.fits(q, k):
            vectors: tuple[tuple[str, Role, Tensor], ...] = (
                ("query", "q", q), ("key", "k", k), ("value", "v", v)
            )  # fmt: skip
            given |= {name: expected.scaled(role, x) for name, role, x in vectors}
            expected.written = True
        seen.append((q, k, v))
    z = _FUSED(**given)
    mask, causal, scale = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")
    fused = Fused(given["query"], given["key"], mask, causal, scale)
    for tap, (q, k, v) in zip(taps, seen, strict=True):
        tap._pending = None
        tap._latest = taken = Taken(None, fused, q, k, v, z)
        tap._show(taken)
    return z


def _of_shape(product: _Product, scores: Tensor) -> bool:
    """Whether scores may come from this product, with or without a sink's score beside them."""
    *rows, n_key = product.shape
    return tuple(scores.shape[:-1]) == tuple(rows) and scores.shape[-1] in (n_key, n_key + 1)


def _averages(taken: Taken, left: Tensor, right: Tensor) -> bool:
    """Whether this product is the pattern's average of values."""
    rows = taken.shape
    return tuple(left.shape) == tuple(rows) and right.shape[-2] == rows[-1]


def _of_each_head(vectors: Tensor, n_heads: int) -> Tensor:
    """One for each query head, where all share one."""
    if vectors.shape[1] == n_heads:
        return vectors
    return vectors.expand(-1, n_heads, -1, -1)
