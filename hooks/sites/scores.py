"""The q.k part of a layer's scores, what is added to it, and what is masked.

All score arithmetic is here: for every supported layer

    w_qt = c tanh(((1 + kq)(1 + k_t) s_qt + b_qt) / c)    (without a soft cap c: no tanh)

where s is the q.k part that norm noise scales and b what it does not. The pattern is the softmax
of w, over the keys and, where a head has a sink, over the sink's score beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.arguments import brief, check_booleans, check_kind, check_tensor
from hooks.errors import UnsupportedModelError
from hooks.kernels import MASKED
from hooks.sites.types import LayerSites

Scores = Float[Tensor, "batch head query key"]


@dataclass(frozen=True)
class ScoreParts:
    """Pre-softmax scores of one layer as w = cap(s + bias).

    Attributes:
        s: the q.k part, ``[batch, head, query, key]``; zero where masked.
        bias: what is added to s, of the same shape, or None where nothing is.
        mask: True where the key is visible.
        soft_cap: c of the soft cap, 0 without one.
        sink: score of each head's sink, or None.
    """

    s: Scores
    bias: Scores | None
    mask: Bool[Tensor, "batch head query key"]
    soft_cap: float
    sink: Float[Tensor, "head"] | None = None

    def scores(self, factor: Float[Tensor, "#batch #head #query #key"] | None = None) -> Scores:
        """w = cap(factor s + bias), -inf where masked.

        Args:
            factor: (1 + kq)(1 + k_t) per score; None leaves the scores clean.
        """
        if factor is not None:
            _check_factor(factor, self.s)
        w = self.s if factor is None else self.s * factor
        if self.bias is not None:
            w = w + self.bias
        if self.soft_cap > 0:
            w = self.soft_cap * torch.tanh(w / self.soft_cap)
        return w.masked_fill(~self.mask, -torch.inf)

    def pattern(self, factor: Float[Tensor, "#batch #head #query #key"] | None = None) -> Scores:
        """softmax(w) over the keys and the sink; ``factor`` multiplies s as in :meth:`scores`."""
        return self.pattern_of(self.scores(factor))

    def pattern_of(self, w: Scores) -> Scores:
        """The pattern of other scores in this layer."""
        check_tensor("w", w, tuple(self.s.shape), f"of the scores' shape {list(self.s.shape)}")
        return softmax_with_sink(w, None if self.sink is None else self.sink[:, None])


def _check_factor(factor: Any, s: Tensor) -> None:
    wanted = f"that broadcasts to {list(s.shape)}"
    check_tensor("factor", factor, (None,) * s.ndim, wanted)
    if any(n not in (1, m) for n, m in zip(factor.shape, s.shape, strict=True)):
        raise ValueError(f"factor: wanted a tensor {wanted}; got shape {list(factor.shape)}")


def visible(scores: Float[Tensor, "*rows key"]) -> Bool[Tensor, "*rows key"]:
    """True where a key is not masked, whatever number the model masks with."""
    return scores > MASKED


def softmax_with_sink(
    w: Float[Tensor, "*rows key"], sink: Float[Tensor, "*#rows"] | None
) -> Float[Tensor, "*rows key"]:
    """exp(w_t) / (exp(sink) + sum_t exp(w_t)): a sink takes a share but is not a key."""
    if sink is None:
        return torch.softmax(w, dim=-1)
    beside = sink.to(w).expand(w.shape[:-1])[..., None]
    return torch.softmax(torch.cat([w, beside], dim=-1), dim=-1)[..., :-1]


def recheck(sites: LayerSites, scores: Scores, pattern: Scores) -> None:
    """Refuse a pattern that is not the softmax of its scores, where the user's hooks may edit."""
    if not sites.recheck or bool(scores.isnan().any()):  # what reads NaN says so
        return
    seen = visible(scores)
    w = scores.double().masked_fill(~seen, -torch.inf)
    sink = w.new_tensor(sites.sink)[:, None] if sites.sink else None
    p = softmax_with_sink(w, sink)
    room = 64 * torch.finfo(scores.dtype).eps * (1 + w.masked_fill(~seen, 0).abs().amax(-1))
    error = (p - pattern.double()).abs().amax(-1).where(seen.any(-1), torch.zeros(()).double())
    if not bool((error <= room).all()):
        raise UnsupportedModelError(
            "pattern = softmax(scores)",
            wanted=f"a difference of at most {float(room.max()):.2g}",
            got=f"{float(error.max()):.2g}: a hook of yours edits the pattern after its scores, "
            "so that no noise on them says what it does; measure without it",
            layer=sites.layer,
        )


def uncapped(w: Float[Tensor, "*any"], soft_cap: float, eps: float) -> Float[Tensor, "*any"]:
    """Scores before their soft cap: c atanh(w / c).

    A saturated score has lost its q.k part: what the model's own dtype (with machine epsilon
    ``eps``) can't tell from the cap ties just below it. Compiled code has `hooks.kernels.uncapped`.
    """
    edge = 1 - eps
    return soft_cap * torch.atanh((w / soft_cap).clamp(-edge, edge))


def split(
    sites: LayerSites,
    scores: Scores,
    q: Float[Tensor, "batch query head d_head"] | None = None,
    k: Float[Tensor, "batch key kv_head d_head"] | None = None,
    *,
    dtype: torch.dtype | None = None,
    whole: bool = False,
) -> ScoreParts:
    """Split the scores of one layer into their parts.

    Args:
        sites: the layer; says whether a bias is added and which soft cap follows.
        scores: what the model's scores hook carries.
        q, k: the vectors that enter the dot product; needed where a bias is added.
        dtype: floating dtype of the parts (default: that of ``scores``).
        whole: do not split: ``s`` holds the softmax's input, cap and bias included.

    Raises:
        ValueError: the layer adds a bias and q or k is missing.
    """
    check_kind("sites", sites, LayerSites, "a layer of attention_sites(model)")
    check_tensor("scores", scores, (None,) * 4, "[batch, head, query, key]")
    for name, given in (("q", q), ("k", k)):
        if given is not None:
            check_tensor(name, given, (None,) * 4, "[batch, pos, head, d_head]")
    asked: Any = dtype
    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise TypeError(f"dtype: wanted a floating dtype of torch; got {brief(dtype)}")
    (whole,) = check_booleans(whole=whole)
    mask = visible(scores)
    w = scores if dtype is None else scores.to(dtype)
    w = w.masked_fill(~mask, 0.0)
    sink = w.new_tensor(sites.sink) if sites.sink else None
    if whole:
        return ScoreParts(w, None, mask, 0.0, sink)
    if sites.soft_cap > 0:
        w = uncapped(w, sites.soft_cap, torch.finfo(scores.dtype).eps)
    if not sites.has_bias:
        return ScoreParts(w, None, mask, sites.soft_cap, sink)
    if q is None or k is None:
        raise ValueError(f"layer {sites.layer} adds a bias to its scores: wanted q and k; got None")
    s = qk_part(sites, q.to(w.dtype), k.to(w.dtype)).masked_fill(~mask, 0)
    return ScoreParts(s, w - s, mask, sites.soft_cap, sink)


def qk_part(
    sites: LayerSites,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
) -> Scores:
    """c q . k with each head's scale c: the part of the scores that noise scales."""
    product = qk_product(sites, q, k)
    return product * product.new_tensor(sites.score_scale)[:, None, None]


def qk_product(
    sites: LayerSites,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
) -> Scores:
    """q . k for every query head, keys shared as in grouped-query attention; not scaled."""
    keys = k[:, :, list(sites.kv_head_of)]
    return torch.einsum("bqhd,bkhd->bhqk", q, keys)


def expand_factors(
    sites: LayerSites,
    q: Float[Tensor, "batch query head"] | None,
    k: Float[Tensor, "batch key kv_head"] | None,
) -> Float[Tensor, "#batch #head #query #key"]:
    """(1 + kq)(1 + k_t) as a factor on the scores, from factors per vector; None means 1."""
    factor = torch.ones(1, 1, 1, 1, dtype=torch.float32)
    if q is not None:
        factor = q.transpose(1, 2)[:, :, :, None]
    if k is not None:
        keys = k[:, :, list(sites.kv_head_of)].transpose(1, 2)[:, :, None, :]
        factor = keys if q is None else factor * keys
    return factor
