#!/usr/bin/env bash
# TransformerLens 4.3.0 on transformers 5.24.0: a bridge's key/value cache stays empty.
#
# transformers 5.24 passes the cache to its attention modules as `cache=`; before, it was
# `past_key_values=`. AttentionBridge._update_kv_cache (generalized_components/attention.py) looks for
# `past_key_values` and `layer_past` among the keyword arguments, finds neither, and returns keys and
# values as they are. So every step with a cache attends to its own tokens alone, and
# TransformerBridge.generate, whose use_past_kv_cache is on by default, forgets the prompt. No error.
#
# Seen on 5.24.0 (tiny random GPT-2 and Llama): after a prompt of 8 tokens the cache holds 0; logits of the
# next token differ from the whole pass by as much as they are large; greedy generation with the cache
# writes another text than without. The Hugging Face models themselves are right, and so are the bridges
# on 5.23.0.
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 transformer-lens==4.3.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

GPT2 = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def by_steps(model, ids):
    """Logits of the last token: of one pass, and of a step behind a cache; what that holds."""
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        held = first.cache.get_seq_length()
        step = model(input_ids=ids[:, -1:], cache=first.cache, use_cache=True).logits[:, -1]
    return float((step - whole).abs().max()), float(whole.abs().max()), held


as_described = True
for cls, config in ((GPT2LMHeadModel, GPT2), (LlamaForCausalLM, LLAMA)):
    config.architectures = [cls.__name__]
    torch.manual_seed(0)
    plain = cls(config).eval()
    for parameter in plain.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    plain.set_attn_implementation("eager")
    bridge = build_bridge_from_module(copy.deepcopy(plain), cls.__name__, hf_config=config).eval()
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(1))
    of_plain, of_bridge = by_steps(plain, ids), by_steps(bridge.original_model, ids)
    texts = [
        bridge.generate(
            ids,
            max_new_tokens=12,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
            use_past_kv_cache=cached,
        )[0, 9:].tolist()
        for cached in (False, True)
    ]
    for what, (error, scale, held) in (("Hugging Face", of_plain), ("bridge", of_bridge)):
        print(f"{cls.__name__}, {what}: after 8 tokens the cache holds {held};", end=" ")
        print(f"the step's logits are off by {error:.2g} on a scale of {scale:.2g}")
    print(f"  generate without a cache: {texts[0]}\n  generate with a cache:    {texts[1]}")
    right = of_plain[0] < 1e-4 * of_plain[1] and of_plain[2] == 8
    lost = of_bridge[0] > 0.1 * of_bridge[1] and of_bridge[2] == 0 and texts[0] != texts[1]
    as_described &= right and lost
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
