"""Does noise do on this model what the noise model says? Asked of the model itself.

One forward pass over copies of one short prompt. Copy 0 is clean; for each layer there is one copy
in which only that layer's q is noised, one for k, one for v (its scores edited too), and one with q
set to zero (what remains of the scores is the bias; noised at the projection too). So every
layer is judged on its clean inputs, in one pass, and its prediction

    softmax(cap((1 + kq)(1 + k_t) s_t + b_t))

from the clean copy is held against the pattern that the noised copy shows.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hooks import _state
from hooks.errors import UnsupportedModelError
from hooks.scores import ScoreParts, expand_factors, qk_product, split, visible
from hooks.sites import (
    ROLES,
    AttentionSites,
    HookedModel,
    LayerSites,
    Role,
    Shield,
    VectorSite,
    locate,
    short_tokens,
)

_HALF_WIDTH = 0.5  # of the check's own noise: large, so that its effect stands above rounding
_MARGIN = 8.0  # an effect must exceed its tolerance this many times to prove anything
_ATTEMPTS = 3
_LAYERS_PER_PASS = 8  # bounds the logits of the copies, which nobody reads
_HALF_PRECISION = 1e-4  # eps above this: bfloat16, float16
_KINDS = ("q", "k", "v", "zero")

_remembered: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], AttentionSites]] = (
    weakref.WeakKeyDictionary()
)


def attention_sites(model: HookedModel) -> AttentionSites:
    """Where q, k, v, scores and pattern are in each attention layer, verified on the model.

    Runs a self-check (a few short tokens, some forward passes): every hook point fires once per
    forward; scaling q, k and v there changes what follows; the pattern predicted from the clean
    scores under a drawn noise equals the pattern observed under that noise, in every layer. The
    result is remembered per model, attention implementation, compatibility mode, dtype, device and
    hooks on the sites, and made again when one of them changes.

    Args:
        model: a TransformerBridge or anything with ``cfg``, ``hook_dict``, ``hooks`` and
            ``run_with_hooks``.

    Returns:
        :class:`AttentionSites`, one :class:`LayerSites` per attention layer.

    Raises:
        UnsupportedModelError: a check failed, or its effect drowns in rounding. The message names
            layer, check, wanted and got.
    """
    unreadable = _state.refuse_unreadable(model)
    if unreadable:
        raise UnsupportedModelError(
            "readable weights", wanted="floating-point weights in memory", got=unreadable
        )
    key = _configuration(model)
    known = _remembered.setdefault(model, {})
    if key not in known:
        with _state.evaluating(model):
            known[key] = _verify(model)
    return known[key]


def _configuration(model: HookedModel) -> tuple[Any, ...]:
    inner = getattr(model, "original_model", None)
    implementations = (
        getattr(getattr(inner, "config", None), "_attn_implementation", None),
        getattr(model.cfg, "attn_implementation", None),
        getattr(model.cfg, "attention_implementation", None),
    )
    flags = tuple(getattr(model.cfg, name, None) for name in ("use_split_qkv_input", "use_attn_in"))
    points = {id(p): p for n, p in model.hook_dict.items() if "attn" in n}
    # A hook of the user's own may change what a site carries.
    user_hooks = tuple(sorted(id(h) for p in points.values() for h in getattr(p, "fwd_hooks", ())))
    return (
        *implementations,
        bool(getattr(model, "compatibility_mode", False)),
        _state.model_dtype(model),
        str(next(iter(p.device for m in _state.modules(model) for p in m.parameters()), "cpu")),
        flags,
        user_hooks,
    )


def _verify(model: HookedModel) -> AttentionSites:
    layers = locate(model)
    undecided: UnsupportedModelError | None = None
    for attempt in range(_ATTEMPTS):
        try:
            return _check_all(model, layers, attempt)
        except _Undecided as error:  # another prompt may show more
            undecided = error.refusal
    assert undecided is not None
    raise undecided


class _Undecided(Exception):
    def __init__(self, refusal: UnsupportedModelError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass
class _Seen:
    """What one layer's hooks showed: row 0 is the clean copy, then this layer's own copies."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    scores: Tensor | None = None
    pattern: Tensor | None = None
    z: Tensor | None = None
    firings: int = 0


def _check_all(model: HookedModel, layers: tuple[LayerSites, ...], attempt: int) -> AttentionSites:
    verified: list[LayerSites] = []
    table: list[dict[str, Any]] = []
    for at in range(0, len(layers), _LAYERS_PER_PASS):
        checks = _check_some(model, layers[at : at + _LAYERS_PER_PASS], attempt)
        verified += [check.judge() for check in checks]
        table += [row for check in checks for row in check.table]
    return AttentionSites(tuple(verified), pd.DataFrame(table))


def _check_some(
    model: HookedModel, layers: tuple[LayerSites, ...], attempt: int
) -> list[_LayerCheck]:
    heads = {n for s in layers for n in (s.n_heads, s.n_kv_heads)}
    tokens = short_tokens(model, 1 + len(_KINDS) * len(layers), heads, attempt)
    generator = torch.Generator().manual_seed(2 + attempt)
    eps = torch.finfo(_state.model_dtype(model)).eps
    checks = [_LayerCheck(s, i, tokens, generator, eps) for i, s in enumerate(layers)]
    fwd_hooks = [hook for check in checks for hook in check.hooks()]
    if checks[-1].sites.z is not None:
        fwd_hooks.append((checks[-1].sites.z.hook, _finish))  # nothing later is looked at
    with warnings.catch_warnings():
        # TransformerLens warns where an edit of the scores is discarded: that is what we test.
        warnings.filterwarnings("ignore", message=".*has already consumed the original values")
        with contextlib.suppress(_state.Finished), model.hooks(fwd_hooks=fwd_hooks):
            model(tokens)  # type: ignore[operator]
    return checks


def _finish(tensor: Tensor, hook: Any) -> None:
    raise _state.Finished


class _LayerCheck:
    """Hooks, record and verdict of one layer."""

    def __init__(
        self,
        sites: LayerSites,
        index: int,
        tokens: Tensor,
        generator: torch.Generator,
        eps: float,
    ) -> None:
        self.sites = sites
        self.eps = eps
        first = 1 + index * len(_KINDS)
        self.copy = {kind: first + i for i, kind in enumerate(_KINDS)}
        self.rows = [0, *self.copy.values()]
        self.batch, self.n_pos = tokens.shape
        self.seen = _Seen()
        self.table: list[dict[str, Any]] = []
        self.factor = {}
        for role in ROLES:
            site = sites.vector(role)
            shape = (self.n_pos, max(site.dot.n_heads, site.projection.n_heads))
            noise = 2 * torch.rand(shape, generator=generator) - 1
            self.factor[role] = (1 + _HALF_WIDTH * noise).to(tokens.device)

    # -- hooks ------------------------------------------------------------------------------

    def hooks(self) -> list[tuple[str, Any]]:
        entries: list[tuple[str, Any]] = []
        for role in ROLES:
            site = self.sites.vector(role)
            if site.projection != site.dot:
                entries.append((site.projection.hook, self._at_projection(role, site)))
            entries.append((site.dot.hook, self._at_dot(role, site)))
        entries.append((self.sites.scores, self._at_scores))
        entries.append((self.sites.pattern, self._at_pattern))
        if self.sites.z is not None:
            entries.append((self.sites.z.hook, self._at_z))
        return entries

    def _multiply(self, tensor: Tensor, role: Role, site: Any, copies: dict[int, float]) -> Tensor:
        factor = torch.ones(self.batch, self.n_pos, site.n_heads, device=tensor.device)
        for copy, strength in copies.items():
            drawn = self.factor[role][:, : site.n_heads].to(tensor.device)
            factor[copy] = drawn if strength else 0.0
        scaled: Tensor = site.scale(tensor, factor)
        return scaled

    def _at_projection(self, role: Role, site: VectorSite) -> Any:
        def hook(tensor: Tensor, hook: Any) -> Tensor:
            return self._multiply(tensor, role, site.projection, {self.copy["zero"]: 1.0})

        return hook

    def _at_dot(self, role: Role, site: VectorSite) -> Any:
        copies = {self.copy[role]: 1.0}
        if role == "q":
            copies[self.copy["zero"]] = 0.0

        def hook(tensor: Tensor, hook: Any) -> Tensor:
            if tensor.shape[0] != self.batch:
                raise UnsupportedModelError(
                    f"{site.dot.hook} keeps the batch",
                    wanted=f"{self.batch} prompts",
                    got=f"{tensor.shape[0]}",
                    layer=self.sites.layer,
                )
            setattr(self.seen, role, site.dot.by_position(tensor)[self.rows].clone())
            self.seen.firings += 1
            return self._multiply(tensor, role, site.dot, copies)

        return hook

    def _at_scores(self, tensor: Tensor, hook: Any) -> Tensor:
        self.seen.scores = tensor[self.rows].clone()
        self.seen.firings += 1
        # Turned upside down where visible: no softmax can miss that.
        edited = tensor.clone()
        row = tensor[self.copy["v"]]
        edited[self.copy["v"]] = torch.where(visible(row), -row, row)
        return edited

    def _at_pattern(self, tensor: Tensor, hook: Any) -> None:
        self.seen.pattern = tensor[self.rows].clone()
        self.seen.firings += 1

    def _at_z(self, tensor: Tensor, hook: Any) -> None:
        assert self.sites.z is not None
        self.seen.z = self.sites.z.by_position(tensor)[self.rows].clone()

    # -- verdict ----------------------------------------------------------------------------

    def judge(self) -> LayerSites:
        seen, layer = self.seen, self.sites.layer
        if seen.firings != len(ROLES) + 2:
            raise UnsupportedModelError(
                "every hook point fires once per forward",
                wanted=f"{len(ROLES) + 2} firings",
                got=str(seen.firings),
                layer=layer,
            )
        assert seen.scores is not None
        assert seen.pattern is not None
        assert seen.q is not None
        assert seen.k is not None
        assert seen.v is not None
        scores, pattern = seen.scores.double(), seen.pattern.double()
        q, k, v = seen.q.double(), seen.k.double(), seen.v.double()
        self._refuse_pattern_as_scores(scores, seen.scores)
        sites = self._measure_bias(seen.scores, q, k)
        clean = split(sites, seen.scores[:1], q[:1], k[:1], dtype=torch.float64)
        tolerance = self._score_tolerance(clean, q, k)
        self._compare(
            "pattern = softmax(scores)",
            clean.scores(),
            pattern[:1],
            pattern[:1],
            tolerance,
            must_act=False,
        )
        for role, factors in (
            ("q", (self.factor["q"], None)),
            ("k", (None, self.factor["k"])),
        ):
            fq, fk = (None if f is None else f[None].double() for f in factors)
            factor = expand_factors(sites, fq, fk)
            self._compare(
                f"pattern under {role}-noise, predicted from clean scores",
                clean.scores(factor),
                pattern[self._at(role)],
                pattern[:1],
                tolerance * (1 + _HALF_WIDTH),
            )
        self._check_values(sites, pattern, v)
        return replace(
            sites,
            scores_editable=self._editable(clean, pattern, tolerance),
            q=self._shielded("q", q),
            k=self._shielded("k", k),
            v=self._shielded("v", v),
        )

    def _at(self, kind: str) -> slice:
        index = 1 + _KINDS.index(kind)
        return slice(index, index + 1)

    def _record(self, check: str, error: float, effect: float, tolerance: float) -> None:
        self.table.append(
            {
                "layer": self.sites.layer,
                "check": check,
                "error": error,
                "effect": effect,
                "tolerance": tolerance,
            }
        )

    def _refuse_pattern_as_scores(self, scores: Tensor, raw: Tensor) -> None:
        seen = visible(raw)
        row_sums = scores.masked_fill(~seen, 0).sum(-1)
        if (scores[seen] >= 0).all() and torch.allclose(
            row_sums, torch.ones_like(row_sums), atol=1e-2
        ):
            raise UnsupportedModelError(
                f"{self.sites.scores} carries pre-softmax scores",
                wanted="scores",
                got="rows that sum to 1: the softmaxed pattern",
                layer=self.sites.layer,
            )

    def _measure_bias(self, scores: Tensor, q: Tensor, k: Tensor) -> LayerSites:
        """What is left of the scores with q at zero is what noise does not scale."""
        shown = visible(scores)
        plain = replace(self.sites, has_bias=False)
        bias = split(plain, scores[self._at("zero")], dtype=torch.float64).s
        s = split(plain, scores[:1], dtype=torch.float64).s - bias
        product = qk_product(self.sites, q[:1], k[:1])
        where = shown[:1] & shown[self._at("zero")]
        x, y = product[where], s[where]
        scale = float((x * y).sum() / (x * x).sum()) if bool((x != 0).any()) else 0.0
        level = float(y.abs().max()) if y.numel() else 0.0
        return replace(
            self.sites,
            has_bias=bool(bias.abs().max() > 8 * self.eps * max(level, float(bias.abs().max()))),
            score_scale=scale,
        )

    def _score_tolerance(self, clean: ScoreParts, q: Tensor, k: Tensor) -> Tensor:
        """Rounding of one score: of the terms of the dot product and of their sum."""
        lengths = torch.einsum("bqh,bkh->bhqk", q[:1].norm(dim=-1), self._keys(k[:1].norm(dim=-1)))
        terms = lengths * abs(self.sites.score_scale or 1.0) * 4 / q.shape[-1] ** 0.5
        whole = clean.scores().masked_fill(~clean.mask, 0).abs()
        generous = (
            0.5 if self.eps > _HALF_PRECISION else 64.0
        )  # half precision has no room for more
        rounding: Tensor = generous * self.eps * (whole + terms).masked_fill(~clean.mask, 0)
        return rounding.amax(-1, keepdim=True)

    def _keys(self, per_kv_head: Tensor) -> Tensor:
        return per_kv_head[:, :, list(self.sites.kv_head_of)]

    def _compare(
        self,
        check: str,
        predicted_scores: Tensor,
        observed: Tensor,
        clean: Tensor,
        tolerance: Tensor,
        *,
        must_act: bool = True,
    ) -> None:
        predicted = torch.softmax(predicted_scores, dim=-1)
        p = torch.maximum(predicted, observed)
        # An error delta of every score moves p by at most about 2 p (1 - p) delta.
        allowed = 2 * p * (1 - p) * tolerance.expm1() + self.eps * p + 1e-6
        error = (predicted - observed).abs()
        effect = (observed - clean).abs()
        at = int((error - allowed).argmax())
        worst, limit = float(error.flatten()[at]), float(allowed.flatten()[at])
        self._record(check, float(error.max()), float(effect.max()), limit)
        if not worst <= limit:  # NaN fails too
            head, row = divmod(at // self.n_pos, self.n_pos)
            raise UnsupportedModelError(
                check,
                wanted=f"a difference of at most {limit:.2g}",
                got=f"{worst:.2g} (head {head}, row {row})",
                layer=self.sites.layer,
            )
        if must_act and not bool((effect > _MARGIN * allowed).any()):
            at = int((effect - _MARGIN * allowed).argmax())
            needed = _MARGIN * float(allowed.flatten()[at])
            self._undecided(check, float(effect.flatten()[at]), needed)

    def _undecided(self, check: str, effect: float, needed: float) -> None:
        raise _Undecided(
            UnsupportedModelError(
                f"{check}: not verifiable",
                wanted=f"an effect above {needed:.2g}, so that rounding can't hide an error",
                got=f"{effect:.2g}",
                layer=self.sites.layer,
            )
        )

    def _check_values(self, sites: LayerSites, pattern: Tensor, v: Tensor) -> None:
        if self.seen.z is None:
            raise UnsupportedModelError(
                "v-noise changes what follows",
                wanted="hook_z to fire once",
                got="none",
                layer=sites.layer,
            )
        z = self.seen.z.double()
        values = self._keys(v[:1] * self.factor["v"][None, :, :, None].double())
        predicted = torch.einsum("bhqk,bkhd->bqhd", pattern[self._at("v")], values)
        observed, clean = z[self._at("v")], z[:1]
        size = torch.einsum("bhqk,bkhd->bqhd", pattern[self._at("v")], values.abs())
        allowed = (2.0 if self.eps > _HALF_PRECISION else 64.0) * self.eps * size + 1e-12
        error, effect = (predicted - observed).abs(), (observed - clean).abs()
        at = int((error - allowed).argmax())
        worst, limit = float(error.flatten()[at]), float(allowed.flatten()[at])
        check = "z under v-noise, predicted from pattern and clean v"
        self._record(check, float(error.max()), float(effect.max()), limit)
        if not worst <= limit:
            raise UnsupportedModelError(
                check,
                wanted=f"a difference of at most {limit:.2g}",
                got=f"{worst:.2g}",
                layer=sites.layer,
            )
        if not bool((effect > _MARGIN * allowed).any()):
            at = int((effect - _MARGIN * allowed).argmax())
            needed = _MARGIN * float(allowed.flatten()[at])
            self._undecided(check, float(effect.flatten()[at]), needed)

    def _editable(self, clean: ScoreParts, pattern: Tensor, tolerance: Tensor) -> bool:
        upside_down = (-clean.scores()).masked_fill(~clean.mask, -torch.inf)
        predicted = torch.softmax(upside_down, dim=-1)
        error = (predicted - pattern[self._at("v")]).abs()
        allowed = 2 * predicted * (1 - predicted) * tolerance.expm1() + self.eps * predicted + 1e-6
        acts = (pattern[self._at("v")] - pattern[:1]).abs() > _MARGIN * allowed
        return bool((error <= allowed).all() and acts.any())

    def _shielded(self, role: Role, vectors: Tensor) -> VectorSite:
        """How noise at the projection arrives at the dot product."""
        site = self.sites.vector(role)
        if site.projection == site.dot:
            return site
        before = vectors[:1].norm(dim=-1)
        after = vectors[self._at("zero")].norm(dim=-1)
        drawn = self.factor[role][None, :, : site.dot.n_heads].double()
        alive = before > 0
        ratio = (after / before)[alive]
        wanted = drawn.expand_as(before)[alive]
        near = max(64 * self.eps, 1e-3)  # a norm's eps lets a little through
        shield: Shield = "mixed"
        if ratio.numel() and bool(((ratio - wanted).abs() < near).all()):
            shield = "none"
        elif ratio.numel() and bool(((ratio - 1).abs() < 0.05).all()):
            shield = "removed"
        return replace(site, shield=shield)
