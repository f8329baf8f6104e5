"""Compiled: one number for a tensor's bits, the same on every device."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from hooks.kernels import Ints, compiled

_BLOCK = 4096
_MASK = (1 << 64) - 1
_AT_ONCE = 1 << 24  # words widened at a time on an accelerator


@compiled
def _mixed(i: int) -> int:
    """An odd number from i, unrelated to those of i's neighbours."""
    x = np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    return x | np.uint64(1)  # type: ignore[return-value]  # numba's integers


@compiled
def _hash_words(words: Ints, table: np.ndarray) -> int:
    """sum_b m(b + B) sum_i w_bi m(i), in 64 bits, over blocks of B words."""
    total, n = np.uint64(0), len(words)
    for b in range((n + _BLOCK - 1) // _BLOCK):
        inner = np.uint64(0)
        part = words[b * _BLOCK : min(n, (b + 1) * _BLOCK)]
        for i in range(len(part)):
            inner += np.uint64(np.int64(part[i])) * table[i]
        total += inner * np.uint64(_mixed(b + _BLOCK))
    return total  # type: ignore[return-value]


@cache
def _table() -> np.ndarray:
    return np.array([_mixed(i) for i in range(_BLOCK)], np.uint64)


def hash_tensor(x: Tensor) -> int | Tensor:
    """A number of 64 bits; on an accelerator it stays a tensor there, so that nothing waits for it.

    A change of one word always shows: its multiplier is odd. Any other change is missed about once
    in 2^60.
    """
    x = x.detach().contiguous().reshape(-1)
    if x.is_complex() or x.dtype == torch.bool:
        x = x.view(torch.uint8)
    size = x.element_size()
    words = x.view(torch.int32 if size >= 4 else torch.int16 if size == 2 else torch.int8)
    if x.device.type == "cpu":
        return int(_hash_words(words.numpy(), _table())) & _MASK
    return hash_elsewhere(words)


def hash_elsewhere(words: Tensor) -> Tensor:
    """:func:`hash_tensor` in plain torch."""
    table = torch.from_numpy(_table().view(np.int64)).to(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for at in range(0, len(words), _AT_ONCE):
        part = words[at : at + _AT_ONCE].to(torch.int64)
        part = torch.nn.functional.pad(part, (0, -len(part) % _BLOCK)).view(-1, _BLOCK)
        first = at // _BLOCK + _BLOCK
        of_block = np.array([_mixed(b) for b in range(first, first + len(part))], np.uint64)
        inner = (part * table).sum(1)
        total += (inner * torch.from_numpy(of_block.view(np.int64)).to(words.device)).sum()
    return total
