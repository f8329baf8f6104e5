#!/usr/bin/env bash
# TransformerLens 4.3.0: in compatibility mode BitNet's MLP loses a norm.
#
# BitNet (microsoft/bitnet-b1.58-2B-4T) has an RMSNorm, ffn_sub_norm, between the MLP's activation and its last
# projection. enable_compatibility_mode() hands each gated MLP the processed weights, and with these the bridge
# computes the MLP by itself (GatedMLPBridge.forward): two projections, the activation, the last projection. The norm
# is not called. That happens with any of the four kinds of processing, and although this architecture supports
# neither fold_ln nor centring, so that hardly a weight changes; the two warnings are about these. Only
# no_processing=True keeps the model.
#
# Seen with transformers 5.23.0 and a tiny random model: as loaded, the bridge has the Hugging Face model's
# log-probabilities. In compatibility mode it has, to rounding, those of the Hugging Face model without the norm.
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import BitNetConfig, BitNetForCausalLM

torch.manual_seed(0)
config = BitNetConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
hf = BitNetForCausalLM(config).eval()
for name, weight in hf.named_parameters():
    weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5 if weight.ndim > 1 else (
        weight.data + 0.1 * torch.randn_like(weight)
    )
ids = torch.arange(3, 16)[None]


def bridge(**options):
    """Log-probabilities of a new bridge; with options in compatibility mode."""
    made = build_bridge_from_module(
        copy.deepcopy(hf), "BitNetForCausalLM", hf_config=config, device="cpu"
    )
    if options:
        made.enable_compatibility_mode(**options)
    return made(ids).log_softmax(-1)


steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
with torch.no_grad():
    whole = hf(ids).logits.log_softmax(-1)
    found = {"as loaded": bridge(), "no processing": bridge(no_processing=True)}
    found |= {one: bridge(**{step: step == one for step in steps}) for one in steps}
    for layer in hf.model.layers:
        layer.mlp.ffn_sub_norm = torch.nn.Identity()
    without = hf(ids).logits.log_softmax(-1)
print(f"the Hugging Face model without the norm is off by {float((without - whole).abs().max()):.3g}")
for name, got in found.items():
    apart = [float((got - x).abs().max()) for x in (whole, without)]
    print(f"{name}: from the model {apart[0]:.3g}, from it without the norm {apart[1]:.3g}")
kept = [float((found[n] - whole).abs().max()) for n in ("as loaded", "no processing")]
lost = [float((found[n] - without).abs().max()) for n in steps]
sys.exit(0 if max(kept) < 1e-4 and max(lost) < 1e-4 < 0.1 < float((without - whole).abs().max()) else 1)
PYTHON
