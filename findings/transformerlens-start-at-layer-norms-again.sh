#!/usr/bin/env bash
# TransformerLens 4.3.0: a pass that starts at a layer norms the given stream as if it were an embedding.
#
# model(stream, start_at_layer=1) goes on from a residual stream. A bridge does so by handing the stream to the
# Hugging Face model as inputs_embeds and leaving out the first blocks. BLOOM and BERT have a norm behind the
# embedding, which is called on inputs_embeds too: the stream is normed before layer 1. No error, no warning.
#
# Seen with transformers 5.23.0 and tiny random models: from the stream that a whole pass had before layer 1, GPT-2's
# logits are the same to the last bit, BLOOM's are off by 2.4 of 4.5 and BERT's by 2.3 of 3.9. A hook before BLOOM's
# norm sees the stream itself.
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
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

BERT = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64)
KINDS = {
    GPT2LMHeadModel: GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    BloomForCausalLM: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    BertForMaskedLM: BertConfig(vocab_size=97, max_position_embeddings=64, **BERT),
}
ids = torch.arange(3, 16)[None]
off, kept = {}, {}
for kind, config in KINDS.items():
    torch.manual_seed(0)
    hf = kind(config).eval()
    for weight in hf.parameters():
        if weight.ndim > 1:
            weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
    bridge = build_bridge_from_module(hf, kind.__name__, hf_config=config, device="cpu")
    seen = {}

    def keep(x, hook):
        seen[hook.name] = x.clone()

    with torch.no_grad():
        whole, cache = bridge.run_with_cache(ids)
        stream = cache["resid_pre", 1]
        begun = bridge(stream, start_at_layer=1)
        norms = [name for name in bridge.hook_dict if name.startswith("embed_ln.hook_in")]
        bridge.run_with_hooks(stream, start_at_layer=1, fwd_hooks=[(n, keep) for n in norms])
    name = kind.__name__
    off[name] = float((begun - whole).abs().max())
    kept[name] = any(torch.equal(x, stream) for x in seen.values())
    print(
        f"{name}: logits from the stream before layer 1 are off by {off[name]:.3g} of "
        f"{float(whole.abs().max()):.3g}; the embedding's norm was given the stream: {kept[name]}"
    )
others = [off["BloomForCausalLM"], off["BertForMaskedLM"]]
sys.exit(0 if off["GPT2LMHeadModel"] == 0 and min(others) > 0.05 and kept["BloomForCausalLM"] else 1)
PYTHON
