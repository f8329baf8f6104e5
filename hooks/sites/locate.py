"""Find every attention's hook points by running the model and looking at what fires.

Nothing here is a table of architectures: names are only candidates, and the order and the shape in
which they fire say what they are. Nothing is verified here; :mod:`hooks.selfcheck` does that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import ROLES, AttentionTap, HookedModel, ModelInput, Role, Taken, hooked
from hooks.sites.scores import visible
from hooks.sites.types import Anchor, LayerSites, Site, VectorSite

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
_ATTENTION = re.compile(r"^(?P<prefix>.+)\.(?:hook_attn_scores|hook_z)$")
_IN_A_STACK = re.compile(r"^(?P<stack>\w*blocks)\.(?P<block>\d+)(?:\.(?P<module>\w+))?$")
_EDGE = re.compile(r"^(?P<module>\w*blocks\.\d+(?:\.\w+)?)\.hook_(?P<side>in|out)$")
_NONE = Site("", 0, 2)
_CLOSE = 1e-2  # enough to tell a pattern from scores; the self-check is strict


@dataclass(frozen=True)
class _Module:
    """One attention module of a stack of blocks: ``{stack}.{block}.{name}``, or the block."""

    prefix: str
    stack: str
    block: int
    name: str


@dataclass(frozen=True)
class _Firing:
    """What a hook point carried, once."""

    name: str
    tensor: Tensor | None  # None: something else than a tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.tensor is None else tuple(self.tensor.shape)


@dataclass(frozen=True)
class _Multiplied:
    """What the products showed of one attention, and of where in the pass it was taken."""

    at: int  # how many hook points had fired
    shape: tuple[int, ...]  # of its scores
    anchor: Anchor


@dataclass(frozen=True)
class Located:
    """The attentions of one forward pass.

    Attributes:
        layers: those in a stack of blocks that ran, in the order of the forward pass.
        silent: attention modules with hooks of which none fired, by name.
        outside: attention modules whose hooks fired, but that are in no stack of blocks.
        left_out: attentions of blocks without a row of weights over keys, and what was seen.
    """

    layers: tuple[LayerSites, ...]
    silent: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def locate(model: HookedModel, given: ModelInput) -> Located:
    """The hook points of each attention that runs, and the attentions that are left out.

    Raises:
        UnsupportedModelError: the model has no attention, or a hook point is missing, fires more
            than once, or has an unknown shape.
    """
    prefixes = _attentions(model)
    seen = _Pass(model, prefixes, given)
    first = seen.begins(prefixes)
    modules = {p: m for p in first if (m := _module(p)) is not None}
    ordered = [modules[p] for p in sorted(modules, key=first.__getitem__)]
    left_out = [(p, _SEVERAL) for p in sorted(seen.twice) if not _known(p, modules)]
    if not ordered and not left_out:
        _refuse_without_layers(any(_module(p) for p in prefixes), seen)
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
    return Located(
        tuple(layers),
        silent=tuple(p for p in prefixes if p not in first),
        outside=tuple(p for p in prefixes if p in first and p not in modules),
        left_out=tuple(left_out),
    )


_SEVERAL = "as it takes several attentions, which no hook tells apart"
_OVER_A_WINDOW = "as its softmax {} is over windows, and has no row over a sequence's keys"


def _known(prefix: str, modules: Iterable[str]) -> bool:
    """Whether this module, or one inside it, has hooks of an attention."""
    return any(f"{name}.".startswith(f"{prefix}.") for name in modules)


def _sites(module: _Module, layer: int, seen: _Pass, soft_cap: float) -> LayerSites:
    """The sites of one attention: at its hooks or, where these do not show it, at its products."""
    firings = [f for f in seen.firings if _of(module.prefix, f)]
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


def _module(prefix: str) -> _Module | None:
    """The module of that prefix; None where it is in no stack of blocks."""
    match = _IN_A_STACK.match(prefix)
    return match and _Module(prefix, match["stack"], int(match["block"]), match["module"] or "")


def _refuse_without_layers(hooked: bool, seen: _Pass) -> NoReturn:
    """Tells a model without attention from one whose attention is in no stack of blocks."""
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


def _label(module: _Module) -> str:
    """``L5``; ``E5``, ``D5`` of an encoder or decoder, ``X5`` of a cross-attention."""
    kind = {"blocks": "L", "encoder_blocks": "E", "decoder_blocks": "D"}.get(module.stack)
    if "cross" in module.name:
        kind = "X"
    return f"{kind or module.stack.removesuffix('_blocks')}{module.block}"


def _of(prefix: str, firing: _Firing) -> bool:
    """Whether the hook point that fired is of this module."""
    return firing.name.startswith(f"{prefix}.")


class _Pass:
    """What one forward pass showed.

    Attributes:
        firings: what the hook points of q, k, v, z, scores and patterns carried.
        taken: the softmax that each attention took before its z, by its module.
        products: what its products showed of it, likewise.
        windows: shape of a softmax that was over no sequence, likewise.
        twice: modules that took several.
        attentions: how many there were, also outside every block.
    """

    def __init__(self, model: HookedModel, prefixes: Iterable[str], given: ModelInput) -> None:
        self.firings: list[_Firing] = []
        self.taken: dict[str, Taken] = {}
        self.products: dict[str, _Multiplied] = {}
        self.windows: dict[str, tuple[int, ...]] = {}
        self.attentions = 0
        self.twice: set[str] = set()
        self._inside: list[tuple[str, int]] = []  # modules that run, and products before them
        self._batch = given.batch
        decoded = given.named.get("decoder_input_ids", given.first)
        self._lengths = {given.first.shape[-1], decoded.shape[-1]}
        self._tap = AttentionTap(self._on_attention, self._on_softmax)
        hooks = [
            (name, self._at_edge(match["module"], match["side"]))
            for name in model.hook_dict
            if (match := _EDGE.match(name)) is not None
        ]
        hooks += [(name, self._recorder(name)) for name in self._points(model, prefixes)]
        with torch.no_grad(), self._tap, hooked(model, hooks):
            _first_pass(model, given)

    def begins(self, prefixes: Iterable[str]) -> dict[str, float]:
        """Where in the pass each attention begins that ran, by its module."""
        first: dict[str, float] = {}
        for prefix in prefixes:
            at = next((i for i, f in enumerate(self.firings) if _of(prefix, f)), None)
            if at is not None:
                first[prefix] = float(at)
        for prefix, product in self.products.items():
            if not _known(prefix, list(first)):
                first.setdefault(prefix, product.at - 0.5)  # before the hook that fires next
        return first

    @staticmethod
    def _points(model: HookedModel, prefixes: Iterable[str]) -> list[str]:
        """One name for each hook point that may carry something: aliases would fire twice."""
        names = ["hook_attn_scores", "hook_pattern", "hook_z"]
        names += [name for candidates in _CANDIDATES.values() for name in candidates]
        hook_dict = model.hook_dict
        by_point: dict[int, str] = {}
        for prefix in prefixes:
            for name in names:
                point = hook_dict.get(f"{prefix}.{name}")
                if point is not None:
                    by_point.setdefault(id(point), f"{prefix}.{name}")
        return list(by_point.values())

    def _recorder(self, name: str) -> Any:
        prefix = name.rsplit(".", 1)[0]

        def record(tensor: Any, hook: Any) -> None:
            kept = tensor.clone() if isinstance(tensor, Tensor) else None
            self.firings.append(_Firing(name, kept))
            if name == f"{prefix}.hook_z":
                latest = self._tap.take(self._batch)
                if latest is not None:
                    self.taken[prefix] = latest

        return record

    def _at_edge(self, module: str, side: str) -> Any:
        def enter(tensor: Any, hook: Any) -> None:
            self._inside.append((module, len(self._tap.products)))

        def leave(tensor: Any, hook: Any) -> None:
            while any(name == module for name, _ in self._inside):
                self._inside.pop()

        return enter if side == "in" else leave

    def _on_softmax(self, shape: tuple[int, ...]) -> None:
        self.attentions += 1
        if self._inside and shape[-2] not in self._lengths:
            self.windows.setdefault(self._inside[-1][0], shape)

    def _on_attention(self, taken: Taken) -> None:
        """Notes an attention of the innermost module that runs; two in one can't be told apart."""
        self.attentions += 1
        if not self._inside or taken.q is None or taken.k is None:
            return
        module, start = self._inside[-1]
        if module in self.products or module in self.twice:
            self.twice.add(module)
            self.products.pop(module, None)
            return
        batch, n_heads, n_query, d_head = taken.q.shape
        if batch != self._batch:
            return
        before = self._tap.products[start:]
        mine = [(*s[:3], s[-1]) == (batch, n_heads, n_query, d_head) for s in before]
        if taken.fused is None:  # the last product is that of pattern and values
            mine = mine[: _last_product(before, taken.shape) + 1]
        self.products[module] = _Multiplied(
            len(self.firings),
            taken.shape,
            Anchor(
                f"{module}.hook_in",
                0 if taken.fused is not None else sum(mine),
                d_head,
                _sharing(taken.k),
            ),
        )


def _last_product(products: list[tuple[int, ...]], shape: tuple[int, ...]) -> int:
    """Index of the last of these whose result has the scores' shape."""
    return max(i for i, s in enumerate(products) if s[:4] == shape)


def _first_pass(model: HookedModel, given: ModelInput) -> None:
    """A pass of the model as it is, with nothing of ours but hooks that look on."""
    try:
        given.run(model)
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        said = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(
            "a forward pass of the model",
            wanted="one that runs on a few tokens",
            got=f"{type(error).__name__}: {said[0]}",
        ) from error


class _Finder:
    """Tells the hook points of one attention apart."""

    def __init__(
        self,
        module: _Module,
        layer: int,
        firings: list[_Firing],
        taken: Taken | None,
        soft_cap: float,
        product: _Multiplied | None = None,
    ) -> None:
        self.module = module
        self.layer = layer
        self.firings = firings
        self.taken = taken
        self.soft_cap = soft_cap
        self.product = product

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
            z=None if z is None else self._site(_Firing(f"{prefix}.hook_z", z), n_query, n_heads),
            prefix=prefix,
            label=_label(self.module),
            soft_cap=self.soft_cap,
            anchor=None if self.product is None else self.product.anchor,
        )

    def bare(self, product: _Multiplied) -> LayerSites:
        """The sites where q, k, v and z are read and written at the products that take them."""
        sites = LayerSites(
            layer=self.layer,
            q=VectorSite(_NONE, _NONE, "none"),
            k=VectorSite(_NONE, _NONE, "none"),
            v=VectorSite(_NONE, _NONE, "none"),
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
        """What fired under this name; None for nothing."""
        found = [f for f in self.firings if f.name == f"{self.module.prefix}.{name}"]
        if len(found) > 1:
            self._refuse(f"{found[0].name} fires once per forward", "1 firing", str(len(found)))
        return found[0].tensor if found else None

    def _hooks_show(self, scores: Tensor | None, pattern: Tensor | None) -> bool:
        """Whether the scores hook carries scores, as its pattern is their softmax."""
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
        firings: list[_Firing],
        n_pos: int,
        n_heads: int | None,
        width: int | None = None,
    ) -> VectorSite:
        """Where one of q, k, v is, among what fired while it could still be changed."""
        names = [f"{self.module.prefix}.{name}" for name in _CANDIDATES[role]]
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
        self, firing: _Firing, n_pos: int, n_heads: int | None, width: int | None = None
    ) -> Site:
        """The site of what fired, its axes told apart."""
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
        """Neither a hook nor a softmax showed scores: says what did fire."""
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


def _sharing(keys: Float[Tensor, "batch head key d_head"]) -> tuple[int, ...]:
    """Key/value head of each query head, by comparing what they read; in the order they come."""
    leaders: list[int] = []
    out = []
    for head in range(keys.shape[1]):
        same = [i for i, h in enumerate(leaders) if torch.equal(keys[:, h], keys[:, head])]
        if not same:
            leaders.append(head)
        out.append(same[0] if same else len(leaders) - 1)
    return tuple(out)
