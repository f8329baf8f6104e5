"""Small models whose attention is sparse, the same weights in both environments."""

from __future__ import annotations

from typing import Any

import torch

from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer

_SIZES: dict[str, Any] = {
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


OLD_SIZES: dict[str, Any] = {**_SIZES, "act_fn": "gelu", "normalization_type": "LN"}


def old_state_dict() -> dict[str, torch.Tensor]:
    """Weights under the names and shapes of a HookedTransformer's state dict."""
    sizes = OLD_SIZES
    d, heads, d_head, mlp = (sizes[n] for n in ("d_model", "n_heads", "d_head", "d_mlp"))
    vocab = sizes["d_vocab"]
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int, scale: float = 1.0, centre: float = 0.0) -> torch.Tensor:
        return centre + scale * torch.randn(shape, generator=generator)

    weights = {"embed.W_E": drawn(vocab, d), "pos_embed.W_pos": drawn(sizes["n_ctx"], d)}
    for i in range(sizes["n_layers"]):
        block = f"blocks.{i}"
        for ln in ("ln1", "ln2"):
            weights[f"{block}.{ln}.w"] = drawn(d, scale=0.2, centre=1.0)
            weights[f"{block}.{ln}.b"] = drawn(d, scale=0.2)
        for role in "QKV":
            scale = (1.0 if role == "V" else 2.5) / d**0.5
            weights[f"{block}.attn.W_{role}"] = drawn(heads, d, d_head, scale=scale)
            weights[f"{block}.attn.b_{role}"] = drawn(heads, d_head, scale=0.3)
        weights[f"{block}.attn.W_O"] = drawn(heads, d_head, d, scale=d**-0.5)
        weights[f"{block}.attn.b_O"] = drawn(d, scale=0.2)
        weights[f"{block}.mlp.W_in"] = drawn(d, mlp, scale=d**-0.5)
        weights[f"{block}.mlp.b_in"] = drawn(mlp, scale=0.2)
        weights[f"{block}.mlp.W_out"] = drawn(mlp, d, scale=mlp**-0.5)
        weights[f"{block}.mlp.b_out"] = drawn(d, scale=0.2)
    weights["ln_final.w"] = drawn(d, scale=0.2, centre=1.0)
    weights["ln_final.b"] = drawn(d, scale=0.2)
    weights["unembed.W_U"] = drawn(d, vocab, scale=d**-0.5)
    weights["unembed.b_U"] = drawn(vocab, scale=0.2)
    return weights
