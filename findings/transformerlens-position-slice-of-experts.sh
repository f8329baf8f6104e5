#!/usr/bin/env bash
# TransformerLens 4.3.0: run_with_cache(pos_slice=-1) keeps an expert, or a head, in place of the last position.
#
# A bridge slices axis 1 of what a hook carries, unless the hook declares another axis. transformers' mixtures of
# experts flatten batch and positions before the router, so the hooks there carry [batch * pos, expert] and
# [batch * pos, d_model], and pos_slice=-1 keeps the last expert's (or the last dimension's) column at all positions.
# NanoChat norms its queries as [batch, head, pos, d_head] and declares nothing: the last head is kept. The result has
# a one where a slice of positions should have left one, or batch * pos rows; no error, no warning.
#
# Seen with transformers 5.23.0 and tiny random models: Mixtral, GPT-OSS and Qwen3-MoE (router), NanoChat (q_norm).
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
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
KINDS = {
    "Mixtral": (EXPERTS, "blocks.0.mlp.gate.hook_out"),
    "Qwen3Moe": (EXPERTS, "blocks.0.mlp.gate.hook_out"),
    "GptOss": (EXPERTS, "blocks.0.mlp.router.hook_in"),
    "NanoChat": ({}, "blocks.0.attn.q_norm.hook_out"),
}
ids = torch.arange(3, 21).view(2, 9)
as_stated = True
for name, (more, hook) in KINDS.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    hf = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    bridge = build_bridge_from_module(hf, f"{name}ForCausalLM", hf_config=config, device="cpu")
    with torch.no_grad():
        whole = bridge.run_with_cache(ids)[1][hook]
        last = bridge.run_with_cache(ids, pos_slice=-1)[1][hook]
    print(f"{name}, {hook}: all {tuple(whole.shape)}, pos_slice=-1 {tuple(last.shape)}")
    as_stated &= 9 in (whole.shape[0] / 2, whole.shape[-2]) and torch.equal(last, whole[:, -1:])
sys.exit(0 if as_stated else 1)
PYTHON
