#!/usr/bin/env bash
# transformers 5.23.0: eager attention adds a boolean mask of four axes to its scores, as 1 and 0.
#
# A mask [batch, 1, query, key] of True (seen) and False is taken as it is. Fused attention (sdpa) hides what is
# False. Eager attention of the same model, with the same call, adds the mask: visible keys gain 1, no key is
# hidden, later tokens are seen. No error, no warning. GPT-Neo takes sdpa by name and adds the mask there too, as
# its attention is its own. TransformerLens 4.3.0 answers by architecture: its own attention (GPT-2, Llama) hides
# what is False whichever implementation was asked for; bridges that run transformers' (GPT-Neo) add it.
#
# Seen with tiny random models and two packed documents: largest difference of a logit from those of the same mask
# as 0 and the least float32.
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
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
))  # fmt: skip
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
neo = GPTNeoForCausalLM(GPTNeoConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
))  # fmt: skip

ids = torch.arange(3, 19).reshape(2, 8)
at = torch.arange(8)
seen = ((at[:, None] >= at) & ((at[:, None] >= 4) == (at >= 4))).expand(2, 1, 8, 8)
hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def off(model, mask=seen):
    with torch.no_grad():
        passes = [model(ids, attention_mask=x) for x in (mask, hidden)]
    a, b = (getattr(x, "logits", x) for x in passes)
    return float((a - b).abs().max())


found, added = {}, {}
for name, made in (("Llama", llama), ("GPT-2", gpt2), ("GPT-Neo", neo)):
    for attention in ("eager", "sdpa"):
        made.set_attn_implementation(attention)
        model = copy.deepcopy(made).eval()
        found[f"{name}, {attention}"] = off(model)
        added[f"{name}, {attention}"] = off(model, seen.float())
        bridge = build_bridge_from_module(
            model, type(made).__name__, hf_config=model.config, device="cpu"
        )
        found[f"{name}, {attention}, bridge"] = off(bridge)
for name, error in found.items():
    print(f"{name}: {error:.1e}")
wrong = {name for name, error in found.items() if error > 1e-2}
expected = {
    "Llama, eager", "GPT-2, eager",
    "GPT-Neo, eager", "GPT-Neo, sdpa", "GPT-Neo, eager, bridge", "GPT-Neo, sdpa, bridge",
}  # fmt: skip
as_float = all(abs(found[n] - added[n]) < 1e-5 for n in wrong if n in added)
print("as far off as the float mask of 1 and 0:", as_float)
sys.exit(0 if wrong == expected and as_float else 1)
PYTHON
