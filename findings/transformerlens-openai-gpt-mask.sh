#!/usr/bin/env bash
# TransformerLens 4.3.0: OpenAI GPT's bridge loses its causal mask when it is given an attention mask.
#
# transformers' OpenAI GPT makes of an attention_mask a mask of padding alone, [batch, 1, 1, key], and each
# attention hides later tokens by a buffer of its own. The bridge's reconstructed attention takes any mask of
# four axes for one that is causal already (AttentionBridge._apply_reconstruct_attention_mask) and leaves out
# its triangle. So a mask of ones, as every tokenizer gives it, shows each token the later ones. No error.
#
# Seen with transformers 5.23.0 and a tiny random model: without a mask, another last token moves no logits
# before it; with a mask of ones it moves them by as much as they are large. The Hugging Face model's logits
# are the same with the mask and without.
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
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

torch.manual_seed(0)
config = OpenAIGPTConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
hf = OpenAIGPTLMHeadModel(config).eval()
for weight in hf.parameters():
    weight.data.mul_(10)  # random weights attend to everything alike
bridge = build_bridge_from_module(
    copy.deepcopy(hf), "OpenAIGPTLMHeadModel", hf_config=config, device="cpu"
)
ids = torch.arange(12)[None]
other = ids.clone()
other[:, -1] = 50
ones = torch.ones_like(ids)


def moved(model):
    """How far the last token moves logits before it, without a mask and with one; their size."""
    with torch.no_grad():
        out = []
        for mask in ({}, {"attention_mask": ones}):
            a, b = (getattr(y, "logits", y)[:, :-1] for y in (model(x, **mask) for x in (ids, other)))
            out.append(float((a - b).abs().max()))
        return *out, float(a.abs().max())


results = {"Hugging Face": moved(hf), "bridge": moved(bridge)}
for name, (plain, masked, size) in results.items():
    print(f"{name}: without a mask {plain:.3g}, with a mask of ones {masked:.3g}, of {size:.3g}")
as_stated = (
    results["Hugging Face"][0] == results["Hugging Face"][1] == results["bridge"][0] == 0
    and results["bridge"][1] > 0.1 * results["bridge"][2]
)
sys.exit(0 if as_stated else 1)
PYTHON
