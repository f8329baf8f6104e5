"""Verdict of the self-check on one layer: what its hooks showed against what the noise model says.

See :mod:`hooks.selfcheck` for the copies of the prompt that a layer is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooks._tap import AttentionTap, Factors, Taken
from hooks._valuecheck import HALF_PRECISION, MARGIN, ValueCheck
from hooks.errors import UnsupportedModelError
from hooks.scores import ScoreParts, expand_factors, qk_product, split, visible
from hooks.sites import ROLES, Averaging, LayerSites, Role, Shield, Site, VectorSite

KINDS = ("q", "k", "v", "zero")
"""A layer's own copies of the prompt: noise on q; on k; on v, and scores edited; q set to zero."""

_HALF_WIDTH = 0.5  # of the check's own noise: large, so that its effect stands above rounding
_SAME_PRODUCT = 0.1  # a score differs from its product by rounding, or by much more
_SUM_TO_ONE = 1e-5  # a row of a pattern sums to one up to this


class Undecided(Exception):
    """This prompt proves nothing; another may."""

    def __init__(self, refusal: UnsupportedModelError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Unpredicted(UnsupportedModelError):
    """The pattern under noise is not the one predicted from the clean scores."""


def without_hooks(sites: LayerSites) -> LayerSites:
    """The same layer with q and k taken where they enter the dot product, behind every hook."""
    bare = {
        role: replace(sites.vector(role), dot=Site("", sites.vector(role).dot.n_heads, 2))
        for role in ROLES[:2]
    }
    return replace(sites, q=bare["q"], k=bare["k"])


@dataclass
class _Seen:
    """What one layer's hooks showed: row 0 is the clean copy, then this layer's own copies."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    scores: Tensor | None = None
    pattern: Tensor | None = None
    z: Tensor | None = None
    fused: bool = False
    firings: int = 0


class LayerCheck:
    """Hooks, record and verdict of one layer."""

    def __init__(
        self,
        sites: LayerSites,
        index: int,
        batch: int,
        generator: torch.Generator,
        eps: float,
        tap: AttentionTap | None,
    ) -> None:
        self.sites = sites
        self.eps = eps
        self.batch = batch
        self.tap = tap
        self.generator = generator
        first = 1 + index * len(KINDS)
        self.copy = {kind: first + i for i, kind in enumerate(KINDS)}
        self.rows = [0, *self.copy.values()]
        self.seen = _Seen()
        self.table: list[dict[str, Any]] = []
        self.factor: dict[Role, Tensor] = {}
        self.miswritten: UnsupportedModelError | None = None

    # -- hooks ------------------------------------------------------------------------------

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks that noise this layer's copies and keep what its hook points show."""
        entries: list[tuple[str, Any]] = []
        for role in ROLES:
            site = self.sites.vector(role)
            if site.projection != site.dot and site.projection.hooked:
                entries.append((site.projection.hook, self._at_projection(role, site)))
            if site.dot.hooked:
                entries.append((site.dot.hook, self._at_dot(role, site)))
        if self.bare:
            first = self.sites.q.dot if self.sites.q.dot.hooked else self.sites.q.projection
            entries.append((first.hook, self._arm(first)))
        if not self.sites.tapped:
            entries.append((self.sites.scores, self._at_scores))
            entries.append((self.sites.pattern, self._at_pattern))
        if self.sites.z is not None:
            entries.append((self.sites.z.hook, self._at_z))
        return entries

    @property
    def bare(self) -> tuple[Role, ...]:
        """Which of q and k have no hook where they enter the dot product."""
        return tuple(r for r in ROLES[:2] if not self.sites.vector(r).dot.hooked)

    def _drawn(self, role: Role, site: Site, n_pos: int, device: torch.device) -> Tensor:
        """This role's factors ``[pos, head]``, drawn when its number of positions is known."""
        if role not in self.factor:
            vector = self.sites.vector(role)
            n_heads = max(vector.dot.n_heads, vector.projection.n_heads)
            noise = 2 * torch.rand(n_pos, n_heads, generator=self.generator) - 1
            self.factor[role] = (1 + _HALF_WIDTH * noise).to(device)
        return self.factor[role][:, : site.n_heads].to(device)

    def _arm(self, first: Site) -> Any:
        """A hook that makes the tap multiply what no hook point carries."""

        def hook(tensor: Tensor, hook: Any) -> None:
            assert self.tap is not None
            n_pos, n_heads = first.n_pos(tensor), self.sites.n_heads
            factors: dict[Role, Tensor] = {}
            for role in ROLES[:2]:
                factors[role] = torch.ones(self.batch, n_pos, n_heads, device=tensor.device)
            for role in self.bare:
                site = self.sites.vector(role).dot
                drawn = self._drawn(role, site, n_pos, tensor.device)
                shared = drawn if role == "q" else drawn[:, list(self.sites.kv_head_of)]
                factors[role][self.copy[role]] = shared
            if "q" in self.bare:
                factors["q"][self.copy["zero"]] = 0.0
            self.tap.arm(Factors(factors["q"], factors["k"]))

        return hook

    def at_dot(self, role: Role) -> Tensor:
        """This role's factors on the vectors that enter the dot product, ``[1, pos, head]``."""
        return self.factor[role][None, :, : self.sites.vector(role).dot.n_heads].double()

    def _multiply(self, tensor: Tensor, role: Role, site: Site, copies: dict[int, float]) -> Tensor:
        drawn = self._drawn(role, site, site.n_pos(tensor), tensor.device)
        factor = torch.ones(self.batch, *drawn.shape, device=tensor.device)
        for copy, strength in copies.items():
            factor[copy] = drawn if strength else 0.0
        scaled: Tensor = site.scale(tensor, factor)
        wanted = site.by_position(tensor).double() * factor[..., None].double()
        error = (site.by_position(scaled).double() - wanted).abs()
        if not bool((error <= 2 * self.eps * wanted.abs() + 1e-30).all()):
            self.miswritten = UnsupportedModelError(
                f"what is written at {site.hook}",
                wanted="each vector times its factor",
                got=f"a difference of {float(error.max()):.2g}",
                layer=self.sites.layer,
            )
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
        taken = self.tap.take(self.batch) if self.tap is not None and self.sites.tapped else None
        if taken is not None:
            self.seen.scores = taken.scores[self.rows].clone()
            self.seen.pattern = taken.pattern[self.rows].clone()
            self.seen.fused = taken.fused
            self.seen.firings += 2
            self._see_operands(taken)

    def _see_operands(self, taken: Taken) -> None:
        group = self.sites.n_heads // self.sites.n_kv_heads
        for role, operand in (("q", taken.q), ("k", taken.k)):
            if role in self.bare and operand is not None:
                shared = operand if role == "q" else operand[:, ::group]
                setattr(self.seen, role, shared.transpose(1, 2)[self.rows].clone())
                self.seen.firings += 1

    # -- verdict ----------------------------------------------------------------------------

    def judge(self) -> LayerSites:
        """The layer's sites with what was measured, or the refusal."""
        seen = self.seen
        own_values = self.sites.v.dot.hooked
        self._fired(2 + own_values + 2 + (self.sites.z is not None))
        assert seen.scores is not None
        assert seen.pattern is not None
        assert seen.q is not None
        assert seen.k is not None
        scores, pattern = seen.scores.double(), seen.pattern.double()
        q, k = seen.q.double(), seen.k.double()
        self._refuse_pattern_as_scores(scores, seen.scores)
        sites = self._measure_bias(seen.scores, q, k)
        clean = split(sites, seen.scores[:1], q[:1], k[:1], dtype=torch.float64)
        sites = replace(sites, sink=self._measure_sink(clean, pattern[:1]))
        clean = split(sites, seen.scores[:1], q[:1], k[:1], dtype=torch.float64)
        tolerance = self._score_tolerance(clean, q, k, sites)
        self._compare(
            "pattern = softmax(scores)",
            clean.pattern(),
            pattern[:1],
            pattern[:1],
            tolerance,
            must_act=False,
        )
        for role, factors in (
            ("q", (self.at_dot("q"), None)),
            ("k", (None, self.at_dot("k"))),
        ):
            factor = expand_factors(sites, *factors)
            observed = pattern[self.at(role)]
            check = f"pattern under {role}-noise, predicted from clean scores"
            allowed = tolerance * (1 + _HALF_WIDTH)
            try:
                self._compare(check, clean.pattern(factor), observed, pattern[:1], allowed)
            except Undecided:
                # Saturated: no noise moves a weight. Then the scores must show it, and be used.
                noisy = split(sites, seen.scores[self.at(role)], dtype=torch.float64, whole=True)
                self._compare_scores(role, clean, factor, noisy, allowed)
                self._compare(
                    f"pattern = softmax(scores) under {role}-noise",
                    noisy.pattern(),
                    observed,
                    observed,
                    allowed,
                    must_act=False,
                )
        averaging = self._averaging(pattern, tolerance)
        if self.miswritten is not None:  # noise at half strength looks like a bias, and agrees
            raise self.miswritten
        return replace(
            sites,
            averaging=averaging,
            scores_editable=not sites.tapped and self._editable(clean, pattern, tolerance),
            q=self._shielded("q", q),
            k=self._shielded("k", k),
            v=self.sites.v if seen.v is None else self._shielded("v", seen.v.double()),
        )

    def _averaging(self, pattern: Tensor, tolerance: Tensor) -> Averaging:
        if not self.sites.v.dot.hooked:
            return "unverified"
        assert self.seen.v is not None
        of_scores = tolerance if self.seen.fused else torch.zeros_like(tolerance)
        return ValueCheck(self, pattern, self.seen.v.double(), of_scores).verdict()

    def _fired(self, wanted: int) -> None:
        if self.seen.firings != wanted:
            raise UnsupportedModelError(
                "every hook point fires once per forward",
                wanted=f"{wanted} firings",
                got=str(self.seen.firings),
                layer=self.sites.layer,
            )

    def at(self, kind: str) -> slice:
        index = 1 + KINDS.index(kind)
        return slice(index, index + 1)

    def record(self, check: str, error: float, effect: float, tolerance: float) -> None:
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
        plain = replace(self.sites, has_bias=False, sink=())
        bias = split(plain, scores[self.at("zero")], dtype=torch.float64).s
        s = split(plain, scores[:1], dtype=torch.float64).s - bias
        product = qk_product(self.sites, q[:1], k[:1])
        where = shown[:1] & shown[self.at("zero")]
        x, y = product * where, s * where
        squares = (x * x).sum((0, 2, 3))
        scale = (x * y).sum((0, 2, 3)) / squares.where(squares > 0, torch.ones_like(squares))
        level = float(y.abs().max())
        # Where positions are rotated in behind the sites, q.k there is not the scores'.
        same = (y - scale[:, None, None] * x).abs().max() <= _SAME_PRODUCT * level
        largest = float(bias.abs().max())
        has_bias = largest > 8 * self.eps * max(level, largest)
        known = tuple(scale.tolist()) if same or has_bias else ()
        return replace(self.sites, has_bias=has_bias, score_scale=known)

    def _measure_sink(self, clean: ScoreParts, pattern: Tensor) -> tuple[float, ...]:
        """Score of each head's sink: what its rows lack in weight, e^sink / (e^sink + sum_t e^w_t).

        Read from the row where it weighs neither nothing nor everything.
        """
        seen = clean.mask.any(-1)
        total = pattern.sum(-1).where(seen, torch.ones(()).double())
        if bool(((total - 1).abs() < max(8 * self.eps, _SUM_TO_ONE)).all()):
            return ()
        room = total * (1 - total)
        best = room.amax((0, 2))
        if bool((best < MARGIN * max(self.eps, _SUM_TO_ONE)).any()):
            self.undecided("weight of the attention sink", float(best.min()), _SUM_TO_ONE)
        sink = torch.logsumexp(clean.scores(), dim=-1) + torch.log1p(-total) - torch.log(total)
        at = room.flatten(2).argmax(-1, keepdim=True)
        return tuple(sink.flatten(2).gather(2, at)[0, :, 0].tolist())

    def _score_tolerance(
        self, clean: ScoreParts, q: Tensor, k: Tensor, sites: LayerSites
    ) -> Tensor:
        """Rounding of one score: of the terms of the dot product and of their sum."""
        lengths = torch.einsum("bqh,bkh->bhqk", q[:1].norm(dim=-1), self.keys(k[:1].norm(dim=-1)))
        d_head = q.shape[-1]
        known = sites.score_scale or (d_head**-0.5,) * sites.n_heads
        scale = lengths.new_tensor(known)[:, None, None].abs()
        terms = lengths * scale * 4 / q.shape[-1] ** 0.5
        whole = clean.scores().masked_fill(~clean.mask, 0).abs()
        # Half precision has no room for more.
        generous = 0.5 if self.eps > HALF_PRECISION else 64.0
        rounding: Tensor = generous * self.eps * (whole + terms).masked_fill(~clean.mask, 0)
        return rounding.amax(-1, keepdim=True)

    def keys(self, per_kv_head: Tensor) -> Tensor:
        """Keys or values ``[batch, pos, kv_head, ...]`` for each query head."""
        return per_kv_head[:, :, list(self.sites.kv_head_of)]

    def _compare(
        self,
        check: str,
        predicted: Tensor,
        observed: Tensor,
        clean: Tensor,
        tolerance: Tensor,
        *,
        must_act: bool = True,
    ) -> None:
        predicted, observed, clean = (x.nan_to_num(0.0) for x in (predicted, observed, clean))
        p = torch.maximum(predicted, observed)
        # An error delta of every score moves p by at most about 2 p (1 - p) delta.
        allowed = 2 * p * (1 - p) * tolerance.expm1() + self.eps * p + 1e-6
        error = (predicted - observed).abs()
        effect = (observed - clean).abs()
        at = int((error - allowed).argmax())
        worst, limit = float(error.flatten()[at]), float(allowed.flatten()[at])
        self.record(check, float(error.max()), float(effect.max()), limit)
        if not worst <= limit:  # NaN fails too
            head, row = divmod(at // observed.shape[-1], observed.shape[-2])
            raise Unpredicted(
                check,
                wanted=f"a difference of at most {limit:.2g}",
                got=f"{worst:.2g} (head {head}, row {row})",
                layer=self.sites.layer,
            )
        if must_act and not bool((effect > MARGIN * allowed).any()):
            at = int((effect - MARGIN * allowed).argmax())
            needed = MARGIN * float(allowed.flatten()[at])
            self.undecided(check, float(effect.flatten()[at]), needed)

    def _compare_scores(
        self,
        role: str,
        clean: ScoreParts,
        factor: Tensor,
        noisy: ScoreParts,
        tolerance: Tensor,
    ) -> None:
        check = f"scores under {role}-noise, predicted from clean scores"
        predicted, observed, before = (
            w.masked_fill(~clean.mask, 0) for w in (clean.scores(factor), noisy.s, clean.scores())
        )
        error, effect = (predicted - observed).abs(), (observed - before).abs()
        limit = tolerance.expand_as(error)
        self.record(check, float(error.max()), float(effect.max()), float(limit.max()))
        if not bool((error <= limit).all()):
            raise Unpredicted(
                check,
                wanted=f"a difference of at most {float(limit.max()):.2g}",
                got=f"{float(error.max()):.2g}",
                layer=self.sites.layer,
            )
        if not bool((effect > MARGIN * limit).any()):
            self.undecided(check, float(effect.max()), MARGIN * float(limit.max()))

    def undecided(self, check: str, effect: float, needed: float) -> None:
        raise Undecided(
            UnsupportedModelError(
                f"{check}: not verifiable",
                wanted=f"an effect above {needed:.2g}, so that rounding can't hide an error",
                got=f"{effect:.2g}",
                layer=self.sites.layer,
            )
        )

    def _editable(self, clean: ScoreParts, pattern: Tensor, tolerance: Tensor) -> bool:
        upside_down = (-clean.scores()).masked_fill(~clean.mask, -torch.inf)
        predicted = clean.pattern_of(upside_down)
        error = (predicted - pattern[self.at("v")]).abs()
        allowed = 2 * predicted * (1 - predicted) * tolerance.expm1() + self.eps * predicted + 1e-6
        acts = (pattern[self.at("v")] - pattern[:1]).abs() > MARGIN * allowed
        return bool((error <= allowed).all() and acts.any())

    def _shielded(self, role: Role, vectors: Tensor) -> VectorSite:
        """How noise at the projection arrives at the dot product."""
        site = self.sites.vector(role)
        if site.projection == site.dot:
            return site
        before = vectors[:1].norm(dim=-1)
        after = vectors[self.at("zero")].norm(dim=-1)
        drawn = self.at_dot(role)
        if site.projection.n_heads != site.dot.n_heads:
            drawn = torch.full_like(before, torch.nan)  # each factor is of something else
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
