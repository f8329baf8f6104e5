"""Models that a bridge is known to compute wrongly.

A self-check runs the bridge alone, and can't see that its weights were taken apart wrongly: what
it finds is true of the bridge, and false of the model. `docs/transformerlens-traps.md` has the
reproductions.
"""

from __future__ import annotations

from typing import Any

from hooks.errors import UnsupportedModelError


def refuse_known_wrong(model: Any) -> None:
    """Raise where TransformerLens's bridge does not compute the model it was made from.

    Raises:
        UnsupportedModelError: a Falcon with grouped keys (``new_decoder_architecture``): its
            q, k and v lie interleaved by group, and are split one after the other.
    """
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    if type(config).__name__ != "FalconConfig":
        return
    if getattr(config, "new_decoder_architecture", False) and config.num_kv_heads > 1:
        raise UnsupportedModelError(
            "the bridge computes the model",
            wanted="Falcon with one key/value head, or without new_decoder_architecture",
            got=f"{config.num_kv_heads} key/value heads, which TransformerLens 4.3 splits wrongly: "
            "its logits are not the model's",
        )
