"""The copies of a prompt on which one layer is judged: hooks that noise and record them.

See :mod:`hooks.sites.selfcheck` for the pass over the copies, and
:mod:`hooks.sites.layer_check` for the verdict.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import ROLES, AttentionTap, Finished, Role, Taken
from hooks.sites.scores import visible
from hooks.sites.types import LayerSites, Site

KINDS = ("q", "k", "v", "zero")
"""A layer's own copies of the prompt: noise on q; on k; on v, and scores edited; q set to zero."""

HALF_WIDTH = 0.5  # of the check's own noise: large, so that its effect exceeds rounding


class _Seen:
    """What one layer's hooks showed, by name: q, k, v, scores, pattern and z.

    Row 0 of each tensor is the clean copy; this layer's own follow in the order of ``KINDS``.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.fired: Counter[str] = Counter()
        self.fused = False  # whether the pattern was made of the scores, as nothing showed one

    def keep(self, name: str, tensor: Tensor) -> None:
        """A copy of the tensor, which the model may change in place."""
        self.tensors[name] = tensor.clone()
        self.fired[name] += 1

    def double(self, name: str) -> Tensor:
        """The tensor recorded under this name, in float64."""
        return self.tensors[name].double()


@dataclass
class LayerCopies:
    """Hooks of one layer for the pass over all copies, and what they showed."""

    sites: LayerSites  # where the layer's vectors and scores seem to be
    index: int  # among the layers that share this pass; decides which copies are its own
    batch: int  # all copies in the pass
    generator: torch.Generator  # draws the noise
    eps: float  # of the scores' dtype, on which every tolerance depends
    tap: AttentionTap  # shows what the hooks of a tapped layer do not; the pass runs inside it

    def __post_init__(self) -> None:
        first = 1 + self.index * len(KINDS)
        self.copy = {kind: first + i for i, kind in enumerate(KINDS)}
        self.rows = [0, *self.copy.values()]
        self.seen = _Seen()
        self.factor: dict[Role, Tensor] = {}
        self.miswritten: UnsupportedModelError | None = None
        self.last = False  # whether nothing later is read

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks that noise this layer's copies and record what its hook points show."""
        entries: list[tuple[str, Any]] = []
        for role in ROLES:
            first, dot = self.sites.vector(role).projection, self.sites.vector(role).dot
            if first != dot and first.hooked:
                entries.append((first.hook, partial(self._at_projection, role=role, site=first)))
            if dot.hooked:
                entries.append((dot.hook, partial(self._at_dot, role=role, site=dot)))
        if self.sites.bare:
            assert self.sites.anchor is not None
            return [*entries, (self.sites.anchor.hook, self._at_anchor)]
        if not self.sites.tapped:
            entries.append((self.sites.scores, self._at_scores))
            entries.append((self.sites.pattern, self._at_pattern))
        if self.sites.z is not None:
            entries.append((self.sites.z.hook, partial(self._at_z, site=self.sites.z)))
        return entries

    def _drawn(self, role: Role, site: Site, n_pos: int, device: torch.device) -> Tensor:
        """This role's factors ``[pos, head]``, drawn when its number of positions is known."""
        if role not in self.factor:
            vector = self.sites.vector(role)
            n_heads = max(vector.dot.n_heads, vector.projection.n_heads)
            drawn = torch.rand(n_pos, n_heads, generator=self.generator, dtype=torch.float32)
            self.factor[role] = (1 + HALF_WIDTH * (2 * drawn - 1)).to(device)
        return self.factor[role][:, : site.n_heads].to(device)

    def _at_anchor(self, tensor: Tensor, hook: Any) -> None:
        """Makes the tap multiply and show what no hook point carries."""
        self.tap.expect(self.sites, tensor, factors=self._factors, show=self._see)

    def _factors(self, role: Role, n_pos: int) -> Tensor:
        """What multiplies a role's vectors in all copies, by query head."""
        site = self.sites.vector(role).dot
        drawn = self._drawn(role, site, n_pos, torch.device("cpu"))
        factor = torch.ones(self.batch, *drawn.shape, dtype=torch.float32)
        factor[self.copy[role]] = drawn
        if role == "q":
            factor[self.copy["zero"]] = 0.0
        return factor if role == "q" else factor[..., list(self.sites.kv_head_of)]

    def _see(self, taken: Taken) -> None:
        """Keeps what the products showed: the vectors as they came, one for each that differs."""
        for role, vectors in taken.vectors(self.sites.kv_leaders).items():
            self.seen.keep(role, vectors[self.rows])
        assert taken.z is not None
        self.seen.keep("z", taken.z.transpose(1, 2)[self.rows])
        self._see_softmax(taken)
        if self.last:
            raise Finished

    def _see_softmax(self, taken: Taken) -> None:
        self.seen.keep("scores", taken.scores[self.rows])
        self.seen.keep("pattern", taken.pattern[self.rows])
        self.seen.fused = taken.fused is not None

    def at(self, kind: str) -> slice:
        """Index of one of this layer's ``KINDS`` of copies in what was seen."""
        index = 1 + KINDS.index(kind)
        return slice(index, index + 1)

    def at_dot(self, role: Role) -> Tensor:
        """This role's factors on the vectors that enter the dot product, ``[1, pos, head]``."""
        return self.factor[role][None, :, : self.sites.vector(role).dot.n_heads].double()

    def _multiply(self, tensor: Tensor, role: Role, site: Site, copies: dict[int, float]) -> Tensor:
        """The tensor with some copies noised (strength 1) or set to zero (strength 0)."""
        drawn = self._drawn(role, site, site.n_pos(tensor), tensor.device)
        factor = torch.ones(self.batch, *drawn.shape, device=tensor.device, dtype=torch.float32)
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

    def _at_projection(self, tensor: Tensor, hook: Any, role: Role, site: Site) -> Tensor:
        """Noises the projection in the copy that is not needed at the dot product."""
        return self._multiply(tensor, role, site, {self.copy["zero"]: 1.0})

    def _at_dot(self, tensor: Tensor, hook: Any, role: Role, site: Site) -> Tensor:
        """Keeps the vectors as they come, and noises their copy (q: sets one to zero)."""
        if tensor.shape[0] != self.batch:
            raise UnsupportedModelError(
                f"{site.hook} keeps the batch",
                wanted=f"{self.batch} prompts",
                got=f"{tensor.shape[0]}",
                layer=self.sites.layer,
            )
        self.seen.keep(role, site.by_position(tensor)[self.rows])
        copies = {self.copy[role]: 1.0}
        if role == "q":
            copies[self.copy["zero"]] = 0.0
        return self._multiply(tensor, role, site, copies)

    def _at_scores(self, tensor: Tensor, hook: Any) -> Tensor:
        self.seen.keep("scores", tensor[self.rows])
        # Negated where visible: that changes any softmax.
        edited = tensor.clone()
        row = tensor[self.copy["v"]]
        edited[self.copy["v"]] = torch.where(visible(row), -row, row)
        return edited

    def _at_pattern(self, tensor: Tensor, hook: Any) -> None:
        self.seen.keep("pattern", tensor[self.rows])

    def _at_z(self, tensor: Tensor, hook: Any, site: Site) -> None:
        """Keeps z, and in a tapped layer what the tap took before z."""
        self.seen.keep("z", site.by_position(tensor)[self.rows])
        taken = self.tap.take(self.batch) if self.sites.tapped else None
        if taken is not None:
            self._see_softmax(taken)


# -- what they prove --------------------------------------------------------------------------


class Undecided(Exception):
    """This prompt proves nothing; another may. ``refusal`` is raised if none does."""

    def __init__(self, refusal: UnsupportedModelError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Evidence:
    """What the hooks of one layer showed in its copies, after the pass."""

    def __init__(self, copies: LayerCopies) -> None:
        self.copies = copies
        self.sites = copies.sites
        self.seen = copies.seen
        self.eps = copies.eps
        self.table: list[dict[str, Any]] = []

    def keys(self, per_kv_head: Tensor) -> Tensor:
        """Keys or values ``[batch, pos, kv_head, ...]`` for each query head."""
        return per_kv_head[:, :, list(self.sites.kv_head_of)]

    def record(self, check: str, error: float, effect: float, tolerance: float) -> None:
        """One line of :attr:`hooks.AttentionSites.check`."""
        self.table.append(
            {
                "layer": self.sites.layer,
                "check": check,
                "error": error,
                "effect": effect,
                "tolerance": tolerance,
            }
        )

    def undecided(self, check: str, effect: float, needed: float) -> NoReturn:
        """The refusal for a prompt whose effect is too small for this check."""
        raise Undecided(
            UnsupportedModelError(
                f"{check}: not verifiable",
                wanted=f"an effect above {needed:.2g}, so that rounding can't hide an error",
                got=f"{effect:.2g}",
                layer=self.sites.layer,
            )
        )
