"""Shapes and types of both packages are checked while tests run: jaxtyping with beartype.

jaxtyping's own hook binds and checks the arguments of every function twice, at 20 to 40
microseconds a call, and wraps closures anew each time they are made. Here beartype checks each
function of a module or class once, those whose annotations name a shape within sizes of their own,
and closures go free: probes of tiny models take half the time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))

_whole: Any = jaxtyping.jaxtyped

OURS = ("hooks", "qkvnorm_lens")
# It walks through all that a model holds, whatever that is: 20,000 calls for a fingerprint.
FREE = ("hooks.model.words",)


def install() -> None:
    """Check everything that is imported from now on; before any of it is."""
    early = [name for name in OURS if name in sys.modules]
    assert not early, f"imported before the shape checks were installed: {early}"

    def checked(fn: Any = None, *, typechecker: Callable[[Any], Any] | None) -> Any:
        if fn is None:
            return lambda fn: checked(fn, typechecker=typechecker)
        if typechecker is None or not inspect.isfunction(fn):
            return _whole(fn, typechecker=typechecker)
        if "<locals>" in fn.__qualname__ or fn.__module__ in FREE:
            return fn
        hints = {name: _read(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
        return _checked(fn, hints, shapes="jaxtyping." in repr(hints))

    jaxtyping.jaxtyped = checked  # the hook writes this name before each function
    jaxtyping.install_import_hook(OURS, "beartype.beartype")


def _checked(fn: Any, hints: dict[str, Any], *, shapes: bool) -> Callable[..., Any]:
    said, fn.__annotations__ = fn.__annotations__, hints
    try:
        checked = _beartype(fn)
    finally:
        fn.__annotations__ = said
    checked.__annotations__ = said

    @functools.wraps(fn)
    def either(*args: Any, **named: Any) -> Any:
        return (fn if jaxtyping.config.jaxtyping_disable else checked)(*args, **named)

    @functools.wraps(fn)
    def within_a_call(*args: Any, **named: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **named)
        with _whole("context"):  # sizes of axes hold in this call, and in none that it makes
            return checked(*args, **named)

    return within_a_call if shapes else either


def _read(hint: Any, names: dict[str, Any]) -> Any:
    """As in jaxtyping, a name that exists for mypy alone stands for anything."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except (NameError, AttributeError, TypeError):
        return Any
