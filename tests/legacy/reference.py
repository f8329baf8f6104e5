"""Run in the main environment: weights, and what TransformerLens 4 makes of them.

python -m tests.legacy.reference FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

import hooks
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.models.shipped import checkpoint_path, checkpoints
from tests.legacy.cases import CASES, OLD_SIZES, SIGMAS, old_state_dict, random_model, tokens


def write(folder: Path) -> None:
    shipped = {
        name: QKVNormTransformer.from_pretrained(checkpoint_path(name)) for name in checkpoints()
    }
    write_old(folder / "old")
    made = {name: random_model(**options) for name, options in CASES.items()}
    for name, model in {**shipped, **made}.items():
        seen = tokens().remainder(model.cfg.d_vocab)
        target = folder / name
        model.write(target)
        bridge = to_bridge(model).eval()
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(seen)
        wanted = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern", "_normed", "hook_rot_q")
        values = {k: cache[k] for k in cache if "attn" in k and k.endswith(wanted)}
        values |= {"logits": logits, "tokens": seen}
        save_file({k: v.contiguous() for k, v in values.items()}, target / "seen.safetensors")
        frame = hooks.collapse_probe(bridge, seen, sigmas=SIGMAS, progress=False).to_frame()
        frame.to_json(target / "probe.json", orient="table")


def write_old(target: Path) -> None:
    """A HookedTransformer's weights, converted and probed on the native bridge."""
    cfg = TransformerBridgeConfig(**OLD_SIZES)
    bridge = TransformerBridge.boot_native(cfg)
    old = old_state_dict()
    bridge.load_state_dict(convert_tl_checkpoint(old, cfg), strict=True)
    target.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        logits = bridge.eval()(tokens())
    save_file(old | {"logits": logits.contiguous()}, target / "old.safetensors")
    frame = hooks.collapse_probe(bridge, tokens(), sigmas=SIGMAS, progress=False).to_frame()
    frame.to_json(target / "old.json", orient="table")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
