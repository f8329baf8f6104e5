"""Digests of what a hook, a module or a configuration holds: equal ones mean equal values.

Containers, dataclasses, functions (code, defaults, what they close over and read) and objects are
followed; libraries' functions go by their names, as their versions are in the report.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import hashlib
import sys
import types
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_Plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEEP = 6  # containers within containers that are followed
_SPLIT = 5  # levels whose parts are digested separately
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
CALLS = (*FUNCTIONS, types.MethodType, functools.partial)
# Libraries whose functions go by name, and whose objects mostly hold too much.
_LIBRARIES = (
    "builtins",
    "torch",
    "numpy",
    "pandas",
    "transformers",
    "transformer_lens",
    "datasets",
)
INTERNAL = frozenset(nn.Module().__dict__) | {"training"}
# Where a model came from and where it is stored say nothing about what it computes.
PLACES = frozenset(
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

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Model:
    """What is digested elsewhere: the model's modules, by id. Unknown objects by token?"""

    modules: frozenset[int] = frozenset()
    tokens: bool = True


_NO_MODEL = _Model()
_model: ContextVar[_Model] = ContextVar("_model", default=_NO_MODEL)
_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@contextmanager
def inside(modules: Iterable[nn.Module], *, tokens: bool = True) -> Iterator[None]:
    """Inside, these modules go by their class: they are digested separately.

    Unreadable objects equal only themselves; without ``tokens``, all of their kind.
    """
    token = _model.set(_Model(frozenset(map(id, modules)), tokens))
    try:
        yield
    finally:
        _model.reset(token)


def digest(value: Any) -> str:
    """Digest of a value and all it holds."""
    return short(_words(value, 0))


def short(data: str | bytes) -> str:
    """16 digits of a SHA-256."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.sha256(raw).hexdigest()[:16]


def parts(value: Any) -> dict[Path, str]:
    """A digest of each part that a function or an object holds, by the names on the way to it."""
    found: dict[Path, str] = {}
    _split(value, (), found, set())
    return found


def _split(value: Any, path: Path, found: dict[Path, str], seen: set[int]) -> None:
    held = _held(value) if len(path) < _SPLIT and id(value) not in seen else None
    if held is None:
        code = getattr(value, "__code__", None)  # of functions that call each other, once in full
        found[path] = short(_words(value if code is None else _Code(code), len(path)))
        return
    seen.add(id(value))
    found[path] = type(value).__qualname__
    for name, x in held.items():
        _split(x, (*path, name), found, seen)


def _held(value: Any) -> dict[str, Any] | None:
    """What a value holds, by name; None for a single part."""
    if isinstance(value, functools.partial):
        named = {f"argument {i}": x for i, x in enumerate(value.args)} | dict(value.keywords)
        return {"function": value.func, **named}
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, types.FunctionType):
        return _held_by_function(value)
    if isinstance(value, Mapping) and all(isinstance(k, (str, int)) for k in value):
        return {repr(k): x for k, x in value.items()}
    return _attributes(value)


def _held_by_function(function: types.FunctionType) -> dict[str, Any]:
    """Code, defaults, and the values that a function closes over or reads."""
    known, code = function.__globals__, function.__code__
    # What a library's function reads is the library's, whose version is in the report.
    names = () if is_of_library(function) else sorted(_names(code))
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return {
        "code": _Code(code),
        "defaults": [function.__defaults__, function.__kwdefaults__],
        **{f"closed over: {name}": _contents(cell) for name, cell in cells},
        **{n: _read(known[n], function.__module__) for n in names if n in known},
    }


class _Code(list[Any]):
    """What a code object holds. It never changes, so its text is made once."""

    def __init__(self, code: types.CodeType) -> None:
        constants = [_Code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
        super().__init__([code.co_code, constants, code.co_names])
        self.code = code


@functools.lru_cache(maxsize=4096)
def _words_of_code(code: types.CodeType, depth: int) -> str:
    return _words(list(_Code(code)), depth)


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


def _attributes(value: Any) -> dict[str, Any] | None:
    """Attributes of a user's object, such as a hook with state; None for other values."""
    if isinstance(value, (*_Plain, enum.Enum, Tensor, nn.Module, type, types.ModuleType)):
        return None
    if isinstance(value, (Mapping, set, frozenset, list, tuple, collections.deque, *CALLS)):
        return None
    if is_array(value) or is_of_library(type(value)):
        return None
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    held = {n: getattr(value, n) for n in slots if hasattr(value, n)}
    held |= _settings_of(type(value)) | getattr(value, "__dict__", {})
    return held if held or hasattr(value, "__dict__") else None


def _words(value: Any, depth: int) -> str:
    if isinstance(value, _Plain):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__} {value.name}"
    if isinstance(value, Tensor):
        return f"tensor {of_tensors([('', value)])}"
    if isinstance(value, _Code):
        return _words_of_code(value.code, depth)
    if isinstance(value, nn.Module):
        return _words_of_module(value, depth)
    if is_array(value):
        return f"array {value.dtype} {value.shape} {short(bytes(value.tobytes()))}"
    if depth >= _DEEP:
        return type(value).__qualname__
    held = _inside(value, depth)
    if held is not None:
        return f"{type(value).__qualname__}({held})"
    return f"{type(value).__qualname__} {_token(value) if _model.get().tokens else ''}"


def _words_of_module(module: nn.Module, depth: int) -> str:
    """Digest text of a module outside the model."""
    name = type(module).__qualname__
    if id(module) in _model.get().modules:
        return name
    mine = [*module.named_parameters(), *module.named_buffers()]
    plain = [
        [
            (n, x)
            for n, x in vars(m).copy().items()
            if n not in INTERNAL and (is_plain(x) or is_array(x))
        ]
        for m in module.modules()
    ]
    return f"{name} {of_tensors(mine)} {_words(plain, depth)}"


def _inside(value: Any, depth: int) -> str | None:
    """What a container or an object holds; None for what can't be read."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_words(k, depth + 1)}: {_words(v, depth + 1)}" for k, v in value.items()
        )
    if isinstance(value, (set, frozenset)):
        return ", ".join(sorted(_words(x, depth + 1) for x in value))
    if isinstance(value, (list, tuple, collections.deque)):
        return ", ".join(_words(x, depth + 1) for x in value)
    if isinstance(value, type):
        return f"{value.__qualname__} {_words(_settings_of(value), depth + 1)}"
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
        return getattr(value, "__qualname__", value.__name__)
    held = _held(value)
    if held is None and is_of_library(type(value)):
        held = _held_by_library(value)
    return None if held is None else _words(held, depth + 1)


def _held_by_library(value: Any) -> dict[str, Any] | None:
    """What a few kinds of library objects hold: a configuration, a table, a torch distribution."""
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return dict(without_places(value.to_dict()))
    if hasattr(value, "to_numpy"):
        return {"values": value.to_numpy().tolist(), "names": list(getattr(value, "columns", ()))}
    if type(value).__module__.startswith("torch."):
        return dict(getattr(value, "__dict__", {})) or None
    return None


def without_places(value: Any) -> Any:
    """A configuration's values, without where the model came from."""
    if isinstance(value, Mapping):
        return {k: without_places(v) for k, v in value.items() if k not in PLACES}
    return value


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or a numpy-like array."""
    return isinstance(value, Tensor) or (
        hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "tobytes")
    )


def is_plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is a number, a text, or a container of such."""
    if isinstance(value, (*_Plain, enum.Enum)):
        return True
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return all(is_plain(x, depth - 1) for x in value)
    if depth and isinstance(value, dict):
        return all(is_plain(x, depth - 1) for pair in value.items() for x in pair)
    return False


def is_of_library(made: Any) -> bool:
    """Whether a class or a function belongs to a library; `torch_of_mine` does not."""
    return str(made.__module__).split(".")[0] in _LIBRARIES


def is_foreign(function: Any) -> bool:
    """Whether a function in a library's place was replaced by somebody else's."""
    root = str(getattr(function, "__module__", None) or "builtins").split(".")[0]
    return root not in (*_LIBRARIES, "hooks") and root not in sys.stdlib_module_names


def _settings_of(kind: type) -> dict[str, Any]:
    """Plain attributes of a user's class."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not is_of_library(base):
            plain = {n: v for n, v in vars(base).items() if is_plain(v)}
            found |= {n: v for n, v in plain.items() if not n.startswith("__")}
    return found


def _token(value: Any) -> str:
    """A name for an object of this process whose state can't be read."""
    try:
        return _tokens.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # neither hashable nor weakly referenced
        return f"{uuid.getnode():x} {id(value)}"


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of tensors with their names: dtype, shape and every bit."""
    from hooks.model.hashing import hash_tensor  # compiled code: the first call loads it

    rows = []
    for name, x in named:
        bits = None if x.device.type == "meta" else hash_tensor(x)
        rows.append((f"{name} {x.dtype} {tuple(x.shape)}", bits))
    # Only now is an accelerator waited for.
    return short("\n".join(f"{words} {_number(bits)}" for words, bits in rows))


def _number(bits: int | Tensor | None) -> str:
    if bits is None:
        return "meta"
    return str((int(bits) if isinstance(bits, Tensor) else bits) & ((1 << 64) - 1))
