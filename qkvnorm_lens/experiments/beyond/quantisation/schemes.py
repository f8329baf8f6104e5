"""Formats in which serving engines keep keys and values, as what comes out of the cache again.

Every function takes vectors ``[batch, pos, kv_head, d_head]`` and gives the ones that a cache of
that format would return, in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

GROUP: Final = 32
Vectors = Float[Tensor, "batch pos head d_head"]
Quantise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Scheme:
    """A cache format.

    Attributes:
        name: as it is called in tables.
        what: exactly what is done.
        on_k, on_v: what comes out of the cache, for keys and for values; the second argument is the
            largest magnitude in the layer's keys (or values) over the calibration data, which a
            static scale needs.
        channels: of a group; the engines refuse heads that are no multiple of it.
    """

    name: str
    what: str
    on_k: Quantise
    on_v: Quantise
    channels: int = 1

    def fits(self, widths: Iterable[int]) -> bool:
        """Whether the format exists for heads of so many channels."""
        return all(width % self.channels == 0 for width in widths)


def symmetric(x: Vectors, largest: float = math.nan, *, top: int) -> Vectors:
    """q = round(x / s), s = max |x| / top over each vector; back: s q.

    One scale per token and head, in the tensor's dtype.
    """
    scale = x.abs().amax(-1, keepdim=True) / top
    return _times(x, scale, top)


def float8(x: Vectors, largest: float, *, dtype: torch.dtype) -> Vectors:
    """x / s as an 8-bit float, s = largest / (the format's largest); back: s times it.

    One static scale per layer, calibrated on the data that is measured: nothing overflows.
    """
    top = torch.finfo(dtype).max
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(f"largest: wanted a magnitude above 0; got {largest}")
    scale = largest / top
    back: Tensor = (x / scale).clamp(-top, top).to(dtype).to(x.dtype) * scale
    return back


def q4_0(x: Vectors, largest: float = math.nan) -> Vectors:
    """llama.cpp's ``q4_0``: q = min(15, floor(x / s + 8.5)), s = (the group's extreme) / -8.

    Groups of 32 along d_head; s keeps the sign of the group's extreme, and is stored as float16;
    back: s (q - 8). Source: ``quantize_row_q4_0_ref`` in llama.cpp's ``ggml-quants.c``.

    Raises:
        ValueError: 32 does not divide d_head, which gguf refuses too.
    """
    groups = _in_groups(x, "q4_0")
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    q = (groups * inverse + 8.5).floor().clamp(0, 15)
    back: Tensor = ((q - 8) * scale.half().to(x.dtype)).flatten(-2)
    return back


def between(x: Tensor, dim: int, *, top: int) -> Tensor:
    """q = round((x - min) / s), s = (max - min) / top along an axis; back: s q + min."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (high - low) / top
    return _times(x - low, scale, top) + low


def per_channel(x: Vectors, largest: float = math.nan, *, top: int) -> Vectors:
    """:func:`between` for each channel over groups of 32 tokens (the last one may be shorter)."""
    return torch.cat([between(part, 1, top=top) for part in x.split(GROUP, dim=1)], dim=1)


def per_token(x: Vectors, largest: float = math.nan, *, top: int) -> Vectors:
    """:func:`between` for each token over groups of 32 channels.

    Raises:
        ValueError: 32 does not divide d_head.
    """
    groups = _in_groups(x, "KIVI's values")
    return between(groups, -1, top=top).flatten(-2)


def _in_groups(x: Vectors, what: str) -> Float[Tensor, "batch pos head group 32"]:
    if x.shape[-1] % GROUP:
        raise ValueError(
            f"d_head: wanted a multiple of {GROUP}, the channels of a group of {what}; got "
            f"{x.shape[-1]}"
        )
    apart: Tensor = x.unflatten(-1, (-1, GROUP))
    return apart


def _times(x: Tensor, scale: Tensor, top: int) -> Tensor:
    """The nearest multiple of the scale, at most ``top`` of them; zero where the scale is."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (x * inverse).round().clamp(-top, top) * scale


def _same(name: str, what: str, quantise: Quantise, channels: int = 1) -> Scheme:
    return Scheme(name, what, quantise, quantise, channels)


SCHEMES: Final = (
    _same(
        "int8",
        "8-bit integers, symmetric, one scale (max |x| / 127) per token and head",
        partial(symmetric, top=127),
    ),
    _same(
        "fp8 e4m3",
        "8-bit floats of 4 exponent bits (largest 448), one scale per layer for keys and one for "
        "values, calibrated, as in vLLM and TensorRT-LLM",
        partial(float8, dtype=torch.float8_e4m3fn),
    ),
    _same(
        "fp8 e5m2",
        "the same with 5 exponent bits (largest 57344)",
        partial(float8, dtype=torch.float8_e5m2),
    ),
    Scheme(
        "int4 KIVI",
        "4-bit integers between minimum and maximum, keys per channel in groups of 32 tokens, "
        "values per token in groups of 32 channels, as KIVI; without its window of recent tokens "
        "in full precision",
        partial(per_channel, top=15),
        partial(per_token, top=15),
        GROUP,
    ),
    _same("int4 q4_0", "llama.cpp's q4_0: 4-bit integers in groups of 32 channels", q4_0, GROUP),
    _same(
        "int4",
        "4-bit integers, symmetric, one scale (max |x| / 7) per token and head",
        partial(symmetric, top=7),
    ),
)
