#!/usr/bin/env bash
# TransformerLens 4.3.0: under torch.autocast a left-padded prompt comes out of a bridge as NaN.
#
# transformers adds its mask to the scores in the mask's own float32, so that the least float32 stays finite.
# The bridge's reconstructed attention rounds the mask to the scores' dtype first, and the least float32
# rounds to -inf in bfloat16. A row of padding, which sees nothing, is then a softmax of -inf alone: NaN. Its
# values enter the real tokens' averages as 0 x NaN, so that real tokens are NaN from the second layer on.
# Right padding does not show it, as rows of padding see the real tokens before them. No error, no warning.
#
# Seen with transformers 5.23.0 and a tiny random Llama: Hugging Face's logits are finite in every column, the
# bridge's are NaN in every column of the padded prompt, and finite without autocast or in bfloat16 weights.
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
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
)  # fmt: skip
hf = LlamaForCausalLM(config).eval()


def bridged(dtype):
    model = copy.deepcopy(hf).to(dtype)
    return build_bridge_from_module(
        model, "LlamaForCausalLM", hf_config=config, device="cpu", dtype=dtype
    )


ids = torch.arange(3, 19).reshape(2, 8)
left = torch.ones_like(ids)
left[0, :3] = 0


def bad(model, mask, cast):
    """Columns of the padded prompt whose logits are no numbers, and of the other."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out = model(ids, attention_mask=mask)
    out = getattr(out, "logits", out)
    return (~out.isfinite()).any(-1).sum(-1).tolist()


results = {
    "Hugging Face, left, autocast": bad(hf, left, True),
    "bridge, left, autocast": bad(bridged(torch.float32), left, True),
    "bridge, right, autocast": bad(bridged(torch.float32), left.flip(1), True),
    "bridge, left, float32": bad(bridged(torch.float32), left, False),
    "bridge, left, bfloat16": bad(bridged(torch.bfloat16), left, False),
}
for name, (padded, other) in results.items():
    print(f"{name}: {padded} of 8 columns NaN; {other} in the prompt without padding")
wrong = [name for name, found in results.items() if sum(found)]
sys.exit(0 if wrong == ["bridge, left, autocast"] and results[wrong[0]] == [8, 0] else 1)
PYTHON
