"""What a cache format is, and the simplest ones: full precision, and torch's 8-bit floats.

A format says what a key/value cache gives back for what was written, to the bit. Vectors are
``[batch, head, pos, d_head]``, as transformers' caches hold them, keys behind the rotary embedding.
A store is one layer's keys or values: `Store.append` takes what a pass writes and gives what that
pass attends to, `Store.read` what the next one will find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Protocol, get_type_hints, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import brief, check_choice, check_integers, near, read_list

Vectors = Float[Tensor, "batch head pos d_head"]
Everything = Float[Tensor, "batch head all_pos d_head"]
CacheRole = Literal["k", "v"]
ROLES: Final[tuple[CacheRole, ...]] = ("k", "v")
_SCALE_BITS = 16  # of a scale in the dtype of a model in half precision


@runtime_checkable
class Store(Protocol):
    """One layer's keys, or its values, as a cache holds them."""

    def append(self, x: Vectors) -> Everything:
        """Write more tokens; all tokens as the pass that writes them reads them."""

    def read(self) -> Everything:
        """All tokens as the next pass reads them."""


@runtime_checkable
class CacheFormat(Protocol):
    """A format of a cache: a frozen dataclass with these methods.

    One whose first write matters has ``pieces`` too: tokens of each write in a measurement, what is
    left over being one more.
    """

    @property
    def kind(self) -> str:
        """Its name in a text, ``"q4_0"``."""

    def bits(self, role: CacheRole, d_head: int) -> float:
        """Bits per stored number, scales included, in a model in half precision."""

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Why it can't store a prompt of so many heads, tokens and channels; "" if it can."""

    def store(self, role: CacheRole) -> Store:
        """An empty store."""


# -- names ------------------------------------------------------------------------------------

_KINDS: dict[str, Callable[..., Any]] = {}


def known(kind: str, **fields: Any) -> Callable[[type], type]:
    """Register a format's class under a kind, with these fields."""

    def register(cls: type) -> type:
        _KINDS[kind] = lambda **others: cls(**{**fields, **others})
        return cls

    return register


def text_of(form: CacheFormat) -> str:
    """``"quanto-int4 group=32"``: the kind, and each field that is not the kind's own."""
    plain = _KINDS[form.kind]()
    names = (f.name for f in dataclasses.fields(form))  # type: ignore[arg-type]
    own = [n for n in names if getattr(form, n) != getattr(plain, n)]
    return " ".join([form.kind, *(f"{n}={getattr(form, n)}" for n in own)])


def read_format(given: Any) -> CacheFormat:
    """A format from its text, or one as it is.

    Raises:
        TypeError: neither.
        ValueError: an unknown kind, or a field that it does not have.
    """
    if isinstance(given, CacheFormat) and given.kind in _KINDS:
        return given
    if not isinstance(given, str):
        raise TypeError(f"formats: wanted formats, or their names; got {brief(given)}")
    kind, *fields = given.split() or [""]
    if kind not in _KINDS:
        wanted = f"one of {sorted(_KINDS)}"
        raise ValueError(f"formats: wanted {wanted}; got {brief(kind)}{near(kind, _KINDS)}")
    hints = get_type_hints(type(_KINDS[kind]()))
    values = {}
    for field in fields:
        name, _, value = field.partition("=")
        if name not in hints or name == "kind":
            raise ValueError(f"formats: wanted a field of {kind}; got {brief(field)}")
        values[name] = _value(hints[name], value)
    form: CacheFormat = _KINDS[kind](**values)
    return form


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        return check_choice("formats", text, ("True", "False")) == "True"
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ValueError(f"formats: wanted a number; got {brief(text)}") from None


def read_formats(given: Any) -> tuple[CacheFormat, ...]:
    """Several formats, each once.

    Raises:
        TypeError, ValueError: as :func:`read_format`; none, or one twice.
    """
    some = (
        [given] if isinstance(given, str | CacheFormat) else read_list("formats", given, "a list")
    )
    found = tuple(map(read_format, some))
    if not found or len(set(map(text_of, found))) < len(found):
        raise ValueError(f"formats: wanted one or more, each once; got {brief(given)}")
    return found


def kinds() -> tuple[str, ...]:
    """Every kind of format, in alphabetical order."""
    return tuple(sorted(_KINDS))


def stored(form: CacheFormat, role: CacheRole, x: Vectors) -> Vectors:
    """What a cache gives back for a prompt, each row of the batch in a cache of its own.

    Args:
        form: the format.
        role: keys or values.
        x: the prompt's vectors.

    Raises:
        ValueError: the format refuses such a prompt.
    """
    check_fits(form, role, x)
    rows = []
    for row in x.split(1):
        store = form.store(role)
        for part in _cut(row, getattr(form, "pieces", ())):
            store.append(part)
        rows.append(store.read())
    return torch.cat(rows)


def check_fits(form: CacheFormat, role: CacheRole, x: Vectors) -> None:
    """Refuse vectors that a format can't store.

    Raises:
        ValueError: names the format, and why.
    """
    _, heads, length, d_head = x.shape
    why = form.refusal(role, heads, length, d_head)
    if why:
        raise ValueError(f"formats: {text_of(form)}: {why}")


def _cut(x: Tensor, pieces: Iterable[int]) -> Iterator[Tensor]:
    at = 0
    for n in pieces:
        if at < x.shape[2]:
            yield x[:, :, at : at + n]
        at += n
    if at < x.shape[2]:
        yield x[:, :, at:]


# -- stores -----------------------------------------------------------------------------------


class Appended:
    """Tokens stored one by one, for good; the pass that writes them reads them so too."""

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        self._quantise = quantise
        self._all: Tensor | None = None

    def append(self, x: Vectors) -> Everything:
        """See :class:`Store`."""
        back = self._quantise(x)
        self._all = back if self._all is None else torch.cat([self._all, back], dim=2)
        return self._all

    def read(self) -> Everything:
        """See :class:`Store`."""
        assert self._all is not None
        return self._all


# -- full precision and 8-bit floats ----------------------------------------------------------


@known("full")
@dataclass(frozen=True)
class Full:
    """Keys and values as the model makes them; 16 bits in a model in half precision."""

    kind: ClassVar[str] = "full"

    def bits(self, role: CacheRole, d_head: int) -> float:
        """16."""
        return 16.0

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Nothing is refused."""
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        return Appended(lambda x: x)


_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@known("fp8-e4m3")
@known("fp8-e5m2", dtype="e5m2")
@dataclass(frozen=True)
class Float8:
    """An 8-bit float of torch: x' = scale * float8(x / scale), in float32.

    With ``scale=1.0`` this is vLLM's fp8 cache without calibration. torch 2.13 turns what is beyond
    the range into the largest float8 (e4m3) or infinity (e5m2).

    Args:
        dtype: ``"e4m3"`` (largest 448) or ``"e5m2"`` (largest 57344).
        scale: of all keys and values.
    """

    dtype: str = "e4m3"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, _FLOATS)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale: wanted a number above 0; got {brief(self.scale)}")

    @property
    def kind(self) -> str:
        """``fp8-e4m3`` or ``fp8-e5m2``."""
        return f"fp8-{self.dtype}"

    def bits(self, role: CacheRole, d_head: int) -> float:
        """8: the scale is one for all."""
        return 8.0

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Nothing is refused."""
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        return Appended(self._through)

    def _through(self, x: Vectors) -> Vectors:
        return _float8(
            x, torch.tensor(self.scale, dtype=torch.float32, device=x.device), self.dtype
        )


def _float8(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    return ((x.float() / scale).to(_FLOATS[dtype]).float() * scale).to(x.dtype)


@known("transformers-fp8")
@dataclass(frozen=True)
class TransformersFloat8:
    """transformers 5.23's ``Fp8QuantizedLayer``: e4m3 with the first update's scale, kept.

    scale = max |x| / 448 over the first update, its batch and heads together. The first update
    reads its own keys and values unquantised. Source: ``cache_utils.Fp8QuantizedLayer``.

    Args:
        first: tokens of the first update in a measurement; 0: the whole prompt. A server that
            prefills in chunks, or a loop that feeds one token at a time, has few.
    """

    kind: ClassVar[str] = "transformers-fp8"
    first: int = 0

    def __post_init__(self) -> None:
        check_integers(first=(self.first, 0))

    def bits(self, role: CacheRole, d_head: int) -> float:
        """8: the scale is one for the layer."""
        return 8.0

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Nothing is refused."""
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        return _FirstScale()

    @property
    def pieces(self) -> tuple[int, ...]:
        """The first update, where it is not the whole prompt."""
        return (self.first,) if self.first else ()


class _FirstScale:
    def __init__(self) -> None:
        self._scale: Tensor | None = None
        self._all: Tensor | None = None

    def append(self, x: Vectors) -> Everything:
        """See :class:`Store`."""
        if self._scale is None or self._all is None:
            largest = x.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
            self._scale = largest.clamp(min=torch.finfo(torch.float32).tiny)
            self._all = _float8(x, self._scale, "e4m3")
            return x
        self._all = torch.cat([self._all, _float8(x, self._scale, "e4m3")], dim=2)
        return self._all

    def read(self) -> Everything:
        """See :class:`Store`."""
        assert self._all is not None
        return self._all


def scale_bits(per: int, numbers: int = 2) -> float:
    """Bits that so many numbers in half precision add to each of ``per`` stored ones."""
    return numbers * _SCALE_BITS / per
