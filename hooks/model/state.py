"""Leaves the model as it was found: training mode, grad mode and hooks, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hooks.model import ambient, apart
from hooks.model.apart import modules
from hooks.model.threads import OURS
from hooks.model.weights import codes, has_values

_DROPOUT_RATES = ("dropout", "attention_dropout", "attn_dropout", "dropout_p", "p_dropout")


_checking: ContextVar[bool] = ContextVar("checking", default=False)


@contextmanager
def checking() -> Iterator[None]:
    """Inside, noise on the model is off: a self-check measures the model itself."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def is_checking() -> bool:
    """Whether a self-check is running."""
    return _checking.get()


SAYS = "_hooks_says"
"""Attribute in which a hook of ours says what it does."""


class Resting:
    """Our hook that does nothing during a self-check; ``says`` names what it does otherwise."""

    def __init__(self, hook_fn: Callable[..., Any], says: str) -> None:
        self.hook_fn = hook_fn
        setattr(self, OURS, True)
        setattr(self, SAYS, says)

    def __call__(self, tensor: Any, hook: Any) -> Any:
        """What the hook returns; None in a check."""
        return None if _checking.get() else self.hook_fn(tensor, hook)


def paused_in_checks(hook_fn: Callable[..., Any], says: str) -> Callable[..., Any]:
    """The hook as a :class:`Resting` one."""
    return Resting(hook_fn, says)


class Finished(Exception):
    """Raised in a hook to end a forward pass once it has shown what was needed."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own training flag afterwards.

    Other threads see neither: see :mod:`hooks.model.apart`.
    """
    with apart.apart(model), apart.not_training(model), torch.no_grad():
        yield


def active_dropout(model: Any) -> str | None:
    """Name and rate of a dropout that is active in the model's current mode, or None."""
    turned_off = apart.turned_off(model)
    for module in modules(model):
        if not module.training and id(module) not in turned_off:
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


def pass_dtype(model: Any, prefix: str = "") -> torch.dtype:
    """The least precise dtype in which a pass multiplies matrices; tolerances are based on it.

    For the module of that name, where it has weights, else for the whole model. Under autocast it
    is autocast's dtype.
    """
    part = submodule(model, prefix) if prefix else None
    for of in ([part] if part is not None else []) + [model]:
        dtypes = {
            ambient.autocast_dtype(p.device.type, p.dtype)
            for module in modules(of)
            for p in module.parameters(recurse=False)
            if p.is_floating_point() and p.ndim > 1
        }
        if dtypes:
            return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return model_dtype(model)


def submodule(model: Any, name: str) -> nn.Module | None:
    """The module of that name, as the hooks name it; None where there is none."""
    part: Any = model
    for step in name.split("."):
        part = getattr(part, "_modules", {}).get(step)
    return part if isinstance(part, nn.Module) else None


def dtype_of_passes(model: Any) -> str:
    """The dtype for a report: ``float32``, or ``float32, quantised weights, autocast bfloat16``."""
    dtype = str(model_dtype(model)).removeprefix("torch.")
    cast = [str(d).removeprefix("torch.") for _, d in ambient.autocast_of_passes()]
    parts = (part for m in modules(model) for p in m._parameters.values() for part in codes(p))
    quantised = ["quantised weights"] if any(parts) else []
    return ", ".join([dtype, *quantised, *(f"autocast {name}" for name in cast)])


def refuse_unreadable(model: Any) -> str | None:
    """Why vectors of this model can't be probed (weights without values), or None."""
    for module in modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if not has_values(module, name, parameter):
                return "weights on the meta device"
    return None
