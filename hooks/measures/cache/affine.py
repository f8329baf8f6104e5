"""Formats of integers between a group's minimum and maximum: quanto, HQQ and KIVI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import brief, check_integers
from hooks.measures.cache.formats import (
    CacheRole,
    Everything,
    Store,
    Vectors,
    check_fits,
    known,
    scale_bits,
)


def _check_in(name: str, value: int, some: tuple[int, ...], why: str = "") -> None:
    if value not in some or isinstance(value, bool):
        raise ValueError(f"{name}: wanted one of {list(some)}{why}; got {brief(value)}")


def between(groups: Float[Tensor, "*groups n"], bits: int) -> Float[Tensor, "*groups n"]:
    """q = round((x - low) / s) within 0..2^bits - 1, s = (high - low) / (2^bits - 1); s q + low.

    In the dtype of x, over the last axis. Where a group is constant, it comes back as it is.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    top = 2**bits - 1
    scale = (high - low) / top
    q = torch.round((groups - low) / scale).nan_to_num(0.0).clamp(0, top)
    back: Tensor = scale * q + low
    return back


class _Window:
    """transformers' ``QuantizedLayer``: all but the latest tokens quantised, anew at each flush.

    The first update is quantised whole; it reads itself unquantised. Later tokens wait in full
    precision until there are ``window`` of them, then everything read so far is quantised again.
    """

    def __init__(self, quantise: Callable[[Tensor], Tensor], window: int) -> None:
        self._quantise, self._window = quantise, window
        self._old: Tensor | None = None
        self._new: Tensor | None = None

    def append(self, x: Vectors) -> Everything:
        """See :class:`Store`."""
        if self._old is None:
            self._old = self._quantise(x.contiguous())
            return x
        waiting = x if self._new is None else torch.cat([self._new, x], dim=2)
        everything = torch.cat([self._old, waiting], dim=2)
        if waiting.shape[2] >= self._window:
            self._old, self._new = self._quantise(everything.contiguous()), None
        else:
            self._new = waiting
        return everything

    def read(self) -> Everything:
        """See :class:`Store`."""
        assert self._old is not None
        return self._old if self._new is None else torch.cat([self._old, self._new], dim=2)


# -- quanto -----------------------------------------------------------------------------------


@known("quanto-int4")
@known("quanto-int2", nbits=2)
@dataclass(frozen=True)
class Quanto:
    """transformers 5.23's quantised cache with optimum-quanto 0.2.7: int4 or int2 in groups.

    A group of ``group`` numbers has a scale and a minimum in the model's dtype. Axis 0: consecutive
    numbers of a token's head, or of several tokens where the group is longer. Axis -1: a channel's
    numbers in consecutive rows of the flattened [head, token] matrix, so that a group runs from one
    head into the next unless it divides the length. Source: ``QuantoQuantizedLayer``,
    ``optimum.quanto.quantize_weight`` with ``MaxOptimizer``.

    Args:
        nbits: 4 or 2: transformers refuses others for this backend.
        group: numbers of a group.
        axis_key, axis_value: 0 or -1.
        window: latest tokens in full precision while decoding.
    """

    nbits: int = 4
    group: int = 64
    axis_key: int = 0
    axis_value: int = 0
    window: int = 128

    def __post_init__(self) -> None:
        _check_in("nbits", self.nbits, (2, 4), ", what transformers' quanto cache has")
        _check_in("axis_key", self.axis_key, (0, -1))
        _check_in("axis_value", self.axis_value, (0, -1))
        check_integers(group=(self.group, 2), window=(self.window, 1))

    @property
    def kind(self) -> str:
        """``quanto-int4`` or ``quanto-int2``."""
        return f"quanto-int{self.nbits}"

    def bits(self, role: CacheRole, d_head: int) -> float:
        """``nbits`` and two numbers of 16 bits per group."""
        return self.nbits + scale_bits(self.group)

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Numbers (axis -1: rows) that the group does not divide."""
        n = heads * length * (d_head if self._axis(role) == 0 else 1)
        if n % self.group == 0:
            return ""
        of = "heads x tokens x channels" if self._axis(role) == 0 else "heads x tokens"
        return f"wanted a multiple of {self.group}, the group, as {of}; got {n}"

    def _axis(self, role: CacheRole) -> int:
        return self.axis_key if role == "k" else self.axis_value

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        axis = self._axis(role)

        def quantise(x: Tensor) -> Tensor:
            check_fits(self, role, x)
            return _quanto(x, self.nbits, axis, self.group)

        return _Window(quantise, self.window)


def _quanto(x: Tensor, bits: int, axis: int, group: int) -> Tensor:
    if axis == 0:
        groups = x.reshape(-1, group)
        # A single group has an axis of length 1, and is then scaled number by number: exactly.
        return x if len(groups) == 1 else between(groups, bits).reshape(x.shape)
    groups = x.reshape(-1, group, x.shape[-1]).transpose(1, 2)
    return between(groups, bits).transpose(1, 2).reshape(x.shape)


# -- HQQ --------------------------------------------------------------------------------------


@known("hqq-int4")
@known("hqq-int8", nbits=8)
@known("hqq-int2", nbits=2)
@dataclass(frozen=True)
class HQQ:
    """transformers 5.23's quantised cache with hqq 0.2.8.post1: zero points fitted to the data.

    Axis 0, the default: number i of a group lies i N / group after the first one in the flattened
    [head, token, channel] store of N numbers, so that a group mixes heads and tokens. Axis 1:
    consecutive numbers. The fit is half-quadratic splitting with an l_p norm of p = 0.7 (Badri and
    Shaji 2023). Source: ``HQQQuantizedLayer``, ``hqq.core.quantize.Quantizer``.

    Args:
        nbits: 8, 4 or 2.
        group: numbers of a group.
        axis_key, axis_value: 0 or 1.
        window: latest tokens in full precision while decoding.
    """

    nbits: int = 4
    group: int = 64
    axis_key: int = 0
    axis_value: int = 0
    window: int = 128

    def __post_init__(self) -> None:
        _check_in("nbits", self.nbits, (2, 4, 8))
        _check_in("axis_key", self.axis_key, (0, 1))
        _check_in("axis_value", self.axis_value, (0, 1))
        check_integers(group=(self.group, 2), window=(self.window, 1))

    @property
    def kind(self) -> str:
        """``hqq-int4``, ``hqq-int8`` or ``hqq-int2``."""
        return f"hqq-int{self.nbits}"

    def bits(self, role: CacheRole, d_head: int) -> float:
        """``nbits`` and two numbers of 16 bits per group."""
        return self.nbits + scale_bits(self.group)

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Numbers that the group does not divide; those whose bytes do not fill up."""
        n = heads * length * d_head
        if n % self.group:
            what = "the group, as heads x tokens x channels"
            return f"wanted a multiple of {self.group}, {what}; got {n}"
        axis = self.axis_key if role == "k" else self.axis_value
        rows, packed = (self.group if axis == 0 else n // self.group), 8 // self.nbits
        if rows % packed:
            return f"wanted a multiple of {packed} groups, to fill a byte; got {rows}"
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        axis = self.axis_key if role == "k" else self.axis_value

        def quantise(x: Tensor) -> Tensor:
            check_fits(self, role, x)
            return _hqq(x, self.nbits, axis, self.group)

        return _Window(quantise, self.window)


def _hqq(x: Tensor, bits: int, axis: int, group: int) -> Tensor:
    w = x.float().reshape((group, -1) if axis == 0 else (-1, group))
    low, high = w.amin(axis, keepdim=True), w.amax(axis, keepdim=True)
    top = round(2**bits - 1)
    span = high - low
    scale = torch.where(span.abs() <= 1e-4, torch.ones_like(span), top / span).clamp(max=2e4)
    zero = _fitted_zero(w, scale, -low * scale, top, axis)
    q = torch.round(w * scale + zero).clamp(0, top)
    zero, inverse = zero.to(x.dtype), (1.0 / scale).to(x.dtype)
    return ((q.to(x.dtype) - zero) * inverse).reshape(x.shape)


def _fitted_zero(w: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """At most 20 half-quadratic steps; they end when the mean error of all groups stops falling."""
    beta, p, best = 10.0, 0.7, float("inf")
    for _ in range(20):
        q = torch.round(w * scale + zero).clamp(0, top)
        left = w - (q - zero) / scale
        size = left.abs()
        shrunk = (size - (1.0 / beta) * size.pow(p - 1)).clamp_min(0.0) * torch.sign(left)
        zero = torch.mean(q - (w - shrunk) * scale, dim=axis, keepdim=True)
        error = float(size.mean())
        if not error < best:
            break
        best = error
    return zero


# -- KIVI -------------------------------------------------------------------------------------


@known("kivi-int4")
@known("kivi-int2", nbits=2)
@dataclass(frozen=True)
class KIVI:
    """KIVI (Liu et al. 2024, arXiv 2402.02750): keys per channel, values per token.

    Keys are quantised ``window`` tokens at a time, each channel in groups of ``group`` tokens; a
    prompt's last (length mod window) keys and every value of the last ``window`` tokens stay in
    full precision. A prompt reads itself unquantised. Source: ``models/llama_kivi.py`` of the
    authors' code.

    Args:
        nbits: 4 or 2.
        group: tokens (keys), channels (values) of a group.
        window: the residual length, a multiple of the group.
    """

    nbits: int = 4
    group: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        _check_in("nbits", self.nbits, (2, 4))
        check_integers(group=(self.group, 2), window=(self.window, 1))
        if self.window % self.group:
            wanted = f"a multiple of the group {self.group}"
            raise ValueError(f"window: wanted {wanted}; got {self.window}")

    @property
    def kind(self) -> str:
        """``kivi-int4`` or ``kivi-int2``."""
        return f"kivi-int{self.nbits}"

    def bits(self, role: CacheRole, d_head: int) -> float:
        """``nbits`` and two numbers of 16 bits per group; the window is not counted."""
        return self.nbits + scale_bits(self.group)

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Channels that the group does not divide (values)."""
        if role == "v" and d_head % self.group:
            return f"wanted a multiple of {self.group}, the group, as channels; got {d_head}"
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        return _KIVIStore(self, role)


class _KIVIStore:
    def __init__(self, form: KIVI, role: CacheRole) -> None:
        self._form, self._role = form, role
        self._old: Tensor | None = None
        self._new: Tensor | None = None

    def append(self, x: Vectors) -> Everything:
        """See :class:`Store`."""
        whole = x if self._new is None else torch.cat([self.read(), x], dim=2)
        self._new = x if self._new is None else torch.cat([self._new, x], dim=2)
        waiting, window = self._new.shape[2], self._form.window
        ready = waiting - waiting % window if self._role == "k" else max(waiting - window, 0)
        if ready:
            done = self._quantise(self._new[:, :, :ready])
            self._old = done if self._old is None else torch.cat([self._old, done], dim=2)
            self._new = self._new[:, :, ready:]
        return whole

    def read(self) -> Everything:
        """See :class:`Store`."""
        assert self._new is not None
        return self._new if self._old is None else torch.cat([self._old, self._new], dim=2)

    def _quantise(self, x: Vectors) -> Vectors:
        form = self._form
        if self._role == "v":
            return between(x.unflatten(-1, (-1, form.group)), form.nbits).flatten(-2)
        groups = x.unflatten(2, (-1, form.group)).transpose(-1, -2)
        return between(groups, form.nbits).transpose(-1, -2).flatten(2, 3)
