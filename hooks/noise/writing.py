"""Noise written where a model multiplies q, k and v, in layers where no hook carries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hooks.model import AttentionTap, Role
from hooks.noise.clock import Clock, Factors
from hooks.sites import LayerSites


@dataclass
class Writer:
    """Passes the factors of the running pass to a tap, inside which it runs, layer by layer."""

    noise: Factors
    clock: Clock  # has the prompts and positions of the pass
    tap: AttentionTap
    _beside: set[int] = field(default_factory=set)  # layers with keys beside the tokens'

    def hook(self, sites: LayerSites) -> Callable[..., None]:
        """A hook for the layer's anchor."""

        def write_norms(tensor: Tensor, hook: Any) -> None:
            batch, n_query = tensor.shape[:2]

            def factors(role: Role, n_pos: int) -> Tensor | None:
                if role not in self.noise.roles:
                    return None
                source = sites.sequence(role) == "source"
                self.clock.check_width(n_pos if source else n_query, sites.sequence(role))
                first = self._first(sites, role, n_pos, n_query)
                site = sites.vector(role).dot
                drawn = self.clock.drawn(self.noise, sites, role, site, (batch, n_pos, first))
                return drawn if role == "q" else drawn[..., list(sites.kv_head_of)]

            self.tap.expect(sites, tensor, factors=factors)

        self.tap.needed = True
        return write_norms

    def _first(self, sites: LayerSites, role: Role, n_pos: int, n_query: int) -> int:
        """Position of the first query, or of the first key that the product takes.

        It takes keys of earlier steps too, except those that a window has dropped.

        Raises:
            ValueError: keys beside the tokens' (an encoder's, compressed ones) in a cached step or
                in padded prompts: nothing tells which key is whose.
        """
        cached = self.clock.cached
        if role == "q":
            return cached
        if sites.sequence(role) == "source":
            return 0
        if n_pos > cached + n_query:
            self._beside.add(sites.layer)
        if sites.layer in self._beside and (cached or self.clock.padded):
            raise ValueError(
                f"noise on {role} of layer {sites.layer}, which has keys beside those of the "
                "tokens: wanted whole sequences without padding; got "
                f"{'a cached step' if cached else 'padding'}"
            )
        return max(cached + n_query - n_pos, 0)
