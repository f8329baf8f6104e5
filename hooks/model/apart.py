"""A measurement beside other threads that run, hook and train the same model.

TransformerLens keeps hooks, and some state of a pass, on the modules, where all threads find them.
While a thread measures,

- its passes run its own hooks and those on the model when it began, not those that other threads
  add for their own passes, whose caches would hold our tensors;
- what a bridge keeps on its modules during a pass is private to this thread;
- where training flags must be off, other threads wait at the next module of the model.

None of this is done where no other thread is alive.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

from hooks.errors import UnsupportedModelError
from hooks.model.ambient import OF_THREADS

_STATE_OF_A_PASS = (
    "_current_batch_size",
    "_captured_pre_ln_residual",
    "_stop_at_layer_idx",
    "_start_at_layer_idx",
    "_start_residual",
    "_capture_hf_cache",
    "_last_hf_cache",
    "batch_seq",
)
"""Attributes in which TransformerLens 4.3 keeps something from one module of a pass to another."""

_THREAD, _FOR_A_WHILE = "_hooks_thread", "_hooks_for_a_while"
PATIENCE = 30.0  # seconds to wait for other threads in a model in training mode
_MISSING = object()


class _Mine:
    """What one thread needs for passes of one model."""

    def __init__(self, model: Any, points: Sequence[Any], excluded: set[int]) -> None:
        self.model = model
        self.allowed = {id(p): {k for k in tuple(p._forward_hooks) if k not in excluded}
                        for p in points}  # fmt: skip
        self.private: dict[tuple[int, str], Any] = {}

    def allow(self, point: Any, key: int) -> None:
        """A hook of this thread's own."""
        self.allowed.setdefault(id(point), set()).add(key)


class _Here(threading.local):
    mine: _Mine | None = None


_here = _Here()
_lock = threading.RLock()


def allow(model: Any, point: Any, handle: Any) -> None:
    """Register a new hook with this thread's measurement."""
    mine = _here.mine
    if mine is not None and mine.model is model:
        mine.allow(point, handle.hook.id)


def others() -> list[int]:
    """Threads that may run the model beside this one."""
    monitors = {t.ident for t in threading.enumerate() if type(t).__name__ == "TMonitor"}  # tqdm
    return [i for i in sys._current_frames() if i != threading.get_ident() and i not in monitors]


@contextmanager
def apart(model: Any) -> Iterator[None]:
    """Inside, passes of this thread and those of others do not see each other.

    Raises:
        UnsupportedModelError: temporary hooks of another thread, which may be meant for all threads
            or for its own passes; or weights that were written to meanwhile.
    """
    mark_hooks()
    if (_here.mine is not None and _here.mine.model is model) or not others():
        yield
        return
    before = _here.mine
    points = list({id(p): p for p in model.hook_dict.values()}.values())
    with _lock:
        shared = _shared.setdefault(model, _Shared())
    shared.enter(model, points)
    try:
        _here.mine = _Mine(model, points, _of_others(model, points))
        versions = _versions(model)
        yield
        if _versions(model) != versions:
            raise UnsupportedModelError(
                "weights",
                wanted="weights that stay what they are while they are measured",
                got="some that another thread wrote to",
            )
    finally:
        _here.mine = before
        shared.leave()


def _versions(model: Any) -> list[int]:
    """How often each weight was written to in place, as autograd counts it.

    An offloaded one (on the meta device) is made anew in each pass.
    """
    parameters = [p for m in modules(model) for p in m.parameters(recurse=False)]
    return [p._version for p in parameters if not (p.is_inference() or p.is_meta)]


# -- hooks ----------------------------------------------------------------------------------------


def mark_hooks() -> None:
    """From now on each hook remembers the thread that added it."""
    plain: Any = HookPoint.add_hook
    if hasattr(plain, _THREAD):
        return

    def add_hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = {id(h) for h in (*self.fwd_hooks, *self.bwd_hooks)}
        made = plain(self, *args, **kwargs)
        for handle in (made,) if made is not None else (*self.fwd_hooks, *self.bwd_hooks):
            if id(handle) not in known:
                setattr(handle, _THREAD, threading.get_ident())
        return made

    add_hook.__doc__, add_hook.__wrapped__ = plain.__doc__, plain  # type: ignore[attr-defined]
    setattr(add_hook, _THREAD, True)
    HookPoint.add_hook = add_hook  # type: ignore[method-assign]


def mark(handle: Any) -> None:
    """Mark an intervention that acts while a context of this thread is open."""
    setattr(handle, _THREAD, threading.get_ident())
    setattr(handle, _FOR_A_WHILE, True)


def _of_others(model: Any, points: Sequence[Any]) -> set[int]:
    """Temporary hooks, for a pass of another thread."""
    me, alive = threading.get_ident(), set(others())
    found = [
        (point, handle, thread)
        for point in points
        for handle in tuple(point.fwd_hooks)
        if (getattr(handle, "context_level", None) is not None or hasattr(handle, _FOR_A_WHILE))
        and (thread := getattr(handle, _THREAD, me)) != me
        and thread in alive
    ]
    if not found:
        return set()
    inside = _passes(model)
    for point, handle, thread in found:
        # A pass may have ended since: then its hooks are gone, or go.
        if thread not in inside and any(h is handle for h in point.fwd_hooks):
            inside = _passes(model)
            if thread in inside:
                continue
            names = {t.ident: t.name for t in threading.enumerate()}
            raise UnsupportedModelError(
                f"hooks on {point.name}",
                wanted="hooks of this thread, or model.add_hook, which holds for all",
                got=f"one that thread {names.get(thread, thread)!r} put on for a while: measure in "
                "that thread, or when its context is closed",
            )
    return {handle.hook.id for _, handle, _ in found}


def _passes(model: Any) -> set[int]:
    """Other threads that are inside the model."""
    roots = {id(m) for m in (model, getattr(model, "original_model", None)) if m is not None}
    inside = roots | {id(m) for m in modules(model)}
    me, frames = threading.get_ident(), sys._current_frames()
    return {t for t, frame in frames.items() if t != me and _is_inside(frame, inside)}


def _is_inside(frame: FrameType | None, modules: set[int]) -> bool:
    """Whether a method of one of these modules is on a stack."""
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1] and id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False


def modules(model: Any) -> list[nn.Module]:
    """Every module of the model, the wrapped one of a TransformerBridge included."""
    roots = [m for m in (model, getattr(model, "original_model", None)) if isinstance(m, nn.Module)]
    return list({id(m): m for root in roots for m in root.modules()}.values())


# -- what threads share ---------------------------------------------------------------------------


class _Shared:
    """What is installed on a model while one or more threads measure it."""

    def __init__(self) -> None:
        self.threads = 0
        self.points: list[Any] = []

    def enter(self, model: Any, points: Sequence[Any]) -> None:
        with _lock:
            self.threads += 1
            if self.threads > 1:
                return
            self.points = list(points)
            for point in points:
                point.__dict__["_compiled_call_impl"] = _dispatch(point)
            _make_private(_kinds(model, points))

    def leave(self) -> None:
        with _lock:
            self.threads -= 1
            if self.threads:
                return
            for point in self.points:
                point.__dict__.pop("_compiled_call_impl", None)
            self.points = []
            _make_public()


_shared: weakref.WeakKeyDictionary[Any, _Shared] = weakref.WeakKeyDictionary()


def _dispatch(point: Any) -> Callable[..., Any]:
    """How a hook point is called meanwhile: as usual, but in our thread with its own hooks."""
    of = weakref.ref(point)

    def call(*args: Any, **kwargs: Any) -> Any:
        point, mine = of(), _here.mine
        assert point is not None
        allowed = None if mine is None else mine.allowed.get(id(point))
        if allowed is None:
            return point._call_impl(*args, **kwargs)
        out = point.forward(*args, **kwargs)
        for key, hook_fn in tuple(point._forward_hooks.items()):
            if key in allowed:
                result = hook_fn(point, args, out)
                out = out if result is None else result
        return out

    setattr(call, OF_THREADS, True)
    return call


def _kinds(model: Any, points: Sequence[Any]) -> set[type]:
    """Classes of TransformerLens whose instances keep state during a pass."""
    conversions = (getattr(p, "hook_conversion", None) for p in points)
    things = [model, *modules(model), *(c for c in conversions if hasattr(c, "batch_seq"))]
    found = set()
    for kind in {type(thing) for thing in things}:
        ours = [k for k in kind.__mro__ if k.__module__.startswith("transformer_lens.")]
        if ours and not issubclass(kind, HookPoint):
            found.add(ours[0])
    return found


_made_private: list[set[tuple[type, str]]] = []  # for each model that is measured


def _make_private(kinds: set[type]) -> None:
    made = {(k, n) for k in kinds for n in _STATE_OF_A_PASS}
    standing = set().union(*_made_private)
    free = {(k, n) for k, n in made - standing if n not in k.__dict__}
    for kind, name in free:
        setattr(kind, name, _Private(name))
    _made_private.append(free | (made & standing))


def _make_public() -> None:
    """Restore shared state when the last measurement is over: threads take turns, models do not."""
    if any(shared.threads for shared in _shared.values()):
        return
    for kind, name in set().union(*_made_private):
        delattr(kind, name)
    _made_private.clear()


class _Private:
    """An attribute that is private to a measuring thread; other threads see the usual value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(self.name)
        value = instance.__dict__.get(self.name, _MISSING)
        mine = _here.mine
        if mine is not None:
            # Nothing of a pass of another thread; None where the class itself begins with it.
            empty = _MISSING if value is _MISSING else None
            value = mine.private.get((id(instance), self.name), empty)
        if value is _MISSING:
            raise AttributeError(self.name)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        mine = _here.mine
        if mine is None:
            instance.__dict__[self.name] = value
        else:
            mine.private[id(instance), self.name] = value

    def __delete__(self, instance: Any) -> None:
        mine = _here.mine
        values: dict[Any, Any] = instance.__dict__ if mine is None else mine.private
        key: Any = self.name if mine is None else (id(instance), self.name)
        if key not in values:
            raise AttributeError(self.name)
        del values[key]


# -- training mode --------------------------------------------------------------------------------


class _Gate:
    """Other threads wait at the next module of a model while its training flags are off."""

    def __init__(self) -> None:
        self.free = threading.Condition(_lock)
        self.owners: dict[int, int] = {}
        self.waiting: set[int] = set()
        self.flags: list[nn.Module] = []
        self.handles: list[Any] = []

    def close(self, model: Any) -> None:
        """Stop other threads, then turn the flags off."""
        me = threading.get_ident()
        with self.free:
            while self.owners and me not in self.owners:  # one measurement after the other
                self.free.wait()
            self.owners[me] = self.owners.get(me, 0) + 1
            if self.owners[me] > 1:
                return
        try:
            every = modules(model)
            if others():
                self.handles = [m.register_forward_pre_hook(self._wait) for m in every]
            self._outwait(model, time.monotonic() + PATIENCE)
            for module in every:
                if module.training:
                    self.flags.append(module)
                    module.training = False
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Restore the flags; waiting threads continue."""
        me = threading.get_ident()
        self.owners[me] -= 1
        if self.owners[me]:
            return
        for module in self.flags:
            module.training = True
        for handle in self.handles:
            handle.remove()
        with self.free:
            self.flags, self.handles = [], []
            del self.owners[me]
            self.free.notify_all()

    def turned_off(self) -> set[int]:
        """Modules that only seem not to be in training, as seen from other threads."""
        return set() if threading.get_ident() in self.owners else {id(m) for m in self.flags}

    def _outwait(self, model: Any, deadline: float) -> None:
        """Wait until every other thread is outside the model, or before one of its modules."""
        while others() and (running := _passes(model) - self.waiting):
            if time.monotonic() > deadline:
                names = {t.ident: t.name for t in threading.enumerate()}
                raise UnsupportedModelError(
                    "a model in training mode",
                    wanted="other threads to stop for a moment, so that dropout can be turned off",
                    got=f"{sorted(str(names.get(t, t)) for t in running)} inside of one of its "
                    f"modules for more than {PATIENCE:.0f} s; in eval mode nobody waits",
                )
            time.sleep(0.001)

    def _wait(self, module: nn.Module, args: Any) -> None:
        me = threading.get_ident()
        if not self.owners or me in self.owners:
            return
        with self.free:
            self.waiting.add(me)
            try:
                while self.owners:
                    self.free.wait()
            finally:
                self.waiting.discard(me)

    def after_fork(self) -> None:
        """In a child, open what another thread of the parent had closed."""
        self.free = threading.Condition(_lock)
        self.waiting = set()
        if threading.get_ident() not in self.owners:
            for module in self.flags:
                module.training = True
            self.owners, self.flags = {}, []


_gates: weakref.WeakKeyDictionary[Any, _Gate] = weakref.WeakKeyDictionary()


@contextmanager
def not_training(model: Any) -> Iterator[None]:
    """Turns every training flag off inside, and restores it afterwards.

    Raises:
        UnsupportedModelError: another thread's pass does not stop, or another thread turned flags
            on meanwhile.
    """
    with _lock:
        gate = _gates.get(model)
        if gate is None and any(m.training for m in modules(model)):
            gate = _gates[model] = _Gate()
    if gate is not None:
        gate.close(model)
    try:
        yield
        changed = [m for m in modules(model) if m.training]
        if changed and others():
            raise UnsupportedModelError(
                "a model in eval mode",
                wanted="its training flags left alone while it is measured",
                got=f"{len(changed)} that were turned on",
            )
        for module in changed:
            module.training = False
    finally:
        if gate is not None:
            gate.open()


def turned_off(model: Any) -> set[int]:
    """Ids of modules whose training flag is off only while another thread measures."""
    gate = _gates.get(model)
    return set() if gate is None else gate.turned_off()


def _after_fork() -> None:
    """In a child only this thread is left: nobody releases what others held."""
    global _lock
    _lock = threading.RLock()
    for gate in list(_gates.values()):
        gate.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
mark_hooks()
