"""The self-check's verdict on one layer: what its hooks showed, and what the noise model predicts.

See :mod:`hooks.sites.selfcheck` for the copies of the prompt that a layer is judged by.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.kernels import MASKED
from hooks.model import ROLES, Role
from hooks.sites.copies import HALF_WIDTH, Evidence, Undecided
from hooks.sites.scores import ScoreParts, expand_factors, qk_product, split, visible
from hooks.sites.types import LayerSites, Shield, VectorSite
from hooks.sites.value_check import HALF_PRECISION, MARGIN, ValueCheck

_SAME_PRODUCT = 0.1  # a score differs from its product by rounding, or by much more
_SUM_TO_ONE = 1e-5  # a row of a pattern sums to one up to this
_LETS_THROUGH = 0.05  # a norm's eps lets a little of a factor through; the factors differ by 0.5


class Unpredicted(UnsupportedModelError):
    """The pattern under noise is not the one predicted from the clean scores."""


class LayerCheck(Evidence):
    """Verdict on one layer after the pass over its copies, and the table on which it is based."""

    def judge(self) -> LayerSites:
        """The layer's sites with what was measured, or the refusal.

        Raises:
            Unpredicted: the pattern is not the softmax of the scores, or not the predicted one
                under noise.
            Undecided: on this prompt an effect is too small to prove anything.
            UnsupportedModelError: any other mismatch.
        """
        self._refuse_other_firings()
        scores, pattern = self.seen.tensors["scores"], self.seen.double("pattern")
        q, k = self.seen.double("q"), self.seen.double("k")
        self._refuse_pattern_as_scores(scores)
        self._refuse_scores_as_masks(scores)
        sites = self.measure_bias(scores, q, k)
        clean, own = split(sites, scores[:1], q[:1], k[:1], dtype=torch.float64), pattern[:1]
        sink = self.measure_sink(clean, own)
        sites = replace(sites, sink=sink)
        clean = replace(clean, sink=clean.s.new_tensor(sink) if sink else None)
        tolerance = self._score_tolerance(clean, q, k, sites)
        self._compare(
            "pattern = softmax(scores)", clean.pattern(), own, own, tolerance, must_act=False
        )
        for role in ROLES[:2]:
            self._judge_noise(role, sites, clean, pattern, tolerance)
        of_scores = tolerance if self.seen.fused else torch.zeros_like(tolerance)
        shown = visible(scores)[:1]
        averaging = ValueCheck(self, pattern, self.seen.double("v"), shown, of_scores).verdict()
        wrong = self.copies.miswritten  # noise at half strength looks like a bias, and agrees
        if wrong is not None:
            raise wrong
        return replace(
            sites,
            averaging=averaging,
            scores_editable=not sites.tapped and self._editable(clean, pattern, tolerance),
            q=self._shielded("q"),
            k=self._shielded("k"),
            v=self._shielded("v"),
        )

    def _judge_noise(
        self, role: Role, sites: LayerSites, clean: ScoreParts, pattern: Tensor, tolerance: Tensor
    ) -> None:
        """Is the pattern under this vector's noise the one predicted from the clean scores?

        Where attention is saturated, no noise moves a weight. Then the noisy scores must be the
        predicted ones, and the pattern their softmax.
        """
        drawn = self.copies.at_dot(role)
        factor = expand_factors(
            sites, drawn if role == "q" else None, drawn if role == "k" else None
        )
        observed = pattern[self.copies.at(role)]
        check = f"pattern under {role}-noise, predicted from clean scores"
        allowed = tolerance * (1 + HALF_WIDTH)
        try:
            self._compare(check, clean.pattern(factor), observed, pattern[:1], allowed)
        except Undecided:
            shown = self.seen.tensors["scores"][self.copies.at(role)]
            noisy = split(sites, shown, dtype=torch.float64, whole=True)
            self._compare_scores(role, clean, factor, noisy, allowed)
            other = f"pattern = softmax(scores) under {role}-noise"
            self._compare(other, noisy.pattern(), observed, observed, allowed, must_act=False)

    def _refuse_other_firings(self) -> None:
        """Every tensor by which this layer is judged must have been shown exactly once."""
        names = ["q", "k", "v", "scores", "pattern"] + ["z"] * (self.sites.z is not None)
        fired = {name: self.seen.fired[name] for name in names}
        if any(times != 1 for times in fired.values()):
            raise UnsupportedModelError(
                "every hook point fires once per forward",
                wanted=f"{', '.join(names)} once each",
                got=", ".join(f"{n} {times}" for n, times in fired.items() if times != 1),
                layer=self.sites.layer,
            )

    def _refuse_pattern_as_scores(self, raw: Tensor) -> None:
        """Refuse a pattern in place of scores: its rows would pass for scores that hardly act."""
        seen, scores = visible(raw), raw.double()
        row_sums = scores.masked_fill(~seen, 0).sum(-1)
        if (scores[seen] >= 0).all() and torch.allclose(
            row_sums, torch.ones_like(row_sums), atol=1e-2
        ):
            raise UnsupportedModelError(
                f"{self.sites.scores or 'what the softmax takes'} carries pre-softmax scores",
                wanted="scores, some of them negative or of rows that do not sum to 1",
                got="no negative ones, and rows that sum to 1: the softmaxed pattern",
                layer=self.sites.layer,
            )

    def _refuse_scores_as_masks(self, raw: Tensor) -> None:
        """Refuse scores so large that their negatives could be the values that masks write."""
        top = float(raw.double().max())
        if top > -MASKED:
            raise UnsupportedModelError(
                f"{self.sites.scores or 'what the softmax takes'} can be told from masks",
                wanted=f"scores up to {-MASKED:g}",
                got=f"one of {top:.3g}: attention this sharp has diverged, or was never scaled",
                layer=self.sites.layer,
            )

    def measure_bias(self, scores: Tensor, q: Tensor, k: Tensor) -> LayerSites:
        """The bias: what remains of the scores with q at zero, which noise does not scale."""
        shown = visible(scores)
        plain = replace(self.sites, has_bias=False, sink=())
        bias = split(plain, scores[self.copies.at("zero")], dtype=torch.float64).s
        s = split(plain, scores[:1], dtype=torch.float64).s - bias
        product = qk_product(self.sites, q[:1], k[:1])
        where = shown[:1] & shown[self.copies.at("zero")]
        x, y = product * where, s * where
        squares = (x * x).sum((0, 2, 3))
        scale = (x * y).sum((0, 2, 3)) / squares.where(squares > 0, torch.ones_like(squares))
        level = float(y.abs().max())
        # Where positions are rotated after the sites, q.k there is not the scores'.
        same = (y - scale[:, None, None] * x).abs().max() <= _SAME_PRODUCT * level
        largest = float(bias.abs().max())
        has_bias = largest > 8 * self.eps * max(level, largest)
        known = tuple(scale.tolist()) if same or has_bias else ()
        return replace(self.sites, has_bias=has_bias, score_scale=known)

    def measure_sink(self, clean: ScoreParts, pattern: Tensor) -> tuple[float, ...]:
        """Score of each head's sink, from its weight in a row: e^sink / (e^sink + sum_t e^w_t).

        Read from a row where its weight is neither zero nor one.
        """
        seen = clean.mask.any(-1)
        total = pattern.sum(-1).where(seen, torch.ones((), dtype=torch.float64))
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
        """Largest rounding of a score in each row: of the dot product's terms and of their sum."""
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
        """Compare a pattern with its prediction; with ``must_act`` the noise must show in it.

        Raises:
            Unpredicted: they differ by more than rounding of the scores (``tolerance``) explains.
            Undecided: they agree, but would also agree without noise.
        """
        predicted, observed, clean = (x.nan_to_num(0.0) for x in (predicted, observed, clean))
        p = torch.maximum(predicted, observed)
        # An error delta of every score moves p by at most about 2 p (1 - p) delta.
        allowed = 2 * p * (1 - p) * tolerance.expm1() + self.eps * p + 1e-6
        error = (predicted - observed).abs()
        effect = (observed - clean).abs()
        at = int((error - allowed).argmax())
        worst, limit = float(error.flatten()[at]), float(allowed.flatten()[at])
        self.record(check, worst, float(effect.max()), limit)
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
        self, role: str, clean: ScoreParts, factor: Tensor, noisy: ScoreParts, tolerance: Tensor
    ) -> None:
        """Compare scores with their prediction; the noise must always show in them."""
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

    def _editable(self, clean: ScoreParts, pattern: Tensor, tolerance: Tensor) -> bool:
        """Whether negated scores gave the pattern of negated scores."""
        upside_down = (-clean.scores()).masked_fill(~clean.mask, -torch.inf)
        predicted = clean.pattern_of(upside_down)
        error = (predicted - pattern[self.copies.at("v")]).abs()
        allowed = 2 * predicted * (1 - predicted) * tolerance.expm1() + self.eps * predicted + 1e-6
        acts = (pattern[self.copies.at("v")] - pattern[:1]).abs() > MARGIN * allowed
        return bool((error <= allowed).all() and acts.any())

    def _shielded(self, role: Role) -> VectorSite:
        """The site, with how noise at its projection arrives at the dot product."""
        site = self.sites.vector(role)
        if site.projection == site.dot:
            return site
        vectors = self.seen.double(role)
        before = vectors[:1].norm(dim=-1)
        after = vectors[self.copies.at("zero")].norm(dim=-1)
        drawn = self.copies.at_dot(role)
        if site.projection.n_heads != site.dot.n_heads:
            drawn = torch.full_like(before, torch.nan)  # each factor is of something else
        alive = before > 0
        ratio = (after / before)[alive]
        wanted = drawn.expand_as(before)[alive]
        shield: Shield = "mixed"
        if ratio.numel():
            # Rounding moves a length by a few eps.
            near = min(max(64 * self.eps, 1e-3), _LETS_THROUGH)
            if bool(((ratio - wanted).abs() < near).all()):
                shield = "none"
            elif bool(((ratio - 1).abs() < _LETS_THROUGH).all()):
                shield = "removed"
        return replace(site, shield=shield)
