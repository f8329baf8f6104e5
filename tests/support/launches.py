"""Launches of every Triton kernel, for what it computes on any rows; nothing is read from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hooks.kernels import Rule
from hooks.kernels.engines import Operands, Slots, operands
from hooks.kernels.engines.triton_pass import FusedPass


def rule(*, on_q: bool = True, n_heads: int = 4) -> Rule:
    """Uniform noise at three sigmas; rows are sparse from 0.95 on."""
    return Rule(
        law=0, sigmas=np.array([0.1, 0.3, 0.5]), on_q=on_q, on_k=True, exact=True, sparse=0.95,
        room=1 / 0.95 - 1, cutoff=4.0, n_heads=n_heads, first_matrix=0, first_query=0, eps=1e-7,
        soft_cap=0.0, sink=np.full(n_heads, -np.inf), kv_head=np.arange(n_heads),
        first=np.zeros((1, 4096), np.int8), biased=False,
    )  # fmt: skip


def pass_of_kernels(**options: int) -> FusedPass:
    """A pass that reads no size from its tensors."""
    how = {"keep": 1 << 10, "keep_rows": 2} | options
    return FusedPass(Slots(True), cutoff=4.0, strict=True, **how)


def launch_all() -> None:
    """Scores that exist, with a pattern and without; fused attention of every dtype and mask."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = torch.randn(4, 32, 128).to(dtype)
        for pattern in (None, torch.softmax(scores, -1)):
            for on_q in (True, False):
                pass_of_kernels().add(0, rule(on_q=on_q), scores, pattern, None, [0])
        for d, mask in (
            (64, None),
            (128, None),
            (80, _visible()),
            (128, _visible()),
            (64, _added(dtype)),
            (256, None),
        ):
            pass_of_kernels().add_fused(0, rule(), _operands(d, dtype, mask), [0], biased=False)


def _operands(d: int, dtype: torch.dtype, mask: Tensor | None) -> Operands:
    q, k = torch.randn(1, 4, 256, d).to(dtype), torch.randn(1, 2, 256, d).to(dtype)
    return operands(q, k, mask, causal=mask is None, scale=None)


def _visible() -> Tensor:
    return torch.ones(256, 256, dtype=torch.bool).tril()[None, None]


def _added(dtype: torch.dtype) -> Tensor:
    hidden = ~_visible()
    return torch.zeros(1, 1, 256, 256, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
