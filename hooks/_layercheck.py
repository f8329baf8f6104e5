"""Verdict of the self-check on one layer: what its hooks showed against what the noise model says.

See :mod:`hooks.selfcheck` for the copies of the prompt that a layer is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.scores import ScoreParts, expand_factors, qk_product, split, visible
from hooks.sites import ROLES, LayerSites, Role, Shield, VectorSite

KINDS = ("q", "k", "v", "zero")
"""A layer's own copies of the prompt: noise on q; on k; on v, and scores edited; q set to zero."""

_HALF_WIDTH = 0.5  # of the check's own noise: large, so that its effect stands above rounding
_MARGIN = 8.0  # an effect must exceed its tolerance this many times to prove anything
_HALF_PRECISION = 1e-4  # eps above this: bfloat16, float16


class Undecided(Exception):
    """This prompt proves nothing; another may."""

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


class LayerCheck:
    """Hooks, record and verdict of one layer."""

    def __init__(
        self,
        sites: LayerSites,
        index: int,
        tokens: Tensor,
        generator: torch.Generator,
        eps: float,
        *,
        causal: bool = True,
        window: int = 0,
    ) -> None:
        self.sites = sites
        self.eps = eps
        self.causal = causal
        self.window = window
        first = 1 + index * len(KINDS)
        self.copy = {kind: first + i for i, kind in enumerate(KINDS)}
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
        """Hooks that noise this layer's copies and keep what its hook points show."""
        entries: list[tuple[str, Any]] = []
        for role in ROLES:
            site = self.sites.vector(role)
            if site.projection != site.dot:
                entries.append((site.projection.hook, self._at_projection(role, site)))
            entries.append((site.dot.hook, self._at_dot(role, site)))
        if not self.sites.fused:
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
        self.seen.firings += 1

    # -- verdict ----------------------------------------------------------------------------

    def judge(self) -> LayerSites:
        """The layer's sites with what was measured, or the refusal."""
        seen = self.seen
        self._fired(len(ROLES) + 2 + (self.sites.z is not None))
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

    def _fired(self, wanted: int) -> None:
        if self.seen.firings != wanted:
            raise UnsupportedModelError(
                "every hook point fires once per forward",
                wanted=f"{wanted} firings",
                got=str(self.seen.firings),
                layer=self.sites.layer,
            )

    def _at(self, kind: str) -> slice:
        index = 1 + KINDS.index(kind)
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
        raise Undecided(
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
        size = torch.einsum("bhqk,bkhd->bqhd", pattern[self._at("v")], values.abs())
        allowed = (2.0 if self.eps > _HALF_PRECISION else 64.0) * self.eps * size + 1e-12
        check = "z under v-noise, predicted from pattern and clean v"
        self._compare_values(check, predicted, z[self._at("v")], z[:1], allowed)

    def _compare_values(
        self, check: str, predicted: Tensor, observed: Tensor, clean: Tensor, allowed: Tensor
    ) -> None:
        error, effect = (predicted - observed).abs(), (observed - clean).abs()
        at = int((error - allowed).argmax())
        worst, limit = float(error.flatten()[at]), float(allowed.flatten()[at])
        self._record(check, float(error.max()), float(effect.max()), limit)
        if not worst <= limit:  # NaN fails too
            raise UnsupportedModelError(
                check,
                wanted=f"a difference of at most {limit:.2g}",
                got=f"{worst:.2g}",
                layer=self.sites.layer,
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


class FusedLayerCheck(LayerCheck):
    """The same for an attention that keeps no scores (sdpa): z is predicted instead.

    z = softmax(c (1 + kq)(1 + k_t) q.k) (1 + v_t) v from the clean q, k and v, with c measured at
    the second position, where the pattern is a single number.
    """

    def judge(self) -> LayerSites:
        """The layer's sites with what was measured, or the refusal."""
        seen = self.seen
        self._fired(len(ROLES) + 1)
        assert seen.q is not None
        assert seen.k is not None
        assert seen.v is not None
        assert seen.z is not None
        q, k, v, z = (x.double() for x in (seen.q, seen.k, seen.v, seen.z))
        scale = self._measure_scale(q[:1], k[:1], v[:1], z[:1])
        for role in ROLES:
            factors: dict[Role, Tensor] = {role: self.factor[role][None].double()}
            predicted, size = self._predict(q[:1], k[:1], v[:1], scale, factors)
            # A score's rounding moves p, and with it z, by about as much relative to |v|.
            rounding = 64.0 * self.eps * (1 + abs(scale) * float(q.norm(dim=-1).max()))
            rounding *= float(k.norm(dim=-1).max())
            allowed = size * min(rounding, 1.0) + 1e-12
            self._compare_values(
                f"z under {role}-noise, predicted from clean q, k and v",
                predicted,
                z[self._at(role)],
                z[:1],
                allowed,
            )
        return replace(
            self.sites,
            score_scale=scale,
            q=self._shielded("q", q),
            k=self._shielded("k", k),
            v=self._shielded("v", v),
        )

    def _measure_scale(self, q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> float:
        """Scale c, from the row with two keys: z = p v_0 + (1 - p) v_1, logit p = c (s_0 - s_1)."""
        values = self._keys(v)[0]
        if not self.causal:
            raise UnsupportedModelError(
                "scale of the scores",
                wanted="causal attention, whose second row shows it, or eager attention",
                got="bidirectional attention without a scores hook",
                layer=self.sites.layer,
            )
        apart = values[0] - values[1]
        p = ((z[0, 1] - values[1]) * apart).sum(-1) / (apart * apart).sum(-1)
        product = qk_product(self.sites, q, k)[0, :, 1]
        gap = product[:, 0] - product[:, 1]
        logit = torch.logit(p.clamp(1e-12, 1 - 1e-12))
        # Least squares over heads; a saturated p says nothing.
        clear = (p > 1e-4) & (p < 1 - 1e-4)
        if not bool(clear.any()):
            self._undecided("scale of the scores", 0.0, 1e-4)
        return float((logit * gap)[clear].sum() / (gap * gap)[clear].sum())

    def _predict(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, factors: dict[Role, Tensor]
    ) -> tuple[Tensor, Tensor]:
        scores = qk_product(self.sites, q, k) * scale
        scores = scores * expand_factors(self.sites, factors.get("q"), factors.get("k"))
        at = torch.arange(self.n_pos, device=scores.device)
        behind = at[:, None] - at[None, :]
        hidden = behind < 0
        if self.window:
            hidden |= behind >= self.window
        pattern = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        noisy = v * factors["v"][..., None] if "v" in factors else v
        values = self._keys(noisy)
        average = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        return average, torch.einsum("bhqk,bkhd->bqhd", pattern, values.abs())
