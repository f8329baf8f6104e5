"""Arg max shifts under norm noise, recomputed on the model as its authors wrote it.

    inputs = built.inputs(pos=13)
    calls = attentions(hf, inputs)                     # hf = build_hf(..., dtype=torch.float64)
    noisy = noised(hf, inputs, [(q, k) for ...])       # a pair of factors for each call
    for call, pattern in zip(calls, noisy, strict=True):
        moved = sparse_rows(call) & (pattern.argmax(-1) != call.pattern.argmax(-1))

Nothing here knows an architecture, TransformerLens or `hooks`. A forward pass is watched as the
stream of its torch calls: a softmax over keys is an attention, and the last batched product
before it with an output of the same shape is where its queries meet its keys. The noise goes onto
the operands of that product. Each attention is noised in a copy of the prompt of its own, so that
one pass shows them all on clean inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Factors = tuple[Tensor | None, Tensor | None]

# Masks are -inf, finfo.min, -1e10 and, in the first GPT, -1e4. No score comes near that, and
# "pattern > 0" would not do: far behind the maximum a visible key's probability is 0 as well.
HIDDEN = -9e3


@dataclass(frozen=True)
class AttentionCall:
    """One attention of a forward pass, as it is without noise.

    Args:
        pattern: float64, [head, query, key], normalised over a sink too where there is one.
        visible: which keys the mask leaves, [head, query, key].
        kv_head: the key/value head of each query head, found by comparing keys.
        ordinal: which product of the right shape since the attention before is the scores'.
    """

    pattern: Tensor
    visible: Tensor
    kv_head: Tensor
    ordinal: int

    @property
    def n_heads(self) -> int:
        return self.pattern.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return int(self.kv_head.max()) + 1

    @property
    def n_query(self) -> int:
        return self.pattern.shape[1]

    @property
    def n_key(self) -> int:
        return self.pattern.shape[2]


def attentions(hf: Any, inputs: Inputs) -> list[AttentionCall]:
    """Every attention over a whole prompt, in order of the forward pass; of prompt 0 only."""
    watch = _Watch(2)  # one prompt's scores can have the shape of a product over all tokens
    _run(hf, inputs, watch)
    return [
        AttentionCall(seen.pattern()[0], seen.scores[0] > HIDDEN, seen.kv_head(), seen.ordinal)
        for seen in watch.seen
    ]


def noised(
    hf: Any,
    inputs: Inputs,
    factors: Sequence[Factors],
    calls: Sequence[AttentionCall] | None = None,
) -> list[Tensor]:
    """The pattern of each attention, [head, query, key], with its own noise and no other's.

    Args:
        hf: the model, best in float64.
        inputs: its arguments; only the first prompt counts.
        factors: for each attention what multiplies its queries, [query, head], and its keys,
            [key, kv_head]; None leaves them.
        calls: what `attentions` found for these inputs, to save its pass.

    Raises:
        AssertionError: noise on one prompt was seen in another, or on another's layers: then the
            tensors do not lie as assumed.
    """
    calls = attentions(hf, inputs) if calls is None else calls
    if len(factors) != len(calls):
        raise ValueError(f"factors: {len(factors)} pairs for {len(calls)} attentions")
    watch = _Watch(len(calls) + 1, calls, factors)
    _run(hf, inputs, watch)
    assert [seen.ordinal for seen in watch.seen] == [call.ordinal for call in calls]
    patterns = [seen.pattern() for seen in watch.seen]
    for i, (call, pattern) in enumerate(zip(calls, patterns, strict=True)):
        untouched = torch.cat([pattern[:1], pattern[i + 2 :]])  # copy j is noised in call j - 1
        # Routers and rotary embeddings in float32 leave up to 1e-6 between copies.
        torch.testing.assert_close(untouched, call.pattern.expand_as(untouched), rtol=0, atol=1e-4)
    return [pattern[i + 1] for i, pattern in enumerate(patterns)]


def sparse_rows(clean: AttentionCall, sparse: float = 0.95) -> Tensor:
    """The rows that can collapse, [head, query]: two visible keys and a large maximum."""
    return (clean.visible.sum(-1) >= 2) & (clean.pattern.amax(-1) >= sparse)


# --- the forward pass ------------------------------------------------------------------------


def _run(hf: Any, inputs: Inputs, watch: _Watch) -> None:
    dtype = next(hf.parameters()).dtype

    def copies(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x[:1].repeat(watch.copies, *[1] * (x.ndim - 1))
        return x.to(dtype) if x.is_floating_point() else x

    args, kwargs = inputs
    with torch.no_grad(), default_dtype(dtype), watch:
        hf(*map(copies, args), **{name: copies(x) for name, x in kwargs.items()})


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """XGLM puts float64's least number into a tensor of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class _Seen:
    """An attention in the pass: the softmax's input, [copy, head, query, key (and sink)]."""

    logits: Tensor
    keys: Tensor  # [head, key, d] of copy 0
    ordinal: int

    @property
    def scores(self) -> Tensor:
        return self.logits[..., : self.keys.shape[-2]]

    def pattern(self) -> Tensor:
        """Softmax in float64, though most models take theirs in float32; a sink is dropped."""
        return self.logits.softmax(-1)[..., : self.keys.shape[-2]]

    def kv_head(self) -> Tensor:
        """Heads with the same keys share them: some families repeat, others tile."""
        same = (self.keys[:, None] == self.keys[None]).flatten(2).all(-1)
        first = same.int().argmax(-1)
        leaders: Tensor = first.unique()
        return (first[:, None] > leaders).sum(-1)


class _Watch(TorchFunctionMode):
    """Finds the attentions of a pass over identical prompts; noises attention i of copy i + 1."""

    def __init__(
        self,
        copies: int,
        calls: Sequence[AttentionCall] = (),
        factors: Sequence[Factors] = (),
    ) -> None:
        super().__init__()
        self.copies, self.calls, self.factors = copies, calls, factors
        self.seen: list[_Seen] = []
        self.products: list[tuple[torch.Size, Callable[[], Tensor]]] = []  # since the last
        self.fitting = 0  # of them, those with the shape of the next attention's scores

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Torch calls made in here are not watched, so a composite call counts once."""
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in _OPERANDS:
            return self._matmul(func, list(args), named)
        if name == "einsum":
            return self._einsum(args[0], args[1:])
        if name == "softmax":
            given = args[1] if len(args) > 1 else named.get("dim")
            self._softmax(args[0] if args else named["input"], given)
        elif name == "scaled_dot_product_attention":
            return self._sdpa(*args, **named)
        elif name in ("grouped_mm", "_grouped_mm"):
            return grouped_mm(*args, **named)
        return func(*args, **named)

    # --- products: which, and the noise on their operands

    def _matmul(self, func: Any, args: list[Any], named: dict[str, Any]) -> Tensor:
        """Queries left, keys transposed right; what baddbmm adds gets no noise."""
        first, names = _OPERANDS[func.__name__]
        at: list[tuple[Any, Any]] = [
            (args, first + i) if len(args) > first + i else (named, operand)
            for i, operand in enumerate(names)
        ]
        left, right = (where[key] for where, key in at)
        out: Tensor = func(*args, **named)
        if min(left.ndim, right.ndim) < 3:
            return out
        left, right = (x.expand(*out.shape[:-2], *x.shape[-2:]) for x in (left, right))
        found = self._factors(out, lambda: right.mT)
        if found is None:
            return out
        for (where, key), x, by in zip(
            at, (left, right), (found[0][..., None], found[1][..., None, :]), strict=True
        ):
            where[key] = x * by.to(x.dtype)
        noisy: Tensor = func(*args, **named)
        return noisy

    def _einsum(self, equation: str, operands: Any) -> Tensor:
        """The output's last two letters are query and key; the rest are batch and heads."""
        operands = operands[0] if isinstance(operands[0], (tuple, list)) else operands
        out = torch.einsum(equation, *operands)
        into, _, result = equation.replace(" ", "").partition("->")
        terms = into.split(",")
        if len(operands) != 2 or out.ndim < 3 or len(result.replace("...", "")) < 2:
            return out
        sides = list(zip(terms, operands, strict=True))
        query, key = result[-2], result[-1]
        if query in terms[1]:
            sides.reverse()
        (q_term, q), (k_term, k) = sides
        if query in k_term or key in q_term or query not in q_term or key not in k_term:
            return out
        inner = "".join(c for c in k_term if c not in result)
        q_by, k_by = result[:-1], result[:-2] + key
        ones = torch.ones(out.shape[:-2] + out.shape[-1:], dtype=k.dtype)
        found = self._factors(out, lambda: torch.einsum(f"{k_term},{k_by}->{k_by}{inner}", k, ones))
        if found is None:
            return out
        q_noisy = torch.einsum(f"{q_term},{q_by}->{q_by}{inner}", q, found[0].to(q.dtype))
        k_noisy = torch.einsum(f"{k_term},{k_by}->{k_by}{inner}", k, found[1].to(k.dtype))
        return torch.einsum(f"{q_by}{inner},{k_by}{inner}->{result}", q_noisy, k_noisy)

    def _factors(self, out: Tensor, keys: Callable[[], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Notes a product; if it is the next attention's scores, what multiplies its operands.

        Returns:
            None, or factors shaped as the product without its keys and without its queries.
        """
        self.products.append((out.shape, keys))
        i = len(self.seen)
        if i >= len(self.calls):
            return None
        call = self.calls[i]
        heads, queries, n_keys = call.pattern.shape
        if not _fits(out.shape, self.copies * heads, queries, n_keys):
            return None
        self.fitting += 1
        if self.fitting != call.ordinal:
            return None
        by_query = torch.ones(self.copies, heads, queries, dtype=torch.float64)
        by_key = torch.ones(self.copies, heads, n_keys, dtype=torch.float64)
        q, k = self.factors[i]
        if q is not None:
            by_query[i + 1] = q.T
        if k is not None:
            by_key[i + 1] = k[:, call.kv_head].T
        return by_query.reshape(out.shape[:-1]), by_key.reshape(*out.shape[:-2], n_keys)

    # --- attentions

    def _softmax(self, logits: Tensor, dim: int | None) -> None:
        """Notes an attention; routers and gates have no product of their shape before them."""
        if logits.ndim < 3 or dim not in (-1, logits.ndim - 1):
            return
        queries, width = logits.shape[-2:]
        rows = logits.shape[:-2].numel()
        for n_keys in (width, width - 1):
            fitting = [k for shape, k in self.products if _fits(shape, rows, queries, n_keys)]
            if fitting:
                break
        else:
            return
        keys = fitting[-1]().double()
        keys = keys.reshape(self.copies, -1, *keys.shape[-2:])[0]
        shaped = logits.double().reshape(self.copies, -1, queries, width)
        self.seen.append(_Seen(shaped, keys, len(fitting)))
        self.products, self.fitting = [], 0

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The same by its definition, so that it has a product and a softmax to watch."""
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(times, -3) for x in (key, value))
        scores = self._matmul(torch.matmul, [query, key.mT], {})
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        self._softmax(scores, -1)
        return scores.softmax(-1) @ value


# Where the first operand is among the arguments, and what the two are called.
_OPERANDS = {
    "matmul": (0, ("input", "other")),
    "__matmul__": (0, ("input", "other")),
    "bmm": (0, ("input", "mat2")),
    "baddbmm": (1, ("batch1", "batch2")),
}


def _fits(shape: torch.Size, rows: int, queries: int, keys: int) -> bool:
    return shape[-2:] == (queries, keys) and shape[:-2].numel() == rows


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """Each expert's rows times its matrix: torch's own knows no float64."""
    out = x.new_zeros(len(x), weight.shape[-1])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        out[start:end] = x[start:end] @ weight[expert]
        start = end
    return out
