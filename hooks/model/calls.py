"""A block's call in a pass, kept so that the block alone can be run again."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hooks.model.ambient import model_pass
from hooks.model.protocol import HookedModel
from hooks.model.standing import standing
from hooks.model.state import submodule


@dataclass(frozen=True)
class BlockCall:
    """What a pass gave to a block: in place of a `ModelInput` it runs the block, and no more."""

    block: nn.Module
    args: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, model: HookedModel) -> Any:
        """The same call again, and what it returns."""
        with model_pass():
            return self.block(*self.args, **self.named)


@contextmanager
def keeping_calls(model: HookedModel, blocks: Collection[str]) -> Iterator[dict[str, BlockCall]]:
    """Inside, this thread's passes leave the latest call of each of these blocks, by name."""
    owner = threading.get_ident()
    calls: dict[str, BlockCall] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], name: str) -> None:
        if threading.get_ident() == owner:
            own = {n: _own(x) for n, x in named.items()}
            calls[name] = BlockCall(block, tuple(map(_own, args)), own)

    found = [(name, submodule(model, name)) for name in blocks]
    handles = [
        block.register_forward_pre_hook(partial(keep, name=name), with_kwargs=True)
        for name, block in found
        if block is not None
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _own(given: Any) -> Any:
    """A copy of a stream ``[batch, pos, d]``, to which the pass may add in place; no cache."""
    if hasattr(given, "get_seq_length"):
        return None  # a pass begins with an empty one, and leaves its keys in it
    return given.clone() if isinstance(given, Tensor) and given.ndim == 3 else given


def without_hooks(model: HookedModel, blocks: Collection[str]) -> set[str]:
    """Those of these blocks in which no hook acts but the libraries' own."""
    hooks = list(standing(model))
    if any(hook.where == "every module" for hook in hooks):
        return set()
    tables = {id(hook.table) for hook in hooks}
    return {
        name
        for name in blocks
        if (block := submodule(model, name)) is not None
        and not any(
            id(table) in tables
            for part in block.modules()
            for table in (part._forward_pre_hooks, part._forward_hooks)
        )
    }
