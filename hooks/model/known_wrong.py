"""Models that a bridge is known to compute wrongly.

A self-check runs only the bridge, and can't see that its weights were split wrongly: what it finds
is true of the bridge, but false of the model. `docs/transformerlens-traps.md` has the
reproductions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hooks.errors import UnsupportedModelError

_COMPATIBILITY = {  # by the class of the configuration: the model, what compatibility mode does
    "BitNetConfig": ("BitNet", "leaves out the norm inside the MLP"),
    "FalconH1Config": (
        "Falcon-H1",
        "transposes q, k and v, and takes away a norm that the Mamba branch reads too",
    ),
    "GptOssConfig": ("GPT-OSS", "folds value biases although sinks take a share of each row"),
}


def refuse_known_wrong(model: Any) -> None:
    """Raise where TransformerLens's bridge does not compute the model it was made from.

    Raises:
        UnsupportedModelError: a Falcon with grouped keys (``new_decoder_architecture``; its q, k
            and v are interleaved by group, but split as if concatenated) or with ALiBi (added
            twice); in compatibility mode GPT-OSS (value biases are folded as if its rows summed to
            one, and its sinks take a share), BitNet (its MLP loses a norm), Falcon-H1, and models
            with shared experts as wide as the residual stream (their down-projections are scaled
            by a norm that they do not read).
    """
    inner = getattr(model, "original_model", None)
    config: Any = getattr(inner, "config", None)
    kind = type(config).__name__
    wanted = got = ""
    if kind == "FalconConfig" and config.new_decoder_architecture and config.num_kv_heads > 1:
        wanted = "Falcon with one key/value head, or without new_decoder_architecture"
        got = f"{config.num_kv_heads} key/value heads, which TransformerLens 4.3 splits wrongly"
    elif kind == "FalconConfig" and config.alibi:
        wanted, got = "Falcon with rotary positions", "ALiBi, which eager attention adds twice"
    elif getattr(model, "compatibility_mode", False):
        if kind in _COMPATIBILITY:
            name, what = _COMPATIBILITY[kind]
            wanted, got = f"{name} as loaded", f"compatibility mode, which {what}"
        elif _has_square_shared_experts(inner):
            wanted = "a model with shared experts of this width as loaded"
            got = "compatibility mode, which scales their square down-projections as if they read"
            got += " the norm before the MLP"
    if wanted:
        raise UnsupportedModelError(
            "the bridge computes the model", wanted=wanted, got=f"{got}: its logits are not its own"
        )


def _has_square_shared_experts(inner: Any) -> bool:
    """Whether a linear layer of shared experts maps the residual stream's width onto itself."""
    return isinstance(inner, nn.Module) and any(
        isinstance(module, nn.Linear) and module.in_features == module.out_features
        for name, module in inner.named_modules()
        if ".shared_expert" in name
    )
