"""What a cache does to one layer: errors of its vectors, of its scores, and arg maxes that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.sites import LayerView, ScoreParts, qk_part

_ROUNDING = 64.0  # times eps, of the largest score that the lengths allow
CONTENT, SINK = 0, 1


# -- vectors ----------------------------------------------------------------------------------


def norm_error(
    clean: Float[Tensor, "*axes d"], back: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes"]:
    """|x'| / |x| - 1; 0 where x is zero, infinite where x' overflows."""
    before, after = (torch.linalg.vector_norm(x, dim=-1) for x in (clean, back))
    error = torch.where(before > 0, after / before, 1.0) - 1
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


def direction_error(
    clean: Float[Tensor, "*axes d"], back: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes"]:
    """1 - cos of the angle between x and x', from |x/|x| - x'/|x'||^2 / 2, which does not cancel.

    0 where x is zero, 1 where only x' is, or where x' overflows.
    """
    before, after = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (clean, back))
    u, w = (x / n.where(n > 0, 1.0) for x, n in ((clean, before), (back, after)))
    error = (u - w).square().sum(-1) / 2
    error = torch.where((after[..., 0] > 0) & error.isfinite(), error, 1.0)
    return torch.where(before[..., 0] > 0, error, 0.0)


# -- scores -----------------------------------------------------------------------------------


class ScoreRows:
    """The rows of one layer and batch, and what other keys do to them.

    Raises:
        UnsupportedModelError: scores that are not those of q and k; a query that attends to a later
            key, where no cache is possible.
    """

    def __init__(
        self, view: LayerView, sparse: float, first: Bool[Tensor, "batch key"] | None
    ) -> None:
        wide = view.scores.dtype
        self.sites = view.sites
        self.q, self.k = (view.vectors[role].to(wide) for role in ("q", "k"))
        _refuse_later_keys(view)
        self.parts = recomputed(view, self.q, self.k)
        self.clean = self.parts.scores()
        self.seen, self.pattern = view.visible, view.pattern
        self.several = self.seen.sum(-1) >= 2
        top, self.star = self.clean.max(-1)
        gap = top[..., None] - self.clean
        self.gap = gap.masked_fill(~self.seen, torch.inf)
        self.gap.scatter_(-1, self.star[..., None], torch.inf)
        self.margin = self.gap.amin(-1)
        self.sparse = self.several & (view.pattern.amax(-1) >= sparse) & (self.margin > 0)
        if first is None:
            self.sink = self.star == 0
        else:
            each = first.to(self.star.device)[:, None].expand(-1, self.star.shape[1], -1)
            self.sink = each.gather(-1, self.star.flatten(2)).view_as(self.star)

    def by_kv_head(self, values: Shaped[Tensor, "batch head *_"]) -> np.ndarray:
        """Sums over the query heads of each key/value head: ``[batch, kv_head, ...]``."""
        out = torch.zeros(
            (values.shape[0], self.sites.n_kv_heads, *values.shape[2:]), dtype=torch.float64
        )
        at = torch.tensor(self.sites.kv_head_of)
        out.index_add_(1, at, values.double().cpu())
        return out.numpy()

    def count(self, rows: Bool[Tensor, "batch head query"]) -> np.ndarray:
        """Sparse rows among these: ``[batch, kv_head, kind]``, content first, then sinks."""
        chosen = rows & self.sparse
        both = torch.stack([(chosen & ~self.sink).sum(-1), (chosen & self.sink).sum(-1)], -1)
        return self.by_kv_head(both).astype(np.int64)

    def examined(self) -> np.ndarray:
        """Rows with two or more visible keys, ``[batch, kv_head]``."""
        return self.by_kv_head(self.several.sum(-1)).astype(np.int64)

    def effects(self, error: Float[Tensor, "batch key kv_head d"]) -> dict[str, np.ndarray]:
        """What errors k' - k of the keys do: ``[batch, kv_head]``, counts also ``[..., kind]``.

        e_t: the error of score t. ``score``: sum over rows of the variance of e_t under the row's
        own attention, which adding a constant does not change. ``able``: sparse rows in which
        max e - min e exceeds the margin, so that some order of the same errors would move the arg
        max. ``moved``: those in which e_t - e_* exceeds the gap of a token t. A row with an error
        that is no finite number moves, and its variance is infinite.
        """
        e = self._score_errors(error)
        broken = (~e.isfinite() & self.seen).any(-1)
        mean = (self.pattern * e).sum(-1, keepdim=True)
        variance = (self.pattern * (e - mean).square()).sum(-1).masked_fill(broken, torch.inf)
        variance = variance.masked_fill(~self.several, 0)
        low = e.masked_fill(~self.seen, torch.inf).amin(-1)
        high = e.masked_fill(~self.seen, -torch.inf).amax(-1)
        at_star = e.gather(-1, self.star[..., None])
        moved = ((e - at_star) > self.gap).any(-1)
        return {
            "score": self.by_kv_head(variance.sum(-1)),
            "able": self.count((high - low > self.margin) | broken),
            "moved": self.count(moved | broken),
        }

    def _score_errors(self, error: Tensor) -> Tensor:
        added = qk_part(self.sites, self.q, error.to(self.q.dtype))
        if self.parts.soft_cap > 0:
            w = replace(self.parts, s=self.parts.s + added).scores()
            added = w - self.clean
        return added.masked_fill(~self.seen, 0)


def _refuse_later_keys(view: LayerView) -> None:
    n_query, n_key = view.scores.shape[-2:]
    if view.sites.sequence("q") == view.sites.sequence("k") and n_query == n_key:
        later = view.visible.triu(1).any()
        if bool(later):
            raise UnsupportedModelError(
                "keys that a cache can hold",
                wanted="queries that attend to their own and earlier tokens",
                got=f"one that attends to a later token in {view.sites.label} (leave it out with "
                "layers=)",
                layer=view.sites.layer,
            )


def recomputed(view: LayerView, q: Tensor, k: Tensor) -> ScoreParts:
    """The layer's scores with the q.k part computed anew from q and k.

    Raises:
        UnsupportedModelError: it is not the model's.
    """
    sites = view.sites
    if not sites.score_scale:
        raise UnsupportedModelError(
            "scores from q and k",
            wanted="hooks with the vectors that enter the dot product",
            got="vectors whose positions are rotated in behind the hooks",
            layer=sites.layer,
        )
    shown = view.parts
    s = qk_part(sites, q, k).masked_fill(~shown.mask, 0)
    eps = torch.finfo(view.vectors["k"].dtype).eps
    reach = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * max(map(abs, sites.score_scale))
    made = replace(shown, s=s)  # compared behind a soft cap, whose inverse would blow rounding up
    difference = (made.scores() - view.scores).masked_fill(~shown.mask, 0)
    allowed, error = _ROUNDING * eps * float(reach), float(difference.abs().max())
    if not error <= allowed:
        raise UnsupportedModelError(
            "scores from q and k",
            wanted=f"the model's own, within {allowed:.2g}",
            got=f"a difference of {error:.2g}",
            layer=sites.layer,
        )
    return made


def first_tokens_of(
    starts: Sequence[Sequence[int]], n_key: int
) -> Bool[Tensor, "batch key"] | None:
    """True where packed documents begin; None where no prompt holds several."""
    if all(len(mine) < 2 for mine in starts):
        return None
    first = torch.zeros(len(starts), n_key, dtype=torch.bool)
    for row, mine in zip(first, starts, strict=True):
        row[list(mine)] = True
    return first
