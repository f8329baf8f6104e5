"""What a model must have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

Role = Literal["q", "k", "v"]

ROLES: tuple[Role, ...] = ("q", "k", "v")


@runtime_checkable
class HookedModel(Protocol):
    """All that this package uses of a model; TransformerBridge and HookedTransformer have it."""

    @property
    def cfg(self) -> Any:
        """n_heads, n_ctx, d_vocab and the like."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name, aliases included."""

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Context with temporary hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass with temporary hooks."""


@runtime_checkable
class Anchor(Protocol):
    """Where in a pass a layer's attention begins, and which of its products is q.k."""

    @property
    def hook(self) -> str:
        """The hook point before it."""

    @property
    def product(self) -> int:
        """Which product of matching operands it is, from 0."""

    @property
    def d_head(self) -> int:
        """Of the operands."""


@runtime_checkable
class Watched(Protocol):
    """What must be known about an attention layer to recognise it in a pass."""

    @property
    def layer(self) -> int:
        """Its index."""

    @property
    def n_heads(self) -> int:
        """Of its queries."""

    @property
    def anchor(self) -> Anchor | None:
        """None where hooks show everything that is read."""
