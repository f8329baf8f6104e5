"""Vectors like keys, and a store of ours beside a layer of transformers' cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import CacheFormat

WIDTHS = (64, 80, 96, 128)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random ones, some channels ten times as large: what keys are like."""
    generator = torch.Generator().manual_seed(seed)
    large = 1 + 10 * (torch.rand(shape[-1], generator=generator) > 0.9)
    return (torch.randn(shape, generator=generator) * large).to(dtype)


def against_transformers(
    layer: Callable[[], Any], form: CacheFormat, dtype: torch.dtype, *, refuses: str = ""
) -> int:
    """A prompt and twenty steps, to the bit, over widths, heads and lengths; how many passes.

    ``refuses``: what their refusal of a prompt says, where ours refuses it; "": it has none.
    """
    passes = 0
    for width, heads, length in [(w, h, n) for w in WIDTHS for h in (3, 4) for n in (64, 40, 33)]:
        theirs, k, v = layer(), form.store("k"), form.store("v")
        if form.refusal("k", heads, length, width):
            if refuses:
                with pytest.raises(ValueError, match=refuses):
                    theirs.update(*(vectors(1, heads, length, width, dtype=dtype),) * 2)
            continue
        for step in range(21):
            n = 1 if step else length
            new = [vectors(1, heads, n, width, seed=2 * step + i, dtype=dtype) for i in (0, 1)]
            try:
                read = theirs.update(*new)
            except (ValueError, RuntimeError):  # a flush at a length that does not fit
                with pytest.raises(ValueError, match="wanted a multiple of"):
                    k.append(new[0])
                break
            for mine, other in zip((k.append(new[0]), v.append(new[1])), read, strict=True):
                assert torch.equal(mine, other)
            passes += 1
    return passes
