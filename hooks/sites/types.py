"""Where a model keeps q, k, v, the pre-softmax scores and the pattern, layer by layer.

There is no table of architectures: :mod:`hooks.sites.selfcheck` finds the sites by running the
model, and proves on it that writes there do what the noise model says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import brief, check_choice, check_layers, plain
from hooks.model import ROLES, Anchor, Role

Shield = Literal["none", "removed", "mixed", "unseen"]
Averaging = Literal["plain", "gated", "centred", "unverified"]
Stream = Literal["source", "target"]


@dataclass(frozen=True)
class Site:
    """One TransformerLens hook point that carries one vector per token and head.

    ``head_axis`` is 2 for ``[batch, pos, head, d_head]``, 1 for ``[batch, head, pos, d_head]`` and
    -1 for ``[batch, pos, head * d_head]``. ``hook`` is empty where TransformerLens has none, or
    none that acts: the vectors are then those that the model multiplies.
    """

    hook: str
    n_heads: int
    head_axis: int

    @property
    def hooked(self) -> bool:
        """Whether TransformerLens has a hook point there."""
        return bool(self.hook)

    def scale(
        self, vectors: Float[Tensor, "batch *_"], factor: Float[Tensor, "batch pos head"]
    ) -> Float[Tensor, "batch *_"]:
        """A new tensor with each vector times its factor: (1 + kappa) x, in the dtype of x.

        It is multiplied in the wider dtype of the two, then cast.
        """
        wide = torch.promote_types(vectors.dtype, factor.dtype)
        apart = self.by_position(vectors)
        return as_hooked(self, (apart.to(wide) * factor[..., None].to(wide)).to(vectors.dtype))

    def by_position(self, vectors: Float[Tensor, "batch *_"]) -> Float[Tensor, "batch pos head d"]:
        """The vectors as ``[batch, pos, head, d_head]``, whatever the hook's own layout."""
        if self.head_axis == -1:
            apart: Tensor = vectors.unflatten(-1, (self.n_heads, -1))
            return apart
        return vectors if self.head_axis == 2 else vectors.transpose(1, 2)

    def n_pos(self, vectors: Float[Tensor, "batch *_"]) -> int:
        """Number of positions in a tensor of this hook."""
        return int(vectors.shape[2 if self.head_axis == 1 else 1])


def as_hooked(site: Site, vectors: Float[Tensor, "batch pos head d"]) -> Tensor:
    """Vectors by position in the hook's own layout: the inverse of :meth:`Site.by_position`."""
    if site.head_axis == 1:
        return vectors.transpose(1, 2)
    return vectors if site.head_axis == 2 else vectors.flatten(2)


@dataclass(frozen=True)
class VectorSite:
    """Where one of q, k, v can be scaled in one layer.

    Attributes:
        projection: the projection's output, before any norm or rotary embedding.
        dot: the vectors that enter the dot product (v: that the pattern averages).
        shield: what noise at ``projection`` becomes at ``dot``: ``none`` (it arrives unchanged),
            ``removed`` (a norm over each head removes it), ``mixed`` (a norm over the whole
            projection removes part of it and leaks one head's noise into the others), or ``unseen``
            (no hook is at the projection).
    """

    projection: Site
    dot: Site
    shield: Shield


@dataclass(frozen=True)
class LayerSites:
    """The hook points of one attention layer.

    Attributes:
        layer: block index, as in ``blocks.{layer}``; in a model with several stacks or several
            attentions per block, index of the attention in the order of the forward pass.
        q, k, v: vector sites; k and v carry key/value heads (grouped-query attention).
        scores: hook of the pre-softmax scores ``[batch, head, query, key]``; empty where no hook
            shows them, and they are read where the model takes its softmax.
        pattern: hook of the attention pattern, same shape; empty where no hook shows it.
        z: hook of the per-head average of v, or None where the model has none.
        prefix: the attention's name, ``blocks.{layer}.attn``.
        label: short name: ``L5``; ``E5``, ``D5``, ``X5`` for an encoder, a decoder and its
            cross-attention.
        soft_cap: c of the soft cap c tanh(w / c) on the scores, 0 without one.
        has_bias: whether something is added to the q.k part (ALiBi, relative positions).
        score_scale: factor between q.k and the q.k part of each head's scores (1/sqrt(d_head),
            usually); empty where there is none, as positions are rotated in between.
        sink: score of each head's learned attention sink, a column of the softmax that is not a
            token; empty without one.
        averaging: ``plain`` where z is the pattern's average of v, ``gated`` where each of its
            components is then scaled, ``centred`` where the mean over each row's visible keys is
            subtracted, ``unverified`` where it is none of these.
        scores_editable: whether an edit of ``scores`` changes the pattern.
        recheck: whether the check could not be done with the user's hooks on the model, so that
            each pass must show again that its pattern is the softmax of its scores.
        anchor: where the attention is in the forward pass, if its products are seen.
    """

    layer: int
    q: VectorSite
    k: VectorSite
    v: VectorSite
    scores: str
    pattern: str
    z: Site | None
    prefix: str = ""
    label: str = ""
    soft_cap: float = 0.0
    has_bias: bool = False
    score_scale: tuple[float, ...] = ()
    sink: tuple[float, ...] = ()
    averaging: Averaging = "plain"
    scores_editable: bool = False
    recheck: bool = False
    anchor: Anchor | None = None

    @property
    def bare(self) -> bool:
        """Whether q, k, v and z are read and written where the model multiplies them."""
        return not self.q.dot.hooked

    @property
    def block(self) -> str:
        """Name of the attention's block, ``blocks.{layer}``."""
        inside = re.match(r"\w*blocks\.\d+", self.prefix)
        return inside[0] if inside else self.prefix.rpartition(".")[0]

    @property
    def tapped(self) -> bool:
        """Whether no hook shows the scores: they are read where the model takes its softmax."""
        return not self.scores

    def sequence(self, role: Role) -> Stream:
        """Whose positions a vector has: the ``source``'s (an encoder's) or the ``target``'s."""
        check_choice("role", role, ROLES)
        encoded = self.label.startswith("E") or (self.label.startswith("X") and role != "q")
        return "source" if encoded else "target"

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
        if self.bare and self.anchor is not None:
            return self.anchor.kv_heads
        group = self.n_heads // self.n_kv_heads
        return tuple(head // group for head in range(self.n_heads))

    @property
    def kv_leaders(self) -> list[int]:
        """The first query head of each key/value head, where these are read at the products."""
        assert self.anchor is not None
        return [self.anchor.kv_heads.index(head) for head in range(self.n_kv_heads)]

    def without_hooks(self) -> LayerSites:
        """This layer with q, k, v and z read at the products, after every hook."""
        assert self.anchor is not None
        n_kv = 1 + max(self.anchor.kv_heads)
        q, kv = Site("", len(self.anchor.kv_heads), 2), Site("", n_kv, 2)
        return replace(
            self,
            q=_at_products(self.q.projection, q),
            k=_at_products(self.k.projection, kv),
            v=_at_products(self.v.projection, kv),
            scores="",
            pattern="",
            z=q,
        )

    def vector(self, role: Role) -> VectorSite:
        """The site of ``"q"``, ``"k"`` or ``"v"``."""
        sites = {"q": self.q, "k": self.k, "v": self.v}
        return sites[check_choice("role", role, sites)]


def _at_products(projection: Site, dot: Site) -> VectorSite:
    """A vector taken where it is multiplied; what noise at its projection becomes is still open."""
    if projection.hooked:
        return VectorSite(projection, dot, "none")
    return VectorSite(dot, dot, "unseen")


@dataclass(frozen=True)
class AttentionSites:
    """Attention layers of one model, checked on the model itself.

    Iterating gives a :class:`LayerSites` per attention layer; :meth:`layer` looks one up by its
    index.

    Attributes:
        layers: the attention layers, in the order of the forward pass.
        check: what the self-check measured, one row per layer and check.
        silent: attention modules whose hooks did not fire in the check, such as
            ``vision_encoder.encoder_layers.0.attn`` of a text-and-image model run on text. Nothing
            is known about them, and nothing measures them.
        outside: attention modules whose hooks fired, but which are in no stack of blocks (that
            module, run on an image): nothing measures them either.
        notes: what the user's hooks mean for the check and for what is measured.
        left_out: attentions of blocks that have no row of weights over a sequence's keys (those
            over windows), by name, with what was seen: nothing measures them.
        known: what later checks of the same model found, remembered as long as this one.
    """

    layers: tuple[LayerSites, ...]
    check: pd.DataFrame = field(repr=False, compare=False)
    silent: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[LayerSites]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> LayerSites:
        """Sites of the attention layer whose :attr:`LayerSites.layer` is ``index``.

        Raises:
            ValueError: there is none: no such block, or one without attention.
        """
        number = plain(index)
        for sites in self.layers:
            if type(number) is int and sites.layer == number:
                return sites
        known = [sites.layer for sites in self.layers]
        raise ValueError(f"index: wanted one of the attention layers {known}; got {brief(index)}")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and vector: hooks, head counts and what shields the projection.

        ``scores``, ``pattern`` and ``z`` are hooks of the layer; "" where none shows them
        (scores: ``"softmax"``, where they are read then).
        """
        rows = [
            {
                "layer": sites.layer,
                "label": sites.label,
                "vector": role,
                "projection": sites.vector(role).projection.hook,
                "dot_product": sites.vector(role).dot.hook,
                "heads": sites.vector(role).dot.n_heads,
                "shield": sites.vector(role).shield,
                "scores": sites.scores or "softmax",
                "pattern": sites.pattern,
                "z": "" if sites.z is None else sites.z.hook,
                "bias": sites.has_bias,
                "soft_cap": sites.soft_cap,
                "sink": bool(sites.sink),
                "averaging": sites.averaging,
                "scores_editable": sites.scores_editable,
            }
            for sites in self.layers
            for role in ROLES
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """Describe in sentences what noise on q, k and v means in this model."""
        parts = _stacks(self.layers) + _sharing(self.layers)
        for shield, text in _SHIELD_TEXT.items():
            by_layers: dict[tuple[int, ...], list[str]] = {}
            for role in ROLES:
                mine = tuple(s.layer for s in self if s.vector(role).shield == shield)
                by_layers.setdefault(mine, []).append(role)
            for mine, roles in by_layers.items():
                if mine:
                    parts.append(text.format(", ".join(roles), self._where(len(mine))))
        for holds, text in _FACTS:
            found = sum(holds(s) for s in self)
            if found:
                parts.append(text.format(self._where(found)))
        left_out = _together((*self.silent, *self.outside))
        if left_out:  # in the same words on text and with an image: reports of both can be merged
            parts.append(f"Left out, as it did not run or is no block's: {left_out}.")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out:
            reasons.setdefault(why, []).append(name)
        parts += [f"Left out, {why}: {_together(names)}." for why, names in reasons.items()]
        return " ".join(parts)

    def _where(self, n_layers: int) -> str:
        """Say in how many layers, unless in all."""
        return "" if n_layers == len(self) else f" in {n_layers} of {len(self)} layers"


_SHIELD_TEXT: dict[Shield, str] = {
    "none": "Norm noise on {} at the projection reaches the attention unchanged{}.",
    "unseen": "Whether norm noise on {} at the projection reaches the attention is not known{}: no "
    "hook is there, and a norm may follow.",
    "removed": "Norm noise on {} at the projection is removed by a norm over each head{}: the "
    "curve is for the vectors after that norm.",
    "mixed": "Norm noise on {} at the projection passes a norm over all heads{}, which removes "
    "their common factor and leaks one head's noise into the others: the curve is for the "
    "vectors after that norm.",
}


_FACTS: tuple[tuple[Callable[[LayerSites], bool], str], ...] = (
    (
        lambda s: s.has_bias,
        "A position bias is added to the scores{}: noise scales only the q.k part, so noise on q "
        "alone can move an arg max.",
    ),
    (
        lambda s: s.soft_cap > 0,
        "A soft cap follows the scores{}: it keeps their order, and with it every arg max.",
    ),
    (
        lambda s: bool(s.sink),
        "Each head has a sink beside its keys{}: a row's weights sum to less than one.",
    ),
    (lambda s: s.averaging == "gated", "The average of v is gated{}."),
    (
        lambda s: s.averaging == "centred",
        "The mean over the visible keys is subtracted from the average of v{}.",
    ),
    (
        lambda s: s.averaging == "unverified",
        "What noise on v does could not be verified{}: it is refused there.",
    ),
    (
        lambda s: s.bare,
        "No hook carries q, k and v where they enter the attention{}: they are read, and noised by "
        "NormNoise.applied, where the model multiplies them.",
    ),
    (
        lambda s: s.tapped,
        "No hook shows the scores{}: they are read where the model takes its softmax.",
    ),
)


def _together(names: Iterable[str]) -> str:
    """``a.0.attn and 2 alike`` for names that differ only in their numbers."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: [int(x) for x in re.findall(r"\d+", n)]):
        alike.setdefault(re.sub(r"\d+", "", name), []).append(name)
    several = (alike[key] for key in sorted(alike))
    return ", ".join(s[0] if len(s) == 1 else f"{s[0]} and {len(s) - 1} alike" for s in several)


def _stacks(layers: tuple[LayerSites, ...]) -> list[str]:
    """What the letters of the labels mean, in a model with an encoder and a decoder."""
    names = {"E": "encoder", "D": "decoder", "X": "cross-attention"}
    kinds = {s.label[0]: names[s.label[0]] for s in layers if s.label[:1] in names}
    if len(kinds) < 2:
        return []
    return [", ".join(f"{letter}: {name}" for letter, name in kinds.items()) + "."]


def _sharing(layers: tuple[LayerSites, ...]) -> list[str]:
    """One sentence for each geometry."""
    out = []
    for n_heads, n_kv_heads in dict.fromkeys((s.n_heads, s.n_kv_heads) for s in layers):
        if n_heads == n_kv_heads:
            out.append(f"{n_heads} heads, each with keys and values of its own.")
            continue
        out.append(
            f"{n_heads} query heads share {n_kv_heads} key/value heads: noise on one key or value "
            f"vector reaches {n_heads // n_kv_heads} query heads."
        )
    return out


def choose_layers(sites: AttentionSites, layers: Any) -> tuple[LayerSites, ...]:
    """The attention layers with these indices, in their order; all of them for None.

    Raises:
        ValueError: none, one twice, something that is not an integer, or no such layer.
    """
    if layers is None:
        return sites.layers
    known = {layer.layer: layer for layer in sites}
    chosen = sorted(check_layers(layers))
    for index in chosen:
        if index not in known:
            raise ValueError(
                f"layers: wanted one of the attention layers {brief(list(known))}; got {index}"
            )
    return tuple(known[index] for index in chosen)
