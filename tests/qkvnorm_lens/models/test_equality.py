"""Our models equal those known from elsewhere, and themselves in other forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer, fold_gains, rotation_at
from tests.support.our_models import SIZES, VARIANTS, far, make, tokens


@pytest.mark.parametrize(
    ("ours", "native"),
    [
        ({"placement": "pre", "norm": NormSpec(over="input", gains="shared")}, "RMS"),
        ({"placement": "none"}, None),
    ],
)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n_key_value_heads": 2},
        {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
        {"attention_dir": "bidirectional"},
    ],
)
def test_equals_transformer_lens_own_model(
    ours: dict[str, Any], native: str | None, extra: dict[str, Any]
) -> None:
    model = make(**ours, **extra, normalization_type=native, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.5
    fields = {
        name: getattr(model.cfg, name)
        for name in ("d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_vocab", "d_mlp")
    }
    theirs = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            **fields, act_fn="relu", normalization_type=native, seed=0, **extra
        ),
        dtype=torch.float64,
    )
    weights = to_bridge(copy.deepcopy(model)).state_dict()
    for layer in range(2):
        for name, width in {
            "q": 32,
            "k": 8 * model.cfg.n_kv,
            "v": 8 * model.cfg.n_kv,
            "o": 24,
        }.items():
            weights[f"blocks.{layer}.attn.{name}.bias"] = torch.zeros(width).double()
    theirs.load_state_dict(weights, strict=True)
    wanted = theirs(tokens())
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(model(tokens()), wanted, atol=1e-6, rtol=1e-6)


def qwen3_attention() -> Any:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    cfg = Qwen3Config(**sizes, rms_norm_eps=1e-5, attn_implementation="eager")
    return Qwen3Attention(cfg, layer_idx=0)


def gemma4_attention() -> Any:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    cfg = Gemma4TextConfig(
        **sizes,
        rms_norm_eps=1e-5,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
    )
    return Gemma4TextAttention(cfg, layer_idx=0)


@pytest.mark.parametrize(
    ("build", "on", "score_scale", "extra"),
    [
        (qwen3_attention, "qk", "inv_sqrt", {}),
        (gemma4_attention, "qkv", "none", {"shared_kv_states": {}}),
    ],
)
def test_equals_attention_from_transformers(
    build: Callable[[], Any], on: str, score_scale: str, extra: dict[str, Any]
) -> None:
    theirs = build().eval()
    model = make(
        placement="qkv",
        norm=NormSpec(on=on),
        score_scale=score_scale,
        n_key_value_heads=2,
        positional_embedding_type="rotary",
        n_layers=1,
    )
    ours = model.layers[0].attn
    with torch.no_grad():
        for name in "qkvo":
            getattr(theirs, f"{name}_proj").weight.copy_(getattr(ours, name).weight)
        for site in on:
            weight = getattr(ours, f"{site}_norm").weight
            gain = torch.rand(8) + 0.5 if site != "v" else torch.ones(8)  # Gemma's v has no gain
            weight.copy_(gain.expand_as(weight))  # theirs is the same for all heads
            if site != "v":
                getattr(theirs, f"{site}_norm").weight.copy_(gain)
    x = torch.randn(2, 7, 24)
    rotation = rotation_at(model.cfg, torch.arange(7)[None])
    cos, sin = (torch.cat((t, t), -1)[:, :, 0] for t in (rotation.cos, rotation.sin))
    visible = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    wanted = theirs(x, position_embeddings=(cos, sin), attention_mask=additive, **extra)[0]
    got = ours(x, visible=visible, rotation=rotation)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_rotary_angles_are_hugging_faces() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    cfg = QKVNormConfig(placement="none", **{**SIZES, "positional_embedding_type": "rotary"})
    positions = torch.arange(7)[None]
    cos, sin = Qwen3RotaryEmbedding(Qwen3Config(head_dim=8))(torch.zeros(1), positions)
    rotation = rotation_at(cfg, positions)
    torch.testing.assert_close(rotation.cos[:, :, 0], cos[..., :4])
    torch.testing.assert_close(rotation.sin[:, :, 0], sin[..., :4])


@pytest.mark.parametrize("variant", ["none", "pre", "pre-shared", "pre-layer", "attn-only"])
def test_folding_the_gains_changes_the_weights_and_not_the_model(variant: str) -> None:
    model = make(**VARIANTS[variant], dtype=torch.float64)
    wanted = model(tokens())
    folded = fold_gains(model)
    torch.testing.assert_close(folded(tokens()), wanted)
    assert not [n for n, _ in folded.named_parameters() if "gain" in n or "ln1" in n]
    assert torch.equal(model(tokens()), wanted), "the model itself is left as it was"
    if variant != "none":
        assert far(folded.layers[0].attn.k.weight, model.layers[0].attn.k.weight)


@pytest.mark.parametrize("variant", ["qkv", "qkv-shared", "qk-gqa"])
def test_gains_behind_a_projection_are_not_folded(variant: str) -> None:
    with pytest.raises(ValueError, match="cannot be folded"):
        fold_gains(make(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_bridge_plain_and_sdpa_compute_the_same(variant: str) -> None:
    model = make(**VARIANTS[variant])
    wanted = model(tokens())
    bridge = to_bridge(copy.deepcopy(model))
    torch.testing.assert_close(bridge(tokens()), wanted, atol=1e-5, rtol=1e-5)
    if model.cfg.score_scale == "calibrated":
        return
    fast = QKVNormTransformer(
        QKVNormConfig.from_json({**model.cfg.to_json(), "attn_implementation": "sdpa"})
    ).eval()
    fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(fast(tokens()), wanted, atol=1e-5, rtol=1e-5)
