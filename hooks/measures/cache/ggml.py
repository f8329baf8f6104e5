"""Formats of llama.cpp: blocks of 32 channels with a scale in half precision.

A quantised llama.cpp cache does not hold the block format of a key: it holds that of the key with
its rotary pairs in another order (the converter reorders the projections of Llama and its kin),
multiplied by a Hadamard matrix. Source: ggml's ``quantize_row_*_ref``, as in gguf 0.19.0; rotation:
llama.cpp pull request 21038, in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.measures.cache.formats import Appended, CacheRole, Store, Vectors, known

BLOCK = 32
_HALF_RANGE = {"q4_0": 8, "q5_0": 16}
_BITS = {"q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
_LEAST_ROTATION = 64


@known("q8_0")
@known("q5_0", block="q5_0")
@known("q4_0", block="q4_0")
@dataclass(frozen=True)
class GGML:
    """llama.cpp's q8_0, q5_0 or q4_0, rotated and reordered as its cache has them.

    q8_0: q = round(x / s), s = max |x| / 127. q4_0 (and q5_0 with 16 for 8): q = min(15, floor(x /
    s + 8.5)), s = (the block's number of largest magnitude) / -8; back: s (q - 8). s is stored in
    half precision. The pass that writes keys reads them quantised.

    Args:
        block: ``"q8_0"``, ``"q5_0"`` or ``"q4_0"``.
        rotated: multiply heads by a Hadamard matrix first, as llama.cpp does where the head's size
            is a multiple of 64: keys by the largest that divides the size, values by that of 64.
        paired: put a key's rotary pairs side by side, as the converter does for Llama, Mistral,
            SmolLM and others whose rotary embedding it stores as ``normal``; False for Qwen, Gemma,
            Phi and others of ``neox``, and for models without one (GPT-2).
    """

    block: str = "q8_0"
    rotated: bool = True
    paired: bool = True

    def __post_init__(self) -> None:
        if self.block not in _BITS:
            raise ValueError(f"block: wanted one of {list(_BITS)}; got {self.block!r:.80}")

    @property
    def kind(self) -> str:
        """The block's name."""
        return self.block

    def bits(self, role: CacheRole, d_head: int) -> float:
        """8.5, 5.5 or 4.5."""
        return _BITS[self.block]

    def refusal(self, role: CacheRole, heads: int, length: int, d_head: int) -> str:
        """Channels that are no multiple of 32."""
        if d_head % BLOCK:
            return f"wanted a multiple of {BLOCK}, the block, as channels; got {d_head}"
        return ""

    def store(self, role: CacheRole) -> Store:
        """See :class:`CacheFormat`."""
        return Appended(lambda x: self._through(x, role))

    def _through(self, x: Vectors, role: CacheRole) -> Vectors:
        y = x.float()
        if role == "k" and self.paired:
            y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        size = rotation(role, x.shape[-1]) if self.rotated else 1
        turn = hadamard(size).to(y.device)
        y = (y.unflatten(-1, (-1, size)) @ turn).flatten(-2)
        y = (blocks(y, self.block).unflatten(-1, (-1, size)) @ turn).flatten(-2)
        if role == "k" and self.paired:
            y = y.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        back: Tensor = y.to(x.dtype)
        return back


def rotation(role: CacheRole, d_head: int) -> int:
    """Size of the Hadamard matrix; 1: none."""
    if d_head % _LEAST_ROTATION:
        return 1
    return d_head & -d_head if role == "k" else _LEAST_ROTATION


@lru_cache
def hadamard(n: int) -> Float[Tensor, "n n"]:
    """Sylvester's matrix of a power of two, over its root: its own inverse."""
    out = torch.ones(1, 1)
    while len(out) < n:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    own: Tensor = out / n**0.5
    return own


def blocks(x: Float[Tensor, "*rows d"], kind: str) -> Float[Tensor, "*rows d"]:
    """What ggml gives back for blocks of 32 numbers, float32."""
    parts = x.unflatten(-1, (-1, BLOCK))
    if kind == "q8_0":
        scale = parts.abs().amax(-1, keepdim=True) / 127
        y = parts * _inverse(scale)
        whole = y.abs().floor()
        q = y.sign() * (whole + (2 * (y.abs() - whole)).floor())  # halves away from zero
    else:
        half = _HALF_RANGE[kind]
        scale = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)) / -half
        q = (parts * _inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1) - half
    back: Tensor = (q * scale.half().float()).flatten(-2)
    return back


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)
