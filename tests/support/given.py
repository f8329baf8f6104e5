"""Inputs as people give them, and what the model's own code makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooks import collapse_probe
from tests.support.models import (
    tokens,
)

B, N = 4, 24
IDS = tokens(B, N, seed=3)
ONES = torch.ones_like(IDS)
AT = torch.arange(N).expand(B, N)
PACKED = torch.cat([torch.arange(9), torch.arange(8), torch.arange(7)]).expand(B, N)
POSITIONS = {
    "as counted": AT,
    "a gap of 20": torch.where(AT < 10, AT, AT + 20),
    "stretched by two": AT * 2,
    "all zero": AT * 0,
    "all seven": AT * 0 + 7,
    "backwards": AT.flip(1),
    "begun at five": AT + 5,
    "every one twice": AT // 2,
    "packed": PACKED,
}


def weights(hf: Any, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Attention weights of each layer, ``[batch, head, query, key]``."""
    with torch.no_grad():
        out = hf(ids, output_attentions=True, **inputs)
    return [a.double() for a in out.attentions]


def sparse_rows(
    attentions: Sequence[Tensor], starts: Sequence[int] = (0,), sparse: float = 0.95
) -> tuple[int, int]:
    """Sparse rows with two or more visible keys, and those of them on a first token."""
    rows = sinks = 0
    for a in attentions:
        top, star = a.max(-1)
        chosen = (top >= sparse) & ((a > 0).sum(-1) > 1)
        rows += int(chosen.sum())
        sinks += int((chosen & torch.isin(star, torch.tensor(list(starts)))).sum())
    return rows, sinks


def probed(model: Any, given: Any, **options: Any) -> tuple[int, int]:
    report = collapse_probe(model, given, draws=0, sigmas=[0.1], **options)
    return int(report.rows.sum()), int(report.rows[..., 1].sum())


def loss_of(hf: Any, ids: Tensor, **inputs: Any) -> float:
    with torch.no_grad():
        z = hf(ids, **inputs).logits[:, :-1].double().log_softmax(-1)
    return float(-z.gather(-1, ids[:, 1:, None]).mean())
