"""Where a model keeps q, k, v, the pre-softmax scores and the pattern, layer by layer.

Nothing here is a table of architectures: the hook points are found by running a few short tokens
and looking at what fires, in which order and with which shape. :mod:`hooks.selfcheck` then proves
on the same model that writes there do what the noise model says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.errors import UnsupportedModelError

Role = Literal["q", "k", "v"]
Shield = Literal["none", "removed", "mixed"]

ROLES: tuple[Role, ...] = ("q", "k", "v")
_CANDIDATES: dict[Role, tuple[str, ...]] = {
    role: tuple(
        name.format(role)
        for name in (
            "hook_{}",
            "{}.hook_out",
            "{}_norm.hook_out",
            "hook_{}_normed",
            "hook_rot_{}",
        )
    )
    for role in ROLES
}
_ATTENTION = re.compile(
    r"^(?P<prefix>blocks\.(?P<layer>\d+)\.\w*attn\w*)\.(?P<hook>hook_attn_scores|hook_z)$"
)
_PRIMES = (5, 7, 11, 13, 17)


@runtime_checkable
class HookedModel(Protocol):
    """All that this package asks of a model: TransformerBridge and HookedTransformer have it."""

    @property
    def cfg(self) -> Any:
        """n_heads, n_ctx, d_vocab and the like."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name, aliases included."""

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Context with temporary hooks."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass with temporary hooks."""


@dataclass(frozen=True)
class Site:
    """One TransformerLens hook point that carries one vector per token and head.

    ``head_axis`` is 2 for ``[batch, pos, head, d_head]`` and 1 for ``[batch, head, pos, d_head]``.
    """

    hook: str
    n_heads: int
    head_axis: int

    def scale(
        self, vectors: Float[Tensor, "batch _ __ d_head"], factor: Float[Tensor, "batch pos head"]
    ) -> Float[Tensor, "batch _ __ d_head"]:
        """A new tensor with each vector times its factor; multiplied in float32, then cast."""
        aligned = factor if self.head_axis == 2 else factor.transpose(1, 2)
        wide = torch.promote_types(vectors.dtype, factor.dtype)
        return (vectors.to(wide) * aligned[..., None].to(wide)).to(vectors.dtype)

    def by_position(
        self, vectors: Float[Tensor, "batch _ __ d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The vectors as ``[batch, pos, head, d_head]``, whatever the hook's own layout."""
        return vectors if self.head_axis == 2 else vectors.transpose(1, 2)

    def n_pos(self, vectors: Float[Tensor, "batch _ __ d_head"]) -> int:
        """Number of positions in a tensor of this hook."""
        return int(vectors.shape[1 if self.head_axis == 2 else 2])


@dataclass(frozen=True)
class VectorSite:
    """Where one of q, k, v can be scaled in one layer.

    Attributes:
        projection: the projection's output, before any norm or rotary embedding.
        dot: the vectors that enter the dot product (v: that the pattern averages).
        shield: what noise at ``projection`` becomes at ``dot``: ``none`` (it arrives unchanged),
            ``removed`` (a norm over each head takes it away) or ``mixed`` (a norm over the whole
            projection takes part of it away and leaks one head's noise into the others).
    """

    projection: Site
    dot: Site
    shield: Shield


@dataclass(frozen=True)
class LayerSites:
    """The hook points of one attention layer.

    Attributes:
        layer: block index, as in ``blocks.{layer}``.
        q, k, v: vector sites; k and v carry key/value heads (grouped-query attention).
        scores: hook of the pre-softmax scores ``[batch, head, query, key]``; empty where the
            attention is fused (sdpa) and keeps none.
        pattern: hook of the attention pattern, same shape; empty likewise.
        z: hook of the per-head average of v, or None where the model has none.
        soft_cap: c of the soft cap c tanh(w / c) on the scores, 0 without one.
        has_bias: whether something is added to the q.k part (ALiBi, relative positions).
        score_scale: factor between q.k and the q.k part of the scores (1/sqrt(d_head), usually).
        scores_editable: whether an edit of ``scores`` changes the pattern.
    """

    layer: int
    q: VectorSite
    k: VectorSite
    v: VectorSite
    scores: str
    pattern: str
    z: Site | None
    soft_cap: float = 0.0
    has_bias: bool = False
    score_scale: float = 1.0
    scores_editable: bool = False

    @property
    def fused(self) -> bool:
        """Whether the attention keeps neither scores nor pattern (sdpa)."""
        return not self.scores

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.q.dot.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.k.dot.n_heads

    @property
    def kv_head_of(self) -> tuple[int, ...]:
        """Key/value head that each query head reads: noise there is shared by its query heads."""
        group = self.n_heads // self.n_kv_heads
        return tuple(head // group for head in range(self.n_heads))

    def vector(self, role: Role) -> VectorSite:
        """The site of ``"q"``, ``"k"`` or ``"v"``."""
        sites: dict[Role, VectorSite] = {"q": self.q, "k": self.k, "v": self.v}
        return sites[role]


@dataclass(frozen=True)
class AttentionSites:
    """Attention layers of one model, checked on the model itself.

    Iterating gives a :class:`LayerSites` per attention layer; :meth:`layer` looks one up by block
    index. ``check`` holds what the self-check measured, one row per layer and check.
    """

    layers: tuple[LayerSites, ...]
    check: pd.DataFrame = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[LayerSites]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> LayerSites:
        """Sites of block ``index``.

        Raises:
            ValueError: that block does not exist or has no attention.
        """
        for sites in self.layers:
            if sites.layer == index:
                return sites
        known = [sites.layer for sites in self.layers]
        raise ValueError(f"layer: wanted one of the attention layers {known}; got {index!r}")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and vector: hooks, head counts and what shields the projection."""
        rows = [
            {
                "layer": sites.layer,
                "vector": role,
                "projection": sites.vector(role).projection.hook,
                "dot_product": sites.vector(role).dot.hook,
                "heads": sites.vector(role).dot.n_heads,
                "shield": sites.vector(role).shield,
                "scores": sites.scores,
                "bias": sites.has_bias,
                "soft_cap": sites.soft_cap,
                "scores_editable": sites.scores_editable,
            }
            for sites in self.layers
            for role in ROLES
        ]
        return pd.DataFrame(rows)

    def describe(self) -> str:
        """In sentences: what noise on q, k and v means in this model."""
        first = self.layers[0]
        parts = [_sharing(first)]
        for shield, text in _SHIELD_TEXT.items():
            roles = [r for r in ROLES if any(s.vector(r).shield == shield for s in self.layers)]
            if roles:
                shielded = sum(any(s.vector(r).shield == shield for r in roles) for s in self)
                where = "" if shielded == len(self) else f" in {shielded} of {len(self)} layers"
                parts.append(text.format(", ".join(roles), where))
        if any(s.has_bias for s in self.layers):
            parts.append(
                "A position bias is added to the scores: noise scales only the q.k part, so noise "
                "on q alone can move an arg max."
            )
        return " ".join(parts)


_SHIELD_TEXT = {
    "none": "Norm noise on {} at the projection reaches the attention unchanged{}.",
    "removed": "Norm noise on {} at the projection is removed by a norm over each head{}: the "
    "curve is for the vectors behind that norm.",
    "mixed": "Norm noise on {} at the projection passes a norm over all heads{}, which removes "
    "their common factor and leaks one head's noise into the others: the curve is for the "
    "vectors behind that norm.",
}


def _sharing(sites: LayerSites) -> str:
    group = sites.n_heads // sites.n_kv_heads
    if group == 1:
        return f"{sites.n_heads} heads, each with keys and values of its own."
    return (
        f"{sites.n_heads} query heads share {sites.n_kv_heads} key/value heads: noise on one key "
        f"or value vector reaches {group} query heads."
    )


# --- finding the sites -----------------------------------------------------------------------


def prefixes(model: HookedModel) -> dict[int, str]:
    """``blocks.{l}.attn`` of every layer that has a scores hook or, fused, a z hook, by layer.

    Raises:
        UnsupportedModelError: no layer has one, or a block has several.
    """
    found: dict[int, str] = {}
    names = list(model.hook_dict)
    for name in names:
        match = _ATTENTION.match(name)
        if match is None:
            continue
        layer = int(match["layer"])
        if found.setdefault(layer, match["prefix"]) != match["prefix"]:
            raise UnsupportedModelError(
                "one attention per block",
                wanted="a single attention module",
                got=f"{found[layer]} and {match['prefix']}",
                layer=layer,
            )
    if not found:
        stacks = sorted(
            {n.split(".")[0] for n in names if n.endswith(("hook_attn_scores", "hook_pattern"))}
        )
        got = f"attention only in {stacks}" if stacks else "no attention layer"
        raise UnsupportedModelError(
            "attention sites", wanted="hook points blocks.{l}.attn.hook_attn_scores", got=got
        )
    return dict(sorted(found.items()))


@dataclass
class _Firing:
    name: str
    shape: tuple[int, ...]


def short_tokens(
    model: HookedModel, batch: int, avoid: set[int], attempt: int = 0
) -> Int[Tensor, "batch pos"]:
    """The same few random tokens in each row; their number equals no head count in ``avoid``.

    Raises:
        UnsupportedModelError: the context is too short for a check.
    """
    n_ctx = int(getattr(model.cfg, "n_ctx", 0) or 10**9)
    lengths = [p for p in _PRIMES if p not in avoid and p <= n_ctx]
    if not lengths:
        raise UnsupportedModelError(
            "short prompt", wanted=f"a context of at least {_PRIMES[0]} tokens", got=f"{n_ctx}"
        )
    vocabulary = int(model.cfg.d_vocab)
    generator = torch.Generator().manual_seed(1 + attempt)
    length = lengths[min(attempt, len(lengths) - 1)]
    row = torch.randint(0, vocabulary, (1, length), generator=generator)
    return row.expand(batch, -1).to(input_device(model))


def input_device(model: HookedModel) -> torch.device:
    """Device on which the model takes its tokens."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    if first is not None:
        return torch.device(first.device)
    return torch.device(getattr(model.cfg, "device", None) or "cpu")


def locate(model: HookedModel) -> tuple[LayerSites, ...]:
    """Find every layer's hook points by one short forward pass; nothing is verified yet.

    Raises:
        UnsupportedModelError: a hook point is missing, fires never or more than once, or has an
            unknown shape.
    """
    where = prefixes(model)
    cfg = model.cfg
    counts = {int(cfg.n_heads), int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)}
    tokens = short_tokens(model, 2, counts | {2})
    firings = _record(model, where, tokens)
    return tuple(
        _layer_sites(model, layer, prefix, firings, tokens.shape[1])
        for layer, prefix in where.items()
    )


def _record(model: HookedModel, where: Mapping[int, str], tokens: Tensor) -> list[_Firing]:
    wanted = ["hook_attn_scores", "hook_pattern", "hook_z"]
    wanted += [name for names in _CANDIDATES.values() for name in names]
    firings: list[_Firing] = []
    by_point: dict[int, str] = {}
    hook_dict = model.hook_dict
    for prefix in where.values():
        for name in wanted:
            point = hook_dict.get(f"{prefix}.{name}")
            if point is not None:  # one name per hook point: aliases would record it twice
                by_point.setdefault(id(point), f"{prefix}.{name}")

    def recorder(name: str) -> Any:
        def record(tensor: Any, hook: Any) -> None:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
            firings.append(_Firing(name, shape))

        return record

    with torch.no_grad(), model.hooks(fwd_hooks=[(n, recorder(n)) for n in by_point.values()]):
        model(tokens)  # type: ignore[operator]
    return firings


def _layer_sites(
    model: HookedModel, layer: int, prefix: str, firings: list[_Firing], n_pos: int
) -> LayerSites:
    mine = [f for f in firings if f.name.startswith(f"{prefix}.")]
    fused = f"{prefix}.hook_attn_scores" not in model.hook_dict
    before = mine
    if not fused:
        scores = _scores_and_pattern(mine, prefix, n_pos, layer)
        before = mine[: mine.index(scores)]
    # v may fire after the scores; q and k must fire before them.
    vectors = {
        role: _vector_site(role, mine if role == "v" else before, prefix, n_pos, layer)
        for role in ROLES
    }
    for firing in mine:
        _fired_once(mine, firing.name, layer)
    n_heads = int(model.cfg.n_heads) if fused else scores.shape[1]
    k_heads, v_heads = vectors["k"].dot.n_heads, vectors["v"].dot.n_heads
    if vectors["q"].dot.n_heads != n_heads or n_heads % k_heads or k_heads != v_heads:
        raise UnsupportedModelError(
            "head counts",
            wanted="query heads as in the scores, a divisor of that for both keys and values",
            got=f"q {vectors['q'].dot.n_heads}, k {k_heads}, v {v_heads}, scores {n_heads}",
            layer=layer,
        )
    z = [f for f in mine if f.name == f"{prefix}.hook_z" and len(f.shape) == 4]
    return LayerSites(
        layer=layer,
        q=vectors["q"],
        k=vectors["k"],
        v=vectors["v"],
        scores="" if fused else f"{prefix}.hook_attn_scores",
        pattern="" if fused else f"{prefix}.hook_pattern",
        z=_site(z[0], n_pos, layer) if len(z) == 1 else None,
        soft_cap=max(float(getattr(model.cfg, "attn_scores_soft_cap", 0) or 0), 0.0),
    )


def _scores_and_pattern(mine: list[_Firing], prefix: str, n_pos: int, layer: int) -> _Firing:
    scores = _fired_once(mine, f"{prefix}.hook_attn_scores", layer)
    pattern = _fired_once(mine, f"{prefix}.hook_pattern", layer)
    if scores.shape[2:] != (n_pos, n_pos) or pattern.shape != scores.shape:
        raise UnsupportedModelError(
            "shape of scores and pattern",
            wanted=f"[batch, head, {n_pos}, {n_pos}] for both",
            got=f"{list(scores.shape)} and {list(pattern.shape)}",
            layer=layer,
        )
    return scores


def _fired_once(firings: list[_Firing], name: str, layer: int) -> _Firing:
    found = [f for f in firings if f.name == name]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} fires once per forward", wanted="1 firing", got=str(len(found)), layer=layer
        )
    return found[0]


def _vector_site(
    role: Role, firings: list[_Firing], prefix: str, n_pos: int, layer: int
) -> VectorSite:
    names = [f"{prefix}.{name}" for name in _CANDIDATES[role]]
    found = [f for f in firings if f.name in names]
    if not found:
        raise UnsupportedModelError(
            f"{role} fires before it is used", wanted=f"one of {names}", got="none", layer=layer
        )
    # In the order of the forward pass: the first is the projection, the last is what is used.
    return VectorSite(_site(found[0], n_pos, layer), _site(found[-1], n_pos, layer), "none")


def _site(firing: _Firing, n_pos: int, layer: int) -> Site:
    shape = firing.shape
    if len(shape) == 4 and shape[1] == n_pos and shape[2] != n_pos:
        return Site(firing.name, shape[2], 2)
    if len(shape) == 4 and shape[2] == n_pos and shape[1] != n_pos:
        return Site(firing.name, shape[1], 1)
    raise UnsupportedModelError(
        f"shape of {firing.name}",
        wanted="[batch, pos, head, d_head] or [batch, head, pos, d_head]",
        got=str(list(shape)),
        layer=layer,
    )
