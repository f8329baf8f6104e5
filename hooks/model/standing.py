"""Hooks that are on a model: TransformerLens's, torch's, and those of this package."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

from hooks.model.threads import OURS

# Libraries whose hooks are part of the model as it was loaded.
_LIBRARIES = ("transformer_lens.", "accelerate.", "transformers.")


@dataclass(frozen=True)
class Standing:
    """One forward hook.

    Attributes:
        where: name of the hook point or module.
        function: as it was given.
        ours: whether it belongs to this package.
        table, key: where torch keeps what it calls.
    """

    where: str
    function: Callable[..., Any]
    ours: bool
    table: MutableMapping[int, Callable[..., Any]]
    key: int


def standing(model: Any) -> Iterator[Standing]:
    """Every forward hook on the model's hook points and modules, and torch's global ones."""
    seen: set[int] = set()
    for root in (model, getattr(model, "original_model", None)):
        if not isinstance(root, nn.Module):
            continue
        for name, module in root.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield from _on_module(name, module)
    for table in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        yield from _in_table("every module", table)


def users(model: Any) -> list[Standing]:
    """The hooks that do not belong to this package."""
    return [hook for hook in standing(model) if not hook.ours]


def names(hooks: list[Standing]) -> str:
    """Where the hooks are, in short."""
    places = sorted({hook.where for hook in hooks})
    return f"{', '.join(places[:3])}{' and others' if len(places) > 3 else ''}"


@contextmanager
def resting(hooks: list[Standing]) -> Iterator[None]:
    """Inside, these hooks do nothing in this thread; in other threads they still act."""
    mine = threading.get_ident()

    def rests(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return None if threading.get_ident() == mine else function(*args, **kwargs)

        return call

    before = {(id(h.table), h.key): h.table[h.key] for h in hooks if h.key in h.table}
    try:
        for hook in hooks:
            if hook.key in hook.table:
                hook.table[hook.key] = rests(hook.table[hook.key])
        yield
    finally:
        for hook in hooks:
            if hook.key in hook.table:
                hook.table[hook.key] = before[id(hook.table), hook.key]


def raised_by(model: Any, error: BaseException) -> str | None:
    """Where the user's hook is that raised this; None where none did."""
    frames, at = set(), error.__traceback__
    while at is not None:
        frames.add(at.tb_frame.f_code)
        at = at.tb_next
    for hook in users(model):
        if getattr(bare(hook.function), "__code__", None) in frames:
            return hook.where
    return None


_WATCHES = {"__torch_function__"}


def raised_in(error: BaseException, package: str) -> bool:
    """Whether a module of this package raised it; an error from a watched call is its caller's."""
    at, name = error.__traceback__, ""
    while at is not None:
        if at.tb_frame.f_code.co_name not in _WATCHES:
            name = str(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next
    return name.split(".")[0] == package


def bare(function: Any) -> Any:
    """The function behind partials and bound methods."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__func__", function)


def _on_module(name: str, module: nn.Module) -> Iterator[Standing]:
    if not isinstance(module, HookPoint):
        yield from _in_table(name or "the model", module._forward_pre_hooks)
        yield from _in_table(name or "the model", module._forward_hooks)
        return
    for handle in module.fwd_hooks:
        function: Any = getattr(handle, "user_hook", None) or handle  # 3.9 keeps no function
        if not of_a_library(function):
            ours, key = hasattr(function, OURS), handle.hook.id
            yield Standing(module.name or name, function, ours, module._forward_hooks, key)


def _in_table(name: str, table: Any) -> Iterator[Standing]:
    for key, function in list(table.items()):
        if not of_a_library(function):
            ours = hasattr(function, OURS) or _module(function).startswith("hooks.")
            yield Standing(name, function, ours, table, key)


def of_a_library(function: Any) -> bool:
    """Whether a hook is part of the model as TransformerLens and Hugging Face load it."""
    return _module(function).startswith(_LIBRARIES)


def _module(function: Any) -> str:
    function = bare(function)
    return getattr(function, "__module__", None) or type(function).__module__
