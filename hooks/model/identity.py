"""What a model is at this moment, as short digests by name: equal ones mean the same model.

What is remembered about a model, and what may merge with other numbers of it, goes by these
digests. All weights are read each time: version counters would be faster, but miss writes through
``.data``.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from hooks.model import apart, state
from hooks.model.ambient import autocast_of_passes
from hooks.model.standing import bare, of_a_library, standing, users
from hooks.model.weights import weights_of
from hooks.model.words import (
    CALLS,
    INTERNAL,
    PLACES,
    Path,
    digest,
    inside,
    is_array,
    is_foreign,
    is_of_library,
    is_plain,
    of_tensors,
    parts,
    without_places,
)

# Switches of a HookedTransformer that change where q, k and v are computed, or the heads of k.
_FLAGS = ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")


def fingerprint(model: Any) -> dict[str, Any]:
    """Digests of everything that a forward pass of the model depends on besides its input.

    Keys:
        weights, buffers: all parameters and buffers, name, dtype, shape and every bit.
        configuration: of Hugging Face and of TransformerLens.
        modules: plain attributes of every module (rates, scalings, active adapters), all that the
            user's own modules hold, and what replaces a library's functions.
        hooks: one line for each hook on the model: where, which function, and a digest of its code
            and of the values that it closes over.
        attention, autocast, precision: implementation of attention; autocast's dtypes; how float32
            matrices are multiplied.
    """
    inner = getattr(model, "original_model", None)
    every = apart.modules(model)
    root = inner if isinstance(inner, nn.Module) else model
    tensors = isinstance(root, nn.Module)
    with inside(every):
        hooks = [*standing_hooks(model)]
    with inside(every, tokens=False):
        modules = digest([_of_modules(every), _replaced(every)])
    return {
        "weights": of_tensors(weights_of(root) if tensors else ()),
        "buffers": of_tensors(root.named_buffers() if tensors else ()),
        "configuration": digest(
            [
                _of_config(getattr(inner, "config", None)),
                _of_config(model.cfg),
                bool(getattr(model, "compatibility_mode", False)),
                [getattr(model.cfg, name, None) for name in _FLAGS],
            ]
        ),
        "modules": modules,
        "hooks": hooks,
        "attention": [
            str(getattr(getattr(inner, "config", None), "_attn_implementation", None)),
            str(getattr(model.cfg, "attn_implementation", None)),
        ],
        "autocast": autocast(model),
        "precision": torch.get_float32_matmul_precision(),
    }


def key_of(model: Any) -> tuple[str, str]:
    """The key of a verdict on the model: its fingerprint, without our hooks.

    Our hooks rest in a self-check. Versions can't change within a process.
    """
    found = fingerprint(model)
    with inside(apart.modules(model)):
        found["hooks"] = [*standing_hooks(model, ours=False)]
    device = str(next((p.device for m in apart.modules(model) for p in m.parameters()), "cpu"))
    return digest(found), device


def autocast(model: Any) -> str:
    """The dtype that autocast computes in on the model's device; empty where it is off."""
    kinds = {p.device.type for m in apart.modules(model) for p in m.parameters(recurse=False)}
    cast = [(device, dtype) for device, dtype in autocast_of_passes() if device in kinds]
    return ", ".join(f"{device} {str(dtype).removeprefix('torch.')}" for device, dtype in cast)


@functools.cache
def _version(library: str) -> str:
    return version(library)  # reads the library's metadata: 8 ms


def versions() -> dict[str, str]:
    """Versions of the libraries that a pass runs through."""
    return {name: _version(name) for name in ("transformer-lens", "torch", "transformers", "numpy")}


# -- settings ---------------------------------------------------------------------------------


def _of_config(config: Any) -> str:
    """A configuration's values, without where the model came from."""
    if config is None:
        return ""
    to_dict = getattr(config, "to_dict", None)
    return digest(without_places(to_dict() if callable(to_dict) else vars(config)))


def _of_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Plain attributes of the modules; all that modules of the user's hold.

    Private attributes of TransformerLens and transformers change from pass to pass.
    """
    rows: list[Any] = []
    for index, module in enumerate(modules):
        if isinstance(module, HookPoint):
            continue
        kind = type(module)
        own: list[Any] = []
        if _is_users(module):
            own = sorted(_steady(module, _parts_of_module(module)).items())
        else:
            for name, value in vars(module).copy().items():
                if name in INTERNAL or name in PLACES:
                    continue
                if isinstance(value, CALLS):
                    if _replaces(value):
                        mine = _steady(_owner(value), parts(value))
                        own.append((name, sorted(mine.items())))
                elif not (name.startswith("_") and is_of_library(kind)) and (
                    is_plain(value) or (is_array(value) and kind.__module__.startswith("torch."))
                ):
                    own.append((name, value))
        rows.append((index, kind.__qualname__, own))
    return rows


def _replaces(value: Any) -> bool:
    """Whether this is a user's function that replaces a library's on an instance."""
    return isinstance(value, CALLS) and is_foreign(bare(value)) and not of_a_library(value)


def _is_users(module: nn.Module) -> bool:
    return not is_of_library(type(module))


def _parts_of_module(module: nn.Module) -> dict[Path, str]:
    held = {n: x for n, x in vars(module).copy().items() if n not in INTERNAL and n not in PLACES}
    forward = {"forward of the class": type(module).forward}
    return parts(held | forward)


def _replaced(modules: Iterable[nn.Module]) -> list[Any]:
    """Functions that replace methods of library classes or functions of their files."""
    bases = {b for m in modules for b in type(m).__mro__ if is_of_library(b) and b is not object}
    files = {b.__module__ for b in bases} | {"torch.nn.functional"}
    places: list[tuple[str, Mapping[str, Any]]] = [
        (f"{b.__module__}.{b.__qualname__}", vars(b)) for b in bases
    ]
    places += [(name, vars(sys.modules[name])) for name in files if name in sys.modules]
    found = []
    for place, names in places:
        for name, value in tuple(names.items()):
            function = getattr(value, "__func__", value)  # static and class methods
            if isinstance(function, types.FunctionType) and is_foreign(function):
                found.append((place, name, digest(function)))
    return sorted(found)


# -- hooks ------------------------------------------------------------------------------------


def standing_hooks(model: Any, *, ours: bool = True) -> Iterator[str]:
    """One line for each hook on the model: where it is, the function's name, its digest."""
    for hook in standing(model):
        if hook.ours and ours:
            yield f"{hook.where}: {getattr(hook.function, state.SAYS, 'of qkvnorm-lens')}"
        elif not hook.ours:
            name = getattr(bare(hook.function), "__qualname__", type(hook.function).__name__)
            mine = _steady(_owner(hook.function), parts(hook.function))
            yield f"{hook.where}: {name} {digest(sorted(mine.items()))}"


# -- what a pass changes by itself ------------------------------------------------------------


@dataclass
class _Moving:
    """Parts of a hook or a module that its own passes change: a counter, a log."""

    changed: set[Path] = field(default_factory=set)
    grown: dict[Path, frozenset[Path]] = field(default_factory=dict)  # which parts stay known

    def steady(self, found: Mapping[Path, str]) -> dict[Path, str]:
        """The other parts."""
        return {path: x for path, x in found.items() if not self._moves(path)}

    def _moves(self, path: Path) -> bool:
        above = [path[:n] for n in range(len(path) + 1)]
        if any(p in self.changed for p in above):
            return True
        return any(p in self.grown and a not in self.grown[p] for p, a in pairwise(above))

    def learn(self, before: Mapping[Path, str], after: Mapping[Path, str]) -> None:
        """Mark what differs, and where names were added."""
        self.changed |= {p for p in before if p and after.get(p) != before[p]}
        for new in after.keys() - before.keys():
            home = next(new[:n] for n in range(len(new), -1, -1) if new[:n] in before)
            known = frozenset(p for p in before if p[: len(home)] == home)
            self.grown[home] = self.grown.get(home, known) & known


_moving: weakref.WeakKeyDictionary[Any, _Moving] = weakref.WeakKeyDictionary()
States = list[tuple[str, Any, dict[Path, str]]]


def _owner(function: Any) -> Any:
    """What holds a hook's state: the object of a bound method, else the function itself.

    Where that can't be weakly referenced, its method represents all objects of the class.
    """
    owner = getattr(function, "__self__", function)
    try:
        _moving.get(owner)
    except TypeError:
        return bare(function)
    return owner


def _steady(owner: Any, found: dict[Path, str]) -> dict[Path, str]:
    """Parts of a hook or a module that its passes do not change."""
    try:
        moving = _moving.get(owner)
    except TypeError:  # what can't be weakly referenced
        moving = None
    return found if moving is None else moving.steady(found)


def states(model: Any) -> States:
    """For each hook and module of the user's: where it is, what holds its state, and its parts."""
    every = apart.modules(model)
    with inside(every):
        found: States = [(h.where, _owner(h.function), parts(h.function)) for h in users(model)]
    with inside(every, tokens=False):
        mine = [m for m in every if _is_users(m)]
        found += [(type(m).__qualname__, m, _parts_of_module(m)) for m in mine]
        found += [
            (f"{type(m).__qualname__}.{name}", _owner(value), parts(value))
            for m in every
            if not _is_users(m)
            for name, value in vars(m).copy().items()
            if name not in INTERNAL and _replaces(value)
        ]
    return found


def changing(model: Any, before: States) -> list[str]:
    """Where hooks and modules are whose own passes changed what they hold: a log, a counter.

    From now on they are identified by the rest, or each pass would make another model.
    """
    was = {id(owner): found for _, owner, found in before}
    changed = []
    for where, owner, found in states(model):
        old = was.get(id(owner), found)
        if _steady(owner, old) != _steady(owner, found):
            try:
                _moving.setdefault(owner, _Moving()).learn(old, found)
            except TypeError:  # can't be weakly referenced: each pass makes another model
                continue
            changed.append(where)
    return sorted(set(changed))
