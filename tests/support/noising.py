"""Logits under noise, and single factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import NormNoise
from tests.support import models

ids = models.tokens()


def logits(model: Any, tokens: Tensor, noise: NormNoise | None, **options: Any) -> Tensor:
    with torch.no_grad():
        if noise is None:
            return model(tokens)
        return model.run_with_hooks(tokens, fwd_hooks=noise.hooks(model, **options))


def factors(noise: NormNoise, role: Any = "k", **options: Any) -> Tensor:
    defaults: dict[str, Any] = {"layer": 0, "n_heads": 4, "prompts": [0], "n_pos": 6}
    return noise.factors(role=role, **(defaults | options))
