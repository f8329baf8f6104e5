"""Models whose lengths differ, and their interference."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import InterferenceReport, interference
from tests.support import models
from tests.support.watching import (
    tiny_gemma2,
)

ids = models.tokens(batch=4, pos=24)


def long_and_short(model: Any) -> Any:
    """The same model (a bridge, or Hugging Face's own) with embeddings of unlike lengths."""
    table = getattr(model, "original_model", model).get_input_embeddings().weight
    size = torch.randn(len(table), generator=torch.Generator().manual_seed(3)).mul(0.7).exp()
    with torch.no_grad():
        table.mul_(size[:, None].to(table))
    return model


def of_kind(build: Any) -> Any:
    return lambda: long_and_short(build())


KINDS = {name: of_kind(build) for name, build in models.TINY.items()}
KINDS["gemma2"] = of_kind(lambda: tiny_gemma2(qk_scale=2.0))  # few scores at the cap
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def measure(model: Any, tokens: Any = ids, **options: Any) -> InterferenceReport:
    return interference(model, tokens, progress=False, **options)


def same(a: InterferenceReport, b: InterferenceReport) -> None:
    assert a.settings == b.settings
    assert a.tokens == b.tokens
    for f in fields(a):
        x = getattr(a, f.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, getattr(b, f.name), err_msg=f.name)


def raw_norm(model: Any, layer: int) -> tuple[Tensor, Tensor, bool, float]:
    """Gain, bias, kind and eps of a norm, read from the module."""
    module = model.blocks[layer].ln1.original_component
    weight = module.weight.detach().double()
    if "Gemma" in type(module).__name__:
        weight = 1 + weight
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().double()
    eps = next(getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n))
    return weight, bias, isinstance(module, torch.nn.LayerNorm), eps
