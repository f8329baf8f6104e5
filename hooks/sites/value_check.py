"""Is z the pattern's average of v? The self-check of one layer's values."""

from __future__ import annotations

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import ROLES, Role
from hooks.sites.copies import Evidence
from hooks.sites.types import Averaging

MARGIN = 8.0  # an effect must exceed its tolerance this many times to prove anything
HALF_PRECISION = 1e-4  # eps above this: bfloat16, float16
_CLEAR, _CLEAR_HALF = 1e-2, 0.3  # of the size of its terms: an average that says what its gate is
_ENOUGH = 0.2  # of the components


class ValueCheck:
    """Is z the pattern's average of v, under noise on v as well?

    z = g * sum_t p_t (1 + kv_t) v_t with g = 1, or with any g that noise on v does not change (a
    gate computed from the residual stream), read from the clean copy; or with p - u for p, where u
    is uniform over the keys that a row sees.

    Args:
        check: the layer's check, with what its hooks showed.
        pattern: of the clean copy and the layer's own, ``[copy, head, query, key]``.
        v: values of these copies, ``[copy, key, kv_head, d_head]``.
        visible: True where the clean copy's key is not masked, ``[1, head, query, key]``.
        of_scores: rounding of the scores from which the pattern was made, ``[1, head, query, 1]``;
            zero where the pattern is the model's own.
    """

    def __init__(
        self, check: Evidence, pattern: Tensor, v: Tensor, visible: Tensor, of_scores: Tensor
    ) -> None:
        if "z" not in check.seen.tensors:
            raise UnsupportedModelError(
                "v-noise changes what follows",
                wanted="hook_z to fire once",
                got="none",
                layer=check.sites.layer,
            )
        self.check = check
        self.pattern = pattern
        self.z = check.seen.double("z")
        # Rounding of the scores that a fused attention's pattern was made of, [1, query, head, 1].
        self.of_scores = 2 * of_scores.transpose(1, 2).expm1()
        self.v = v[:1]
        self.uniform = visible / visible.sum(-1, keepdim=True).clamp_min(1).double()
        self.taken = torch.zeros_like(self.uniform)
        self._predict()
        # A fused attention shows no pattern: there z must bear out the noise on q and k too.
        self.roles: tuple[Role, ...] = ROLES if check.sites.tapped else ("v",)

    def _predict(self) -> None:
        """The averages without noise, and under each vector's."""
        self.clean = self._average("q", self.v, row=0)
        noised = self.v * self.check.copies.at_dot("v")[..., None]
        self.noisy = {r: self._average(r, noised if r == "v" else self.v) for r in ROLES}

    def _average(self, role: Role, v: Tensor, row: int | None = None) -> tuple[Tensor, Tensor]:
        """The pattern's average of v, and the size of what was added up."""
        at = self.check.copies.at(role) if row is None else slice(row, row + 1)
        values = self.check.keys(v.double())
        pattern = self.pattern[at].nan_to_num(0.0)
        return (
            torch.einsum("bhqk,bkhd->bqhd", pattern - self.taken, values),
            torch.einsum("bhqk,bkhd->bqhd", pattern + self.taken, values.abs()),
        )

    def verdict(self) -> Averaging:
        """``plain``, ``gated``, ``centred`` or ``unverified``.

        Raises:
            UnsupportedModelError: noise on v changes nothing, or nothing confirms a fused
                attention.
        """
        half = self.check.eps > HALF_PRECISION
        rounding = (2.0 if half else 64.0) * self.check.eps
        average, size = self.clean
        if self._holds(torch.ones_like(average), rounding):
            return self._acting("plain", rounding)
        # Where the terms nearly cancel, the gate is a quotient of rounding errors.
        clear = average.abs() > (_CLEAR_HALF if half else _CLEAR) * size
        gate = (self.z[:1] / average).where(clear, torch.full_like(average, torch.nan))
        enough = float(clear.double().mean()) >= _ENOUGH
        if enough and self._holds(gate, rounding):
            return self._acting("gated", rounding)
        self.taken = self.uniform
        self._predict()
        if self._holds(torch.ones_like(average), rounding):
            return self._acting("centred", rounding)
        self.taken = torch.zeros_like(self.uniform)
        self._predict()
        if self.check.sites.tapped:
            predicted, observed = self.noisy["v"][0], self.z[self.check.copies.at("v")]
            raise UnsupportedModelError(
                "z under v-noise, predicted from pattern and clean v",
                wanted=f"a difference of at most {rounding * float(size.max()):.2g}",
                got=f"{float((predicted - observed).abs().max()):.2g}",
                layer=self.check.sites.layer,
            )
        return self._acting("unverified", rounding)

    def _holds(self, gate: Tensor, rounding: float) -> bool:
        """Whether z under the roles' noise is the gate times the predicted average."""
        # The gate is 1, or was read from the clean copy with that copy's rounding in it.
        of_gate = self.clean[1] / self.clean[0].abs()
        of_gate = of_gate.where(gate != 1, torch.zeros_like(gate))
        relative = rounding + self.of_scores
        for role in self.roles:
            average, size = self.noisy[role]
            allowed = relative * gate.abs() * (size + average.abs() * of_gate)
            # A small v is a difference of larger terms, and the copies round them differently.
            allowed = allowed + 4 * self.check.eps * size.max()
            error = (average * gate - self.z[self.check.copies.at(role)]).abs()
            if not bool((error <= allowed)[gate.isfinite()].all()):  # NaN fails
                return False
        return True

    def _acting(self, averaging: Averaging, rounding: float) -> Averaging:
        """Record and return this verdict, if noise on v shows in z at all."""
        check = "z under v-noise, predicted from pattern and clean v"
        effect = (self.z[self.check.copies.at("v")] - self.z[:1]).abs()
        error = (self.noisy["v"][0] - self.z[self.check.copies.at("v")]).abs()
        allowed = rounding * torch.maximum(self.noisy["v"][1], self.z[:1].abs()) + 1e-12
        self.check.record(check, float(error.max()), float(effect.max()), float(allowed.max()))
        if not bool((effect > MARGIN * allowed).any()):
            at = int((effect - MARGIN * allowed).argmax())
            self.check.undecided(
                check, float(effect.flatten()[at]), MARGIN * float(allowed.flatten()[at])
            )
        return averaging
