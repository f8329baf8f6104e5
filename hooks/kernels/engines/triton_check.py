"""Whether the kernels give on a device what torch gives there: asked once, before they are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hooks.kernels import UNIFORM, Rule
from hooks.kernels.engines.attention import operands
from hooks.kernels.engines.listing import Listed
from hooks.kernels.engines.slots import Slots
from hooks.kernels.engines.triton_pass import FusedPass
from hooks.kernels.engines.vectorised import Brought, TorchPass

_NEAR = 1e-6  # of a rate, a row
_HEADS = 4


@cache
def agrees(device: torch.device, n_key: int = 640, keep: int = 500) -> bool:
    """Whether sums over rows made for it are the same: scores that exist, and a fused attention.

    Equal counts, equal tables, and rates that are 1e-6 apart or less in each row.
    """
    made = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(_HEADS, 6, n_key, generator=made)
    scores[:, :, 0] = scores.amax(2) + 12 * torch.rand(_HEADS, 6, generator=made)
    scores[0, 0] = 8.0  # more equal ones than a list holds
    scores[0, 0, 0] = 24.0
    scores[1, :, n_key // 2 :] = -math.inf
    q, k = (torch.randn(1, h, n_key, 64, generator=made) for h in (_HEADS, 2))
    q, k = (4 * q).to(device, torch.bfloat16), k.to(device, torch.bfloat16)
    rows = torch.arange(0, n_key, max(1, n_key // 80), device=device)
    visible = rows[:, None] >= torch.arange(n_key, device=device)
    of = operands(q[:, :, rows], k, visible[None, None], causal=False, scale=None)
    made_of = (of.query.float() @ k.repeat_interleave(2, 1).float().transpose(2, 3)) * of.scale
    made_of = made_of.masked_fill(~visible, -math.inf)[0]
    rule = _rule(n_key)

    def add(to: TorchPass) -> None:
        to.add(0, rule, scores.to(device), None, None, [0])
        if isinstance(to, FusedPass):
            to.add_fused(1, rule, of, [0], biased=False)
        else:
            to.add(1, rule, made_of, None, None, [0])

    return _same(*(_until_it_fits(kind, keep, add) for kind in (FusedPass, TorchPass)))


def _until_it_fits(kind: type[TorchPass], keep: int, add: Callable[[TorchPass], None]) -> Brought:
    slots = Slots(True)
    while True:
        one = kind(slots, keep=keep, keep_rows=2, cutoff=4.0, strict=True)
        add(one)
        found = one.finish()
        if found is not None:
            return found


def _same(mine: Brought, theirs: Brought) -> bool:
    for a, b in zip(mine.layers.values(), theirs.layers.values(), strict=True):
        for name in ("counts", "able", "rows"):
            if not torch.equal(getattr(a, name), getattr(b, name)):
                return False
        rows = a.rows.clamp_min(1)
        if not _near(a.level / rows, b.level / rows) or not _near(a.sums / rows, b.sums / rows):
            return False
    tables = [found.listed[0][0] for found in (mine, theirs)]
    end = 0.99 * min(float(table.a.max()) for table in tables)  # what is cut off is any of its like
    return all(
        _entries(one, end) <= _entries(other, end * (1 + _NEAR))
        for one, other in (tables, tables[::-1])
    )


def _entries(table: Listed, end: float) -> set[tuple[int, ...]]:
    """Rows, keys and competitors below a half-width."""
    near = table.a < end
    return set(zip(*(x[near].tolist() for x in table[:3]), strict=True))


def _near(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _NEAR * (1 + b.abs())).all())


def _rule(n_key: int) -> Rule:
    return Rule(
        law=UNIFORM, sigmas=np.array([0.1, 0.3, 0.5]), on_q=True, on_k=True, exact=True,
        sparse=0.95, room=1 / 0.95 - 1, cutoff=4.0, n_heads=_HEADS, first_matrix=0, first_query=0,
        eps=1e-7, soft_cap=0.0, sink=np.array([-math.inf, -math.inf, 2.0, -math.inf]),
        kv_head=np.arange(_HEADS), first=np.zeros((1, n_key), np.int8), biased=False,
    )  # fmt: skip
