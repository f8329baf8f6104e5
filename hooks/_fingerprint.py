"""What a model is at this moment, as short digests by name: equal ones mean the same model.

Whatever is remembered of a model, or merged with other numbers of it, is remembered under these.
All weights are read each time: their version counters would be faster, but miss what is written
through ``.data``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import hashlib
import types
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hooks import _state
from hooks._ambient import autocast_of_passes
from hooks._standing import bare, of_a_library, standing, users

_Plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEEP = 6  # containers within containers that are followed
_INTERNAL = frozenset(nn.Module().__dict__) | {"training"}
# Where a model came from and where it lies say nothing of what it computes.
_PLACES = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "device",
        "n_devices",
        "model_name",
        "tokenizer_name",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
    }
)
# Switches of a HookedTransformer that change where q, k and v are computed, or the heads of k.
_FLAGS = ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")

# Libraries whose objects say too much, or nothing, in their attributes.
_OPAQUE = ("builtins", "torch", "numpy", "pandas", "transformers", "transformer_lens", "datasets")

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_changing: weakref.WeakSet[Any] = weakref.WeakSet()


def fingerprint(model: Any) -> dict[str, Any]:
    """Digests of everything that a forward pass of the model depends on beside its input.

    Keys:
        weights, buffers: all parameters and buffers, name, dtype, shape and every bit.
        configuration: of Hugging Face and of TransformerLens.
        modules: plain attributes of every module (rates, scalings, active adapters), and forward
            methods that were replaced.
        hooks: one line for each hook that stands on the model: where, which function, and a digest
            of its code and of the values that it closes over.
        attention, autocast, precision: implementation of attention; autocast's dtypes; how float32
            matrices are multiplied.
    """
    inner = getattr(model, "original_model", None)
    every = _state.modules(model)
    root = inner if isinstance(inner, nn.Module) else model
    tensors = isinstance(root, nn.Module)
    return {
        "weights": _of_tensors(root.named_parameters() if tensors else ()),
        "buffers": _of_tensors(root.named_buffers() if tensors else ()),
        "configuration": _digest(
            [
                _of_config(getattr(inner, "config", None)),
                _of_config(model.cfg),
                bool(getattr(model, "compatibility_mode", False)),
                [getattr(model.cfg, name, None) for name in _FLAGS],
            ]
        ),
        "modules": _of_modules(every),
        "hooks": [*standing_hooks(model)],
        "attention": [
            str(getattr(getattr(inner, "config", None), "_attn_implementation", None)),
            str(getattr(model.cfg, "attn_implementation", None)),
        ],
        "autocast": autocast(model),
        "precision": torch.get_float32_matmul_precision(),
    }


def key_of(model: Any) -> tuple[str, str]:
    """What a verdict on the model is remembered under: its fingerprint, without hooks of ours.

    Theirs rest in a self-check. Versions can't change within a process.
    """
    found = fingerprint(model)
    found["hooks"] = [*standing_hooks(model, ours=False)]
    device = str(next((p.device for m in _state.modules(model) for p in m.parameters()), "cpu"))
    return _digest(found), device


def autocast(model: Any) -> str:
    """The dtype that autocast computes in on the model's device; empty where it is off."""
    kinds = {p.device.type for m in _state.modules(model) for p in m.parameters(recurse=False)}
    cast = [(device, dtype) for device, dtype in autocast_of_passes() if device in kinds]
    return ", ".join(f"{device} {str(dtype).removeprefix('torch.')}" for device, dtype in cast)


@functools.cache
def _version(library: str) -> str:
    return version(library)  # reads the library's metadata: 8 ms


def versions() -> dict[str, str]:
    """Of the libraries that a pass runs through."""
    return {name: _version(name) for name in ("transformer-lens", "torch", "transformers", "numpy")}


# -- tensors ----------------------------------------------------------------------------------


def _of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of tensors with their names."""
    from hooks._hashing import hash_tensor  # compiled code: the first call loads it

    rows = []
    for name, x in named:
        bits = None if x.device.type == "meta" else hash_tensor(x)
        rows.append((f"{name} {x.dtype} {tuple(x.shape)}", bits))
    # Only now is an accelerator waited for.
    return _short("\n".join(f"{words} {_number(bits)}" for words, bits in rows))


def _number(bits: int | Tensor | None) -> str:
    if bits is None:
        return "meta"
    return str((int(bits) if isinstance(bits, Tensor) else bits) & ((1 << 64) - 1))


# -- settings ---------------------------------------------------------------------------------


def _of_config(config: Any) -> str:
    """A configuration's values, where the model came from left out."""
    if config is None:
        return ""
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else vars(config)
    return _digest(_without_places(values))


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items() if k not in _PLACES}
    return value


def _of_modules(modules: Iterable[nn.Module], *, follow: bool = True) -> str:
    """Plain attributes of the modules, and methods that stand on an instance.

    What TransformerLens and transformers keep to themselves changes from pass to pass.
    """
    from transformer_lens.hook_points import HookPoint

    rows: list[Any] = []
    for index, module in enumerate(modules):
        kind = type(module)
        if isinstance(module, HookPoint):
            continue
        private = not kind.__module__.startswith(("transformer_lens.", "transformers."))
        own: list[Any] = []
        # Replaced for every module of a class; what is followed may be bound to this very module.
        if follow and not private and not of_a_library(kind.forward):
            own.append(("forward", _of_function(kind.forward, 0)))
        for name, value in vars(module).items():
            if name in _INTERNAL or name in _PLACES or (name.startswith("_") and not private):
                continue
            if _is_plain(value) or (private and _is_array(value)):
                own.append((name, value))
            elif follow and (
                (private and isinstance(value, _FUNCTIONS))
                or (name == "forward" and not of_a_library(value))
            ):
                own.append((name, _of_function(value, 0)))
        rows.append((index, kind.__qualname__, own))
    return _digest(rows)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "dtype"))


def _is_plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is a number, a text, or a container of such."""
    if isinstance(value, (*_Plain, enum.Enum)):
        return True
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(x, depth - 1) for x in value)
    if depth and isinstance(value, dict):
        return all(_is_plain(x, depth - 1) for pair in value.items() for x in pair)
    return False


# -- hooks ------------------------------------------------------------------------------------


def standing_hooks(model: Any, *, ours: bool = True) -> Iterator[str]:
    """A line for each hook on the model: where it is, the function's name, a digest of it."""
    for hook in standing(model):
        if hook.ours and ours:
            yield f"{hook.where}: {getattr(hook.function, _state.SAYS, 'of qkvnorm-lens')}"
        elif not hook.ours:
            yield _line(hook.where, hook.function)


def states_of_hooks(model: Any) -> list[tuple[str, Any, str]]:
    """Of each hook of the user's: where it is, the function, and a digest with all it holds."""
    return [(h.where, bare(h.function), _of_function(h.function, 0)) for h in users(model)]


def changing_hooks(model: Any, before: Sequence[tuple[str, Any, str]]) -> list[str]:
    """Where hooks are whose own passes changed what they hold: a log, a counter.

    From now on they are told apart by their code alone, or each pass would make another model.
    """
    was = {id(function): digest for _, function, digest in before}
    found = []
    for where, function, digest in states_of_hooks(model):
        if was.get(id(function), digest) != digest:
            with contextlib.suppress(TypeError):  # what can't be weakly referenced
                _changing.add(function)
                found.append(where)
    return sorted(set(found))


def _line(where: str, function: Any) -> str:
    plain = bare(function)
    name = getattr(plain, "__qualname__", type(function).__name__)
    if _is_changing(plain):
        code = getattr(plain, "__code__", None)
        return f"{where}: {name} {'' if code is None else _digest(_of_code(code))}, with a state"
    return f"{where}: {name} {_of_function(function, 0)}"


def _is_changing(function: Any) -> bool:
    try:
        return function in _changing
    except TypeError:
        return False


def _of_function(function: Any, depth: int) -> str:
    """Code, defaults, and the values that a function closes over, is bound to or reads."""
    if isinstance(function, functools.partial):
        inner = _of_function(function.func, depth)
        return _digest([inner, function.args, dict(function.keywords)], depth + 1)
    bound = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return _digest(function, depth + 1)
    cells = [_contents(cell) for cell in function.__closure__ or ()]
    known = function.__globals__
    # What a library's function reads is the library's, whose version is in the report.
    names = () if _is_opaque(function) else sorted(_names(code))
    read = {n: _read(known[n], function.__module__) for n in names if n in known}
    return _digest(
        [_of_code(code), function.__defaults__, function.__kwdefaults__, cells, read, bound],
        depth + 1,
    )


def _of_code(code: types.CodeType) -> list[Any]:
    constants = [_of_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, constants, code.co_names]


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names}.union(*(_names(c) for c in inner))


def _read(value: Any, module: str) -> Any:
    """A global that a hook reads, such as a notebook's number; code of other modules by name."""
    if isinstance(value, type):
        return value
    if getattr(value, "__module__", None) != module and callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


# -- values -----------------------------------------------------------------------------------


def _digest(value: Any, depth: int = 0) -> str:
    """Of a value, through containers, dataclasses and functions.

    An object of another kind is equal to itself alone.
    """
    return _short(_words(value, depth))


def _words(value: Any, depth: int) -> str:
    if isinstance(value, _Plain):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__} {value.name}"
    if isinstance(value, Tensor):
        return f"tensor {_of_tensors([('', value)])}"
    if isinstance(value, nn.Module):
        mine = [*value.named_parameters(), *value.named_buffers()]
        attributes = _of_modules(value.modules(), follow=False)
        return f"{type(value).__qualname__} {_of_tensors(mine)} {attributes}"
    if _is_array(value):
        return f"array {value.dtype} {value.shape} {_short(bytes(value.tobytes()))}"
    if depth < _DEEP:
        inside = _inside(value, depth)
        if inside is not None:
            return f"{type(value).__qualname__}({inside})"
    return f"{type(value).__qualname__} {_token(value)}"


def _inside(value: Any, depth: int) -> str | None:
    """What a container holds; None for what is none."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_words(k, depth + 1)}: {_words(v, depth + 1)}" for k, v in value.items()
        )
    if isinstance(value, (set, frozenset)):
        return ", ".join(sorted(_words(x, depth + 1) for x in value))
    if isinstance(value, (list, tuple, collections.deque)):
        return ", ".join(_words(x, depth + 1) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _words(
            {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, depth + 1
        )
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _of_function(value, depth)
    if isinstance(value, type) and depth < _DEEP:
        return f"{value.__qualname__} {_words(_settings_of(value), depth + 1)}"
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return getattr(value, "__qualname__", value.__name__)
    if _is_opaque(type(value)):
        return None
    # An object of the user's, such as a hook with state.
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    held = {n: getattr(value, n) for n in slots if hasattr(value, n)}
    held |= _settings_of(type(value)) | getattr(value, "__dict__", {})
    return _words(held, depth + 1) if held or hasattr(value, "__dict__") else None


def _is_opaque(made: Any) -> bool:
    """Whether a class or a function is a library's; `torch_of_mine` is none."""
    return str(made.__module__).split(".")[0] in _OPAQUE


def _settings_of(kind: type) -> dict[str, Any]:
    """Plain attributes of a class of the user's."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not _is_opaque(base):
            plain = {n: v for n, v in vars(base).items() if _is_plain(v)}
            found |= {n: v for n, v in plain.items() if not n.startswith("__")}
    return found


def _token(value: Any) -> str:
    """A name for an object of this process whose state can't be read."""
    try:
        return _tokens.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # neither hashable nor weakly referenced
        return f"{uuid.getnode():x} {id(value)}"


def _short(data: str | bytes) -> str:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.sha256(raw).hexdigest()[:16]
