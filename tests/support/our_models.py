"""Tiny models of ours, of each placement and option."""

from __future__ import annotations

from typing import Any

import torch

from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.models.norms import Calibrated

SIZES: dict[str, Any] = {
    "d_model": 24,
    "d_head": 8,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 32,
    "d_vocab": 17,
    "d_mlp": 20,
    "default_prepend_bos": False,
}


VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "pre": {"placement": "pre"},
    "pre-shared": {"placement": "pre", "norm": NormSpec(over="input", gains="shared")},
    "pre-layer": {"placement": "pre", "norm": NormSpec("layer", "input")},
    "qkv": {"placement": "qkv"},
    "qkv-shared": {"placement": "qkv", "norm": NormSpec(gains="shared")},
    "qkv-projection": {"placement": "qkv", "norm": NormSpec("layer", "projection")},
    "qk-gqa": {"placement": "qkv", "norm": NormSpec(on="qk"), "n_key_value_heads": 2},
    "mqa-bias": {"placement": "qkv", "n_key_value_heads": 1, "attn_bias": True},
    "rotary": {"placement": "qkv", "positional_embedding_type": "rotary", "rotary_dim": 4},
    "rotary-pairs": {
        "placement": "pre",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": True,
    },
    "paper": {
        "placement": "qkv",
        "positional_embedding_type": "sinusoidal",
        "score_scale": "calibrated",
        "calibrated": True,
        "output_mlp": (12, 10),
    },
    "attn-only": {"placement": "pre", "attn_only": True, "normalization_type": None},
    "window": {"placement": "pre", "window_size": 3, "normalization_type": "RMS"},
    "bidirectional": {"placement": "qkv", "attention_dir": "bidirectional"},
    "centred": {"placement": "pre", "centred": True, "n_key_value_heads": 2},
    "centred-window": {"placement": "qkv", "centred": True, "window_size": 4},
    "no-skip": {"placement": "pre", "skip": "none"},
    "skip-attn": {"placement": "qkv", "skip": "attn", "positional_embedding_type": "rotary"},
    "no-positions": {
        "placement": "none",
        "positional_embedding_type": "none",
        "score_scale": "learned",
    },
}


def make(seed: int = 0, **options: Any) -> QKVNormTransformer:
    """A tiny model with weights large enough that attention is not flat, and gains not one."""
    cfg = QKVNormConfig(**{**SIZES, **options})
    model = QKVNormTransformer(cfg).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * 0.3)
        if cfg.calibrated or cfg.score_scale == "calibrated":
            with model.calibrating():
                model(tokens())
            for m in model.modules():
                if isinstance(m, Calibrated):
                    m.weight *= 3.0  # else the scores are so small that nothing is seen
    return model


def tokens(batch: int = 3, pos: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, (batch, pos), generator=torch.Generator().manual_seed(seed))


PLACEMENTS = ("none", "pre", "qkv")


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3
