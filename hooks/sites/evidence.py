"""What one layer's copies showed, and the table on which its verdict is based."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.sites.copies import LayerCopies


class Undecided(Exception):
    """This prompt proves nothing; another may. ``refusal`` is raised if none does."""

    def __init__(self, refusal: UnsupportedModelError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Evidence:
    """What the hooks of one layer showed.

    Args:
        copies: the layer's, after the pass.
    """

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
