"""Leave the model as it was found: training mode, grad mode and hooks, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import nn

_DROPOUT_RATES = ("dropout", "attention_dropout", "attn_dropout", "dropout_p", "p_dropout")


def modules(model: Any) -> list[nn.Module]:
    """Every module of the model, the wrapped one of a TransformerBridge included."""
    roots = [m for m in (model, getattr(model, "original_model", None)) if isinstance(m, nn.Module)]
    seen: dict[int, nn.Module] = {}
    for root in roots:
        for module in root.modules():
            seen.setdefault(id(module), module)
    return list(seen.values())


_checking: ContextVar[bool] = ContextVar("checking", default=False)
_OURS = "_hooks_noise"


@contextmanager
def checking() -> Iterator[None]:
    """Inside, the noise that is on the model rests: a self-check looks at the model itself."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def resting(hook_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of ours that does nothing during a self-check."""

    @wraps(hook_fn)
    def wrapper(tensor: Any, hook: Any) -> Any:
        return None if _checking.get() else hook_fn(tensor, hook)

    setattr(wrapper, _OURS, True)
    return wrapper


def foreign_hooks(point: Any) -> list[Any]:
    """Handles of the hooks on a hook point that are not ours."""
    handles = getattr(point, "fwd_hooks", ())
    return [h for h in handles if not hasattr(getattr(h, "user_hook", None), _OURS)]


class Finished(Exception):
    """Raised in a hook to end a forward pass that has shown what it was run for."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own training flag afterwards."""
    flags = [(module, module.training) for module in modules(model)]
    try:
        for module, training in flags:
            if training:  # a module is slow to set anything on
                module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


def active_dropout(model: Any) -> str | None:
    """Name and rate of a dropout that acts in the model's present mode, or None."""
    for module in modules(model):
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{type(module).__name__}(p={module.p})"
        for name in _DROPOUT_RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                return f"{type(module).__name__}.{name}={rate}"
    return None


def model_dtype(model: Any) -> torch.dtype:
    """Floating dtype of the parameters (the first one's; float32 without parameters)."""
    for module in modules(model):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def refuse_unreadable(model: Any) -> str | None:
    """Why vectors of this model can't be probed (quantised, on the meta device), or None."""
    inner = getattr(model, "original_model", None)
    config = getattr(inner, "config", None)
    if getattr(inner, "is_quantized", False) or getattr(config, "quantization_config", None):
        return "quantised weights"
    for module in modules(model):
        for parameter in module.parameters(recurse=False):
            if parameter.device.type == "meta":
                return "weights on the meta device"
            if not parameter.is_floating_point():
                return f"quantised weights ({parameter.dtype})"
    return None
