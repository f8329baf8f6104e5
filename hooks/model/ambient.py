"""What surrounds our calls: the user's autocast, and a forked process.

Measured passes run under the caller's autocast; everything computed from them runs without it. A
forked child has none of its parent's threads.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from hooks.arguments import check_text

_P = ParamSpec("_P")
_T = TypeVar("_T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _Here(threading.local):
    """This thread's state: how deep in our calls it is.

    For the outermost call: the autocast around it, and whether it was given a compiled model.
    """

    depth: int = 0
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    compiled: bool = False


_here = _Here()
OF_THREADS = "_hooks_of_threads"
"""Marks what replaces a compiled call while threads share a model."""


def measurement(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """A public call that runs the model: its own arithmetic runs without the caller's autocast."""

    @wraps(call)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        _forks.check()
        if kwargs.get("name") is not None:  # before anything is run
            check_text("name", kwargs["name"])
        outermost = not _here.depth
        given = (*args, *kwargs.values())
        args = tuple(_plain(x) for x in args)  # type: ignore[assignment]
        kwargs = {name: _plain(x) for name, x in kwargs.items()}  # type: ignore[assignment]
        compiled = _compiled_in_place(args + tuple(kwargs.values()))
        if outermost:
            _here.autocast = autocast_now()
            _here.compiled = bool(compiled) or any(_is_compiled(x) for x in given)
            _forks.measuring.append(threading.get_ident())
        _here.depth += 1
        try:
            with without_autocast(), on_cpu(), _uncompiled(compiled):
                return call(*args, **kwargs)
        finally:
            _here.depth -= 1
            if outermost:
                _here.autocast, _here.compiled = (), False
                _forks.measuring.remove(threading.get_ident())

    return wrapper


# -- compiled models ------------------------------------------------------------------------------


def _is_compiled(given: object) -> bool:
    return type(given).__name__ == "OptimizedModule" and hasattr(given, "_orig_mod")


def _plain(given: Any) -> Any:
    """The module that torch.compile wrapped, with the same weights and hook points.

    Each of our hooks would trigger another compilation, for a minute, until torch gives up.
    """
    return given._orig_mod if _is_compiled(given) else given


def _compiled_in_place(given: tuple[Any, ...]) -> list[Any]:
    """Modules on which ``compile()`` was called."""
    roots = [y for x in given for y in (x, getattr(x, "original_model", None))]
    every = (m for root in roots if isinstance(root, torch.nn.Module) for m in root.modules())
    return list(
        {id(m): m for m in every if _compiled_call(m) is not None or id(m) in _held}.values()
    )


def _compiled_call(module: Any) -> Any:
    """None also where another thread's measurement has replaced the compiled call."""
    call = module._compiled_call_impl
    return None if getattr(call, OF_THREADS, False) else call


_held: dict[int, tuple[Any, int]] = {}  # by module: its compiled call, and who needs it away
_holding = threading.Lock()


@contextmanager
def _uncompiled(modules: list[Any]) -> Iterator[None]:
    """Call modules uncompiled; their compiled code is kept until no thread measures."""
    with _holding:
        for module in modules:
            call, n = _held.get(id(module), (module._compiled_call_impl, 0))
            _held[id(module)] = call, n + 1
            module._compiled_call_impl = None
    try:
        yield
    finally:
        with _holding:
            for module in modules:
                call, n = _held.pop(id(module))
                if n > 1:
                    _held[id(module)] = call, n - 1
                else:
                    module._compiled_call_impl = call


def was_compiled() -> bool:
    """Whether our running call was given a compiled model."""
    return _here.compiled


# -- autocast -------------------------------------------------------------------------------------


def autocast_now() -> tuple[tuple[str, torch.dtype], ...]:
    """Device types under autocast in this thread, and the dtype of each."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))


def autocast_of_passes() -> tuple[tuple[str, torch.dtype], ...]:
    """Device types under autocast in a model's pass: within our calls, those around the call."""
    return _here.autocast if _here.depth else autocast_now()


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a matrix product of this dtype is made in; autocast leaves float64 alone."""
    return dtype if dtype == torch.float64 else dict(autocast_of_passes()).get(device, dtype)


@contextmanager
def model_pass() -> Iterator[None]:
    """The caller's autocast, around a pass of the model.

    Without its cache: a weight cast without gradients would later be used with them.
    """
    given = _here.autocast
    if not given:
        yield
        return
    caching = torch.is_autocast_cache_enabled()
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d, _ in given]
    torch.set_autocast_cache_enabled(False)
    try:
        for device, dtype in given:
            torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_cache_enabled(caching)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Run our own arithmetic in the dtypes it names, whatever the model runs under."""
    active = [d for d in _DEVICES if torch.is_autocast_enabled(d)]
    for device in active:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in active:
            torch.set_autocast_enabled(device, True)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make our tensors without a device on the CPU, where our arithmetic is."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


# -- forks ----------------------------------------------------------------------------------------


class _Forks:
    """Whether this process is a forked child, and what its parent was doing."""

    def __init__(self) -> None:
        self.measuring: list[int] = []  # threads
        self.child = False
        self.interrupted = False  # another thread was measuring, and may have held any lock

    def in_child(self) -> None:
        """Runs just after a fork, in the only remaining thread."""
        me = threading.get_ident()
        self.child = True
        self.interrupted |= any(thread != me for thread in self.measuring)
        self.measuring = [thread for thread in self.measuring if thread == me]

    def check(self) -> None:
        """One thread for torch in a child: its first OpenMP region would wait for the parent's.

        Raises:
            RuntimeError: another thread of the parent was measuring at the fork.
        """
        if not self.child:
            return
        if self.interrupted:
            raise RuntimeError(
                "a forked process: wanted a parent that was not measuring when it forked; got one "
                "with a measurement in another thread, whose locks are held for ever here. Start "
                "the process with multiprocessing.get_context('spawn') or 'forkserver'"
            )
        if torch.get_num_threads() > 1:
            warnings.warn(
                "a forked process: torch's threads stayed in the parent, and its first parallel "
                "loop would wait for them; torch.set_num_threads(1) from here on",
                stacklevel=4,
            )
            torch.set_num_threads(1)


_forks = _Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forks.in_child)
