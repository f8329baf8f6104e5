"""A model's weights where they really are: also quantised ones, and those that accelerate offloads.

A quantised weight is a tensor of codes, with scales beside them: in a subclass of tensors, or in
attributes of the parameter. An offloaded one is on the meta device; its values are in the map from
which accelerate's hook takes them before each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_DEEP = 3  # objects within objects


def weights_of(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters; one that has no values stays on the meta device."""
    for prefix, module in root.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            value = _offloaded(module, leaf) if parameter.is_meta else parameter
            yield from parts_of(name, parameter if value is None else value)


def parts_of(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of: codes, scales, zero points."""
    flatten = getattr(x, "__tensor_flatten__", None)
    if flatten is None:
        yield name, x
        yield from _beside(name, vars(x) if hasattr(x, "__dict__") else {}, 0)
        return
    names, rest = flatten()
    yield f"{name} {type(x).__qualname__} {_settings(rest)}", torch.zeros(0)
    for part in names:
        yield from parts_of(f"{name}.{part}", getattr(x, part))


def _settings(rest: Any) -> str:
    """What a subclass needs beside its tensors, as far as its text is the same in each process."""
    if isinstance(rest, dict):
        return ", ".join(f"{k}: {_settings(v)}" for k, v in sorted(rest.items(), key=str))
    if isinstance(rest, (list, tuple)):
        return ", ".join(map(_settings, rest))
    plain = rest is None or isinstance(rest, (str, int, float, torch.dtype, torch.Size))
    return str(rest) if plain else type(rest).__qualname__


def _beside(name: str, held: dict[str, Any], depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, value in sorted(held.items()):
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif depth < _DEEP and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            yield from _beside(f"{name}.{key}", vars(value), depth + 1)


def codes(x: Tensor | None) -> Iterator[bool]:
    """Of each part of a parameter whether it holds a quantised weight's codes."""
    for _, part in [] if x is None else parts_of("", x):
        yield not part.is_floating_point() and not part.is_complex()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    yield from [] if hook is None else getattr(hook, "hooks", None) or [hook]


def _offloaded(module: nn.Module, leaf: str) -> Tensor | None:
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and getattr(hook, "offload", False):
            value = weights[leaf]
            return value if isinstance(value, Tensor) else torch.as_tensor(value)
    return None


def has_values(module: nn.Module, leaf: str, parameter: Tensor) -> bool:
    """Whether a parameter has values, here or where it is offloaded to."""
    return not parameter.is_meta or any(
        getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None
        for hook in _hooks(module)
    )


def execution_device(root: nn.Module) -> torch.device | None:
    """The device to which accelerate brings offloaded weights; None where nothing is offloaded."""
    for module in root.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None
