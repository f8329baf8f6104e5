#!/usr/bin/env bash
# TransformerLens 4.3.0: fold_ln scales a shared expert's last projection when that is square.
#
# In compatibility mode the gain of the norm before a mixture of experts is multiplied into what reads it: router,
# experts, shared experts (fold_scale_into_moe_block). Which linear layer reads it is told by its width: one with as
# many inputs as the residual stream. The last projection of a shared expert reads the expert's own neurons. If there
# are as many of them as the stream is wide, it is scaled as well, and the model is another one. For bare parameters
# a square shape is called ambiguous and nothing is folded, with a warning; for linear layers nothing is said.
#
# Seen with transformers 5.23.0 and a tiny random Qwen2-MoE with a stream of 32: log-probabilities stay with 48
# neurons in the shared expert, and change by 0.35 with 32.
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
import sys

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

ids = torch.arange(3, 16)[None]
moved = {}
for neurons in (48, 32):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=neurons,
        num_experts=4,
        num_experts_per_tok=2,
    )
    hf = Qwen2MoeForCausalLM(config).eval()
    for name, weight in hf.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
        elif "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    bridge = build_bridge_from_module(hf, "Qwen2MoeForCausalLM", hf_config=config, device="cpu")
    with torch.no_grad():
        before = bridge(ids).log_softmax(-1)
        bridge.enable_compatibility_mode(center_unembed=False, center_writing_weights=False)
        moved[neurons] = float((bridge(ids).log_softmax(-1) - before).abs().max())
    print(f"{neurons} neurons in the shared expert: log-probabilities change by {moved[neurons]:.3g}")
sys.exit(0 if moved[48] < 1e-4 and moved[32] > 0.01 else 1)
PYTHON
