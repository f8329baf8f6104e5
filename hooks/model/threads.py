"""Our hooks on a model that other threads may run too.

A hook point is shared by all threads. A measurement's hooks act only in its own thread; a context
such as `NormNoise.applied` acts in all of them. Neither uses TransformerLens's levels, which are
counted for all threads together: each handle is removed on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hooks.model import apart
from hooks.model.ambient import without_autocast
from hooks.model.tap import AttentionTap, Taken

OURS = "_hooks_noise"
"""Marks hooks of ours, which are none of the user's."""
MEASURING = "_hooks_measuring"
"""Marks hooks of a measurement, which edit nothing in other threads."""

Entries = Sequence[tuple[str, Callable[..., Any]]]


@contextmanager
def hooked(model: Any, entries: Entries) -> Iterator[None]:
    """Inside, a measurement's hooks are on; they act only in passes of this thread."""
    owner = threading.get_ident()
    with _on(model, [(name, _Hook(hook_fn, owner)) for name, hook_fn in entries]):
        yield


@contextmanager
def intervening(model: Any, entries: Entries) -> Iterator[None]:
    """Inside, an intervention's hooks are on; they act in every thread that runs the model."""
    with _on(model, [(name, _Hook(hook_fn)) for name, hook_fn in entries]) as handles:
        for handle in handles:
            apart.mark(handle)
        yield


def standing_hooks(point: Any) -> list[Any]:
    """Handles of the hooks on a hook point that belong to no running measurement."""
    handles = getattr(point, "fwd_hooks", ())
    return [h for h in handles if not hasattr(getattr(h, "user_hook", None), MEASURING)]


class _Hook:
    """A hook that runs without autocast; with an owner, a measurement's in that thread only."""

    def __init__(self, hook_fn: Callable[..., Any], owner: int | None = None) -> None:
        self.__dict__.update(getattr(hook_fn, "__dict__", {}))  # what it is marked with
        self.hook_fn = hook_fn
        self.owner = owner
        for mark in (OURS, MEASURING) if owner is not None else ():
            setattr(self, mark, True)

    def __call__(self, tensor: Any, hook: Any) -> Any:
        if self.owner is not None and threading.get_ident() != self.owner:
            return None
        with without_autocast():
            return self.hook_fn(tensor, hook)


@contextmanager
def _on(model: Any, entries: Entries) -> Iterator[list[Any]]:
    """Inside, these hooks are on their points; exactly these are removed again."""
    points = model.hook_dict
    found = [(points[name], hook_fn) for name, hook_fn in entries]
    placed: list[tuple[Any, Any]] = []
    try:
        for point, hook_fn in found:
            # Permanent: neither a reset of the user's nor the end of another context takes it off.
            handle = point.add_hook(hook_fn, is_permanent=True)
            placed.append((point, point.fwd_hooks[-1] if handle is None else handle))
            apart.allow(model, *placed[-1])
        yield [handle for _, handle in placed]
    finally:
        for point, handle in reversed(placed):
            handle.hook.remove()
            _drop(point.fwd_hooks, handle)


def _drop(handles: list[Any], handle: Any) -> None:
    """Take one handle from a list that other threads may change meanwhile."""
    while True:
        ids = list(map(id, handles))
        if id(handle) not in ids:
            return
        found = handles.pop(ids.index(id(handle)))
        if found is handle:
            return
        handles.append(found)  # the list had moved on


class TapOfThreads:
    """An AttentionTap for every thread: torch's function modes act in one thread only.

    Inside, the opening thread has one until the end, and any other thread one for each pass.
    """

    def __init__(self, model: Any) -> None:
        root = getattr(model, "original_model", None)
        self._root = root if isinstance(root, nn.Module) else None
        self._taps: dict[int, AttentionTap] = {}
        self._handles: list[Any] = []

    def take(self, batch: int) -> Taken | None:
        """The latest attention of this thread; None where there was none."""
        tap = self._taps.get(threading.get_ident())
        return None if tap is None else tap.take(batch)

    def __enter__(self) -> TapOfThreads:
        if self._root is not None:
            self._handles = [
                self._root.register_forward_pre_hook(self._begin),
                self._root.register_forward_hook(self._end, always_call=True),
            ]
        tap: Any = AttentionTap()
        self._taps[threading.get_ident()] = tap
        tap.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        tap: Any = self._taps.pop(threading.get_ident())
        tap.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: Any, args: Any) -> None:
        if threading.get_ident() not in self._taps:
            tap: Any = _OfPass()
            self._taps[threading.get_ident()] = tap
            tap.__enter__()

    def _end(self, module: Any, args: Any, output: Any) -> None:
        if isinstance(self._taps.get(threading.get_ident()), _OfPass):
            tap: Any = self._taps.pop(threading.get_ident())
            tap.__exit__(None, None, None)


class _OfPass(AttentionTap):
    """A tap that ends with a pass."""
