"""Small models whose attention is sparse, the same weights in both environments."""

from __future__ import annotations

from typing import Any

import torch

from qkvnorm_lens.config import QKVNormConfig
from qkvnorm_lens.model import QKVNormTransformer

_SIZES = {
    "d_model": 32,
    "d_head": 8,
    "d_mlp": 64,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 24,
    "d_vocab": 19,
    "default_prepend_bos": False,
}
_ROTARY = {"n_key_value_heads": 2, "positional_embedding_type": "rotary"}
CASES: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "pre": {"placement": "pre"},
    "qkv": {"placement": "qkv"},
    "none-gqa-rotary": {"placement": "none", **_ROTARY},
    "pre-gqa-rotary": {"placement": "pre", **_ROTARY},
    "qkv-gqa-rotary": {"placement": "qkv", **_ROTARY},
}
SIGMAS = (0.01, 0.1, 0.5)


def config(**options: Any) -> QKVNormConfig:
    return QKVNormConfig(**{**_SIZES, **options})


def random_model(**options: Any) -> QKVNormTransformer:
    """Every weight drawn, the gains and biases too; large enough for sparse rows."""
    model = QKVNormTransformer(config(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            vector = p.ndim == 1 or "norm" in name or "gain" in name
            if vector:
                drawn = 0.2 * drawn + (0.0 if name.endswith("bias") else 1.0)
            else:
                drawn = drawn / p.shape[-1] ** 0.5
            if any(f"attn.{part}" in name for part in ("q.", "k.", "q_norm", "k_norm")):
                drawn = 2.5 * drawn
            p.copy_(drawn)
    return model


def tokens(batch: int = 4, pos: int = 20) -> torch.Tensor:
    return torch.randint(19, (batch, pos), generator=torch.Generator().manual_seed(3))
