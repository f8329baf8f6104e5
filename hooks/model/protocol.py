"""What a model must have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Anchor:
    """What distinguishes a layer's attention from the others in a forward pass.

    Attributes:
        hook: the attention is the first of its shape after this hook point.
        product: which product with its number of heads, queries and components after the hook is
            that of its queries and keys, from 1; 0 in a fused attention.
        d_head: components of a query.
        kv_heads: key/value head of each query head, found by comparing the keys.
    """

    hook: str
    product: int
    d_head: int
    kv_heads: tuple[int, ...]


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
