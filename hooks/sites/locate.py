"""Finds every attention's hook points by running the model and recording what fires.

There is no table of architectures: names are only candidates; the order and shape in which they
fire say what they are. Nothing is verified here; :mod:`hooks.sites.selfcheck` does that.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

import pandas as pd
import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import HookedModel, ModelInput, Role, Taken
from hooks.sites.passes import (
    CANDIDATES,
    Firing,
    Module,
    Multiplied,
    SeenPass,
    is_known,
    is_of,
    module_of,
)
from hooks.sites.scores import visible
from hooks.sites.types import AttentionSites, LayerSites, Site, VectorSite

_ATTENTION = re.compile(r"^(?P<prefix>.+)\.(?:hook_attn_scores|hook_z)$")
_SEVERAL = "as it takes several attentions, which no hook tells apart"
_OVER_A_WINDOW = "as its softmax {} is over windows, and has no row over a sequence's keys"
_NONE = Site("", 0, 2)
_CLOSE = 1e-2  # enough to tell a pattern from scores; the self-check is strict


def locate(model: HookedModel, given: ModelInput) -> AttentionSites:
    """The hook points of each attention that runs, and the attentions that are left out; unchecked.

    Raises:
        UnsupportedModelError: the model has no attention, or a hook point is missing, fires more
            than once, or has an unknown shape.
    """
    prefixes = _attentions(model)
    seen = SeenPass(model, prefixes, given)
    first = seen.begins(prefixes)
    modules = {p: m for p in first if (m := module_of(p)) is not None}
    ordered = [modules[p] for p in sorted(modules, key=first.__getitem__)]
    left_out = [(p, _SEVERAL) for p in sorted(seen.twice) if not is_known(p, modules)]
    if not ordered and not left_out:
        _refuse_without_layers(any(module_of(p) for p in prefixes), seen)
    several = len({m.stack for m in ordered}) > 1 or len({m.block for m in ordered}) < len(ordered)
    layers: list[LayerSites] = []
    soft_cap = max(float(getattr(model.cfg, "attn_scores_soft_cap", 0) or 0), 0.0)
    for index, module in enumerate(ordered):
        layer = index if several else module.block
        try:
            layers.append(_sites(module, layer, seen, soft_cap))
        except UnsupportedModelError:
            window = seen.windows.get(module.prefix)
            if window is None:
                raise
            left_out.append((module.prefix, _OVER_A_WINDOW.format(list(window))))
    if not layers:
        raise UnsupportedModelError(
            "attention sites",
            wanted="an attention with a row of weights over the keys of a sequence",
            got="; ".join(f"{name} left out, {why}" for name, why in left_out),
        )
    return AttentionSites(
        tuple(layers),
        pd.DataFrame(),
        silent=tuple(p for p in prefixes if p not in first),
        outside=tuple(p for p in prefixes if p in first and p not in modules),
        left_out=tuple(left_out),
    )


def _sites(module: Module, layer: int, seen: SeenPass, soft_cap: float) -> LayerSites:
    """The sites of one attention, at its hooks or, where these do not show it, at its products."""
    firings = [f for f in seen.firings if is_of(module.prefix, f)]
    product = seen.products.get(module.prefix)
    finder = _Finder(module, layer, firings, seen.taken.get(module.prefix), soft_cap, product)
    try:
        return finder.sites()
    except UnsupportedModelError:
        if product is None:
            raise
        return finder.bare(product)


def _attentions(model: HookedModel) -> tuple[str, ...]:
    """Prefix of every module with a scores hook or a z hook, such as ``blocks.0.attn``."""
    matches = (_ATTENTION.match(name) for name in model.hook_dict)
    return tuple(dict.fromkeys(match["prefix"] for match in matches if match is not None))


def _refuse_without_layers(hooked: bool, seen: SeenPass) -> NoReturn:
    """Distinguish a model without attention from one whose attention is in no stack of blocks."""
    if hooked:
        raise UnsupportedModelError(
            "attention fires", wanted="hooks of an attention to fire", got="none"
        )
    hidden = "attention of which TransformerLens shows no hook"
    raise UnsupportedModelError(
        "attention sites",
        wanted="a layer with attention (hook points blocks.{l}.attn.hook_attn_scores)",
        got=hidden if seen.attentions else "no attention layer",
    )


def _label(module: Module) -> str:
    """``L5``; ``E5``, ``D5`` of an encoder or decoder, ``X5`` of a cross-attention."""
    kind = {"blocks": "L", "encoder_blocks": "E", "decoder_blocks": "D"}.get(module.stack)
    if "cross" in module.name:
        kind = "X"
    return f"{kind or module.stack.removesuffix('_blocks')}{module.block}"


@dataclass(frozen=True)
class _Finder:
    """Identifies the hook points of one attention."""

    module: Module
    layer: int
    firings: list[Firing]
    taken: Taken | None
    soft_cap: float
    product: Multiplied | None

    def sites(self) -> LayerSites:
        """The sites, not yet verified."""
        prefix = self.module.prefix
        scores, pattern = (self._only(f"hook_{n}") for n in ("attn_scores", "pattern"))
        hooked = self._hooks_show(scores, pattern)
        matrix = scores if hooked else None if self.taken is None else self.taken.scores
        if matrix is None:
            self._refuse_blind()
        n_heads, n_query, n_key = matrix.shape[1:]
        names = [f.name for f in self.firings]
        early = self.firings[: names.index(f"{prefix}.hook_attn_scores") if hooked else None]
        # v may fire after the scores; q and k must fire before them.
        q = self._vector("q", early, n_query, n_heads)
        width = self._width(q.dot)
        k = self._vector("k", early, n_key, None, width)
        v = self._vector("v", self.firings, n_key, None, width)
        n_kv = k.dot.n_heads
        if q.dot.n_heads != n_heads or n_heads % n_kv or n_kv != v.dot.n_heads:
            self._refuse(
                "head counts",
                "query heads as in the scores, a divisor of that for both keys and values",
                f"q {q.dot.n_heads}, k {n_kv}, v {v.dot.n_heads}, scores {n_heads}",
            )
        z = self._only("hook_z")
        return LayerSites(
            layer=self.layer,
            q=q,
            k=k,
            v=v,
            scores=f"{prefix}.hook_attn_scores" if hooked else "",
            pattern=f"{prefix}.hook_pattern" if hooked else "",
            z=None if z is None else self._site(Firing(f"{prefix}.hook_z", z), n_query, n_heads),
            prefix=prefix,
            label=_label(self.module),
            soft_cap=self.soft_cap,
            anchor=None if self.product is None else self.product.anchor,
        )

    def bare(self, product: Multiplied) -> LayerSites:
        """The sites where q, k, v and z are read and written at the products that take them."""
        none = VectorSite(_NONE, _NONE, "none")
        sites = LayerSites(
            layer=self.layer,
            q=none,
            k=none,
            v=none,
            scores="",
            pattern="",
            z=None,
            prefix=self.module.prefix,
            label=_label(self.module),
            soft_cap=self.soft_cap,
            anchor=product.anchor,
        )
        return sites.without_hooks()

    def _only(self, name: str) -> Tensor | None:
        """What fired under this name; None if nothing did."""
        found = [f for f in self.firings if f.name == f"{self.module.prefix}.{name}"]
        if len(found) > 1:
            self._refuse(f"{found[0].name} fires once per forward", "1 firing", str(len(found)))
        return found[0].tensor if found else None

    def _hooks_show(self, scores: Tensor | None, pattern: Tensor | None) -> bool:
        """Whether the scores hook carries scores: whether the pattern is their softmax."""
        if scores is None or pattern is None or scores.ndim != 4 or scores.shape != pattern.shape:
            return False
        order = [f.name.removeprefix(f"{self.module.prefix}.") for f in self.firings]
        if "hook_z" in order and order.index("hook_z") < order.index("hook_pattern"):
            return False  # shown afterwards, when the attention is over
        rows = pattern.double().sum(-1, keepdim=True)  # below 1 where a sink takes its share
        w = scores.double().masked_fill(~visible(scores), -torch.inf)
        apart = (torch.softmax(w, dim=-1) - pattern.double() / rows).abs()
        # An even pattern is its own softmax: it must not pass for scores.
        return bool((apart.nan_to_num(0.0) < _CLOSE).all()) and bool((w != pattern).any())

    def _vector(
        self,
        role: Role,
        firings: list[Firing],
        n_pos: int,
        n_heads: int | None,
        width: int | None = None,
    ) -> VectorSite:
        """The site of q, k or v, among what fired while it could still be changed."""
        names = [f"{self.module.prefix}.{name}" for name in CANDIDATES[role]]
        found = [f for f in firings if f.name in names]
        if not found:
            self._refuse(f"{role} fires before it is used", f"one of {names}", "none")
        for name, times in Counter(f.name for f in found).items():
            if times > 1:
                self._refuse(f"{name} fires once per forward", "1 firing", str(times))
        # In the order of the forward pass: the first is the projection, the last is what is used.
        dot = self._site(found[-1], n_pos, n_heads, width)
        # A projection may hold more than the vectors: a gate beside the queries.
        return VectorSite(self._site(found[0], n_pos, None, width), dot, "none")

    def _width(self, site: Site) -> int:
        """d_head of a site."""
        shape = next(f.shape for f in self.firings if f.name == site.hook)
        return shape[-1] // (site.n_heads if site.head_axis == -1 else 1)

    def _site(
        self, firing: Firing, n_pos: int, n_heads: int | None, width: int | None = None
    ) -> Site:
        """The site of what fired, with its axes identified."""
        site = _axes(firing.name, firing.shape, n_pos, n_heads, width)
        if site is None:
            self._refuse(
                f"shape of {firing.name}",
                f"[batch, {n_pos}, head, d_head], [batch, head, {n_pos}, d_head] or both in one "
                "axis",
                str(list(firing.shape)) if firing.tensor is not None else "no tensor",
            )
        return site

    def _refuse_blind(self) -> NoReturn:
        """Refuse a model where neither a hook nor a softmax showed scores; says what did fire."""
        fired = sorted(f.name.removeprefix(f"{self.module.prefix}.") for f in self.firings)
        self._refuse(
            "scores of the attention",
            "a hook that carries pre-softmax scores, or a softmax taken before hook_z fires",
            f"neither; fired: {', '.join(fired) or 'nothing'}",
        )

    def _refuse(self, check: str, wanted: str, got: str) -> NoReturn:
        raise UnsupportedModelError(check, wanted=wanted, got=got, layer=self.layer)


def _axes(
    name: str, shape: tuple[int, ...], n_pos: int, n_heads: int | None, width: int | None
) -> Site | None:
    """Which axis is which, from the number of positions and, if known, of heads or d_head."""
    if len(shape) == 4:
        axes = [
            axis for axis in (2, 1) if shape[3 - axis] == n_pos and n_heads in (None, shape[axis])
        ]
        if len(axes) == 1:
            return Site(name, shape[axes[0]], axes[0])
    if len(shape) == 3 and shape[1] == n_pos:
        n_heads = n_heads or (shape[2] // width if width else 0)
        if n_heads and shape[2] % n_heads == 0:
            return Site(name, n_heads, -1)
    return None
