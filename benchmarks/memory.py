"""Peak memory of a collapse probe against the same pass without a probe.

    python benchmarks/memory.py [--lengths 512 1024] [--layers 12 48] [--json FILE]

One process each, so that a peak is one run's own: the same random GPT-2-shaped model (queries and
keys enlarged, so that sparse rows exist), the same tokens, once a pass that ends at the last
attention (no unembedding), once the probe, with few and with many sigmas and draws. What the probe
adds must be at most two layers' scores, whatever the number of layers, sigmas and draws.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
N_HEADS, D_HEAD, VOCAB = 8, 32, 512
KINDS = ("1x0", "16x0", "16x16")
MIB = 2**20


def work(kind: str, n_layers: int, length: int) -> dict[str, float]:
    """One run in this process; its peak resident memory in MiB."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    import hooks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layers,
        n_embd=N_HEADS * D_HEAD,
        n_head=N_HEADS,
        vocab_size=VOCAB,
        n_positions=length,
        attn_implementation="eager",
    )
    config.architectures = ["GPT2LMHeadModel"]
    inner = GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in inner.transformer.h:
            block.attn.c_attn.weight *= 10
    model = build_bridge_from_module(inner, "GPT2LMHeadModel", hf_config=config).eval()
    tokens = torch.randint(VOCAB, (1, length))
    hooks.attention_sites(model)  # both kinds, so that it is in neither difference
    # ... and so is the compiled code, some 110 MiB, once in a process.
    hooks.collapse_probe(model, tokens[:, :16], draws=2, progress=False)
    out: dict[str, float] = {}
    if kind == "plain":
        pass_to_the_last_attention(model, tokens)
    else:
        sigmas, draws = (int(n) for n in kind.split("x"))
        report = hooks.collapse_probe(
            model, tokens, sigmas=np.linspace(0.02, 0.5, sigmas), draws=draws, progress=False
        )
        out["sparse share"] = report.n_sparse / int(report.examined.sum())
        out["rows kept"] = len(report.table)
        out["report MiB"] = sum(v.nbytes for v in vars(report.table).values()) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out["peak MiB"] = peak / 1024 if sys.platform != "darwin" else peak / MIB
    return out


def pass_to_the_last_attention(model: Any, tokens: Any) -> None:
    import torch

    import hooks

    class Ended(Exception):
        pass

    def end(pattern: Any, hook: Any) -> None:
        raise Ended

    last = list(hooks.attention_sites(model))[-1].pattern
    with contextlib.suppress(Ended), torch.no_grad(), model.hooks(fwd_hooks=[(last, end)]):
        model(tokens, use_cache=False)  # the probe fills none either


def child(kind: str, n_layers: int, length: int) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--child", kind, str(n_layers), str(length)]
    # A fixed threshold: else glibc keeps what was freed, and a peak tells of its past.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(n_layers: int, length: int, kind: str, plain: dict[str, float]) -> dict[str, object]:
    """One line of the table."""
    one_layer = N_HEADS * length**2 * 4 / MIB
    probe = child(kind, n_layers, length)
    extra = probe["peak MiB"] - plain["peak MiB"]
    return {
        "tokens": length,
        "layers": n_layers,
        "sigmas x draws": kind,
        "one layer's scores MiB": round(one_layer, 1),
        "plain MiB": round(plain["peak MiB"], 1),
        "probe MiB": round(probe["peak MiB"], 1),
        "extra MiB": round(extra, 1),
        "extra / one layer": round(extra / one_layer, 2),
        "sparse share": round(probe["sparse share"], 3),
        "rows kept": int(probe["rows kept"]),
        "report MiB": round(probe["report MiB"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for length in options.lengths:
        for n_layers in options.layers:
            plain = child("plain", n_layers, length)
            rows += [row(n_layers, length, kind, plain) for kind in KINDS]
    print("  ".join(rows[0]))
    for values in rows:
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in values.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        print(json.dumps(work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
