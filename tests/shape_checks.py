"""Shapes and types of both packages are checked while tests run: jaxtyping with beartype.

jaxtyping's own hook wraps every function, at 20 to 40 microseconds a call, and closures anew each
time they are made. Here it wraps those whose annotations name a shape, beartype alone the other
functions of a module or class, and closures go free: probes of tiny models take half the time.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import jaxtyping

OURS = ("hooks", "qkvnorm_lens")
_SHAPED = re.compile(r"\b(Float|Int|UInt32|UInt64|Bool|Shaped)\[")


def install() -> None:
    """Check everything that is imported from now on; before any of it is."""
    early = [name for name in OURS if name in sys.modules]
    assert not early, f"imported before the shape checks were installed: {early}"
    whole = jaxtyping.jaxtyped

    def checked(fn: Any = None, *, typechecker: Callable[[Any], Any] | None) -> Any:
        if fn is None:
            return lambda fn: checked(fn, typechecker=typechecker)
        if typechecker is None or not inspect.isfunction(fn):
            return whole(fn, typechecker=typechecker)
        if "<locals>" in fn.__qualname__:
            return fn
        if any(_SHAPED.search(str(said)) for said in fn.__annotations__.values()):
            return whole(fn, typechecker=typechecker)
        return _types_alone(fn, typechecker)

    jaxtyping.jaxtyped = checked  # the hook writes this name before each function
    jaxtyping.install_import_hook(OURS, "beartype.beartype")


def _types_alone(fn: Any, typechecker: Callable[[Any], Any]) -> Any:
    """As jaxtyping does, names that exist for mypy only stand for anything."""
    said = fn.__annotations__
    fn.__annotations__ = {name: _read(hint, fn.__globals__) for name, hint in said.items()}
    try:
        checked = typechecker(fn)
    finally:
        fn.__annotations__ = said
    checked.__annotations__ = said

    @functools.wraps(fn)
    def either(*args: Any, **named: Any) -> Any:
        return (fn if jaxtyping.config.jaxtyping_disable else checked)(*args, **named)

    return either


def _read(hint: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except (NameError, AttributeError, TypeError):
        return Any
