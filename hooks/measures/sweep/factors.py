"""The factors of one batched pass of a sweep: every row has its own prompt, sigma and draw.

Row by row they equal those of :class:`hooks.NormNoise`; here they are made for all layers at once,
from uniform numbers drawn once for all sigmas (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.model import Role
from hooks.noise import Clock, Factors, NormNoise, draw_uniforms, get_law
from hooks.sites import LayerSites, Site


@dataclass(frozen=True)
class Grid:
    """The conditions under which each prompt is run: 0 is clean, then draw by draw, each sigma."""

    sigmas: tuple[float, ...]
    replicates: int

    def __len__(self) -> int:
        return 1 + len(self.sigmas) * self.replicates

    def draw(self, condition: int) -> int:
        """Draw of a noisy condition."""
        return (condition - 1) // len(self.sigmas)

    def sigma(self, condition: int) -> int:
        """Index of a noisy condition's sigma."""
        return (condition - 1) % len(self.sigmas)


class RowFactors(Clock):
    """Factors for the rows of the running pass: for each prompt, some conditions."""

    def __init__(self, noise: NormNoise, layers: Sequence[LayerSites], grid: Grid) -> None:
        super().__init__(0, {})
        self.follows = True  # the sweep runs whole sequences, be they of one token
        self.noise = noise
        self.grid = grid
        self.places = [(s, role) for s in layers for role in noise.roles]
        self._made: dict[tuple[int, Role], Tensor] = {}
        self._prompts: tuple[int, ...] = ()
        self._conditions = range(0)
        self._device = torch.device("cpu")

    def enter(self, prompts: Sequence[int], conditions: range, device: torch.device) -> None:
        """A new pass: prompts (their indices in the corpus), each under these conditions."""
        self._made.clear()
        self._prompts, self._conditions, self._device = tuple(prompts), conditions, device

    def clean_rows(self) -> slice | None:
        """The rows without noise, if the pass has any."""
        if 0 not in self._conditions:
            return None
        return slice(0, None, len(self._conditions))

    def drawn(
        self, noise: Factors, sites: LayerSites, role: Role, site: Site, shape: tuple[int, ...]
    ) -> Float[Tensor, "row pos head"]:
        """Factors ``[batch, pos, head]`` of one site; ``shape`` is (batch, pos, first position)."""
        batch, n_pos, _ = shape
        if batch != len(self._prompts) * len(self._conditions):
            raise RuntimeError(
                f"sweep: wanted {len(self._prompts)} x {len(self._conditions)} rows at "
                f"{site.hook}; got {batch}"
            )
        here = (sites.layer, role)
        if here in self._made and self._made[here].shape[1] != n_pos:
            self._make([here], n_pos, site.n_heads)  # keys beside the tokens' are this layer's own
        elif here not in self._made:
            alike = [
                (s.layer, r)
                for s, r in self.places
                if s.sequence(r) == sites.sequence(role)
                and s.vector(r).dot.n_heads == site.n_heads
                and (s.layer, r) not in self._made
            ]
            self._make(alike or [here], n_pos, site.n_heads)
        return self._made[here].expand(-1, -1, site.n_heads)

    def _make(self, places: list[tuple[int, Role]], n_pos: int, n_heads: int) -> None:
        """The factors at these places, with one multiplication per sigma."""
        grid = self.grid
        noisy = [c for c in self._conditions if c > 0]
        draws = sorted({grid.draw(c) for c in noisy})
        size = {"n_pos": n_pos, "n_heads": n_heads}
        u = torch.from_numpy(
            draw_uniforms(self.noise, places=places, prompts=self._prompts, draws=draws, **size)
        )
        shape = (len(places), len(self._prompts), len(self._conditions), *u.shape[3:])
        out = torch.ones(shape, dtype=torch.float32)
        law = get_law(self.noise.law)
        for index, sigma in enumerate(grid.sigmas):
            mine = [c for c in noisy if grid.sigma(c) == index]
            if mine:
                at = [c - self._conditions.start for c in mine]
                of = [draws.index(grid.draw(c)) for c in mine]
                out[:, :, at] = law.factor(u[:, :, of], sigma).float()
        out = out.to(self._device)
        for place, factor in zip(places, out, strict=True):
            self._made[place] = factor.flatten(0, 1)
