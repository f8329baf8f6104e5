"""Models that a bridge is known to compute wrongly.

A self-check runs only the bridge, and can't see that its weights were split wrongly: what it finds
is true of the bridge, but false of the model. `docs/transformerlens-traps.md` has the
reproductions.
"""

from __future__ import annotations

from typing import Any

from hooks.errors import UnsupportedModelError


def refuse_known_wrong(model: Any) -> None:
    """Raise where TransformerLens's bridge does not compute the model it was made from.

    Raises:
        UnsupportedModelError: a Falcon with grouped keys (``new_decoder_architecture``; its q, k
            and v are interleaved by group, but split as if concatenated) or with ALiBi (added
            twice); GPT-OSS in compatibility mode (value biases are folded as if its rows summed to
            one, and its sinks take a share).
    """
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    kind = type(config).__name__
    wanted = got = ""
    if kind == "FalconConfig" and config.new_decoder_architecture and config.num_kv_heads > 1:
        wanted = "Falcon with one key/value head, or without new_decoder_architecture"
        got = f"{config.num_kv_heads} key/value heads, which TransformerLens 4.3 splits wrongly"
    elif kind == "FalconConfig" and config.alibi:
        wanted, got = "Falcon with rotary positions", "ALiBi, which eager attention adds twice"
    elif kind == "GptOssConfig" and getattr(model, "compatibility_mode", False):
        wanted = "GPT-OSS as loaded"
        got = "compatibility mode, which folds value biases although sinks take a share of each row"
    if wanted:
        raise UnsupportedModelError(
            "the bridge computes the model", wanted=wanted, got=f"{got}: its logits are not its own"
        )
