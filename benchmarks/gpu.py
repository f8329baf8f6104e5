"""The probe on one accelerator: time, peak memory, and whether its numbers are right.

    python -m benchmarks.gpu [--dry-run] [--minutes 8] [--json FILE]

Random weights of the shapes of GPT-2 small and Llama-3.1-8B. For each shape, turn and turn about:
a plain forward pass, the probe's engines, the build before (scores copied to the host, compiled
code there: ``engine="compiled"``), and the vectorised recipe (32 draws on whole score tensors). The
probe's curve is compared with the compiled engine's on the same pass. ``--dry-run`` takes tiny
shapes, on the CPU; lines that do not fit into what is left of the time are left out by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hooks
from benchmarks._side_by_side import machine, markdown_table

DRAWS = 32


class Shape(NamedTuple):
    """What is timed: a model and its prompts."""

    name: str
    kind: str
    attention: str
    batch: int
    pos: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    Shape("GPT-2 small, 8 x 1024", "gpt2", "eager", 8, 1024, torch.float32),
    Shape("Llama-3.1-8B, 1 x 4096", "llama", "eager", 1, 4096),
    Shape("Llama-3.1-8B, 1 x 4096, sdpa", "llama", "sdpa", 1, 4096),
    Shape("Llama-3.1-8B, 1 x 8192", "llama", "eager", 1, 8192),
    Shape("Llama-3.1-8B, 1 x 8192, sdpa", "llama", "sdpa", 1, 8192),
    Shape("Llama-3.1-8B, 1 x 32768, sdpa", "llama", "sdpa", 1, 32768),
)
TINY = (
    Shape("tiny GPT-2, 2 x 16", "gpt2", "eager", 2, 16, torch.float32),
    Shape("tiny Llama, 1 x 24, sdpa", "llama", "sdpa", 1, 24),
)


def config(kind: str, *, tiny: bool, attention: str) -> Any:
    """The published shape, or a tiny one."""
    if kind == "gpt2":
        return GPT2Config(**({"n_layer": 2, "n_head": 4, "n_embd": 32} if tiny else {}))
    size = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 5e5, "max_position_embeddings": 131072,
    }  # fmt: skip
    if tiny:
        size |= {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
        }  # fmt: skip
    return LlamaConfig(**size, attn_implementation=attention)


def build(shape: Shape, device: str, *, tiny: bool) -> TransformerBridge:
    """Random weights; queries enlarged, so that there are sparse rows."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            cfg = config(shape.kind, tiny=tiny, attention=shape.attention)
            model = (GPT2LMHeadModel if shape.kind == "gpt2" else LlamaForCausalLM)(cfg).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "c_attn.weight")):
                weight *= 12 if shape.kind == "llama" else 40
    architecture = type(model).__name__
    return build_bridge_from_module(model, architecture=architecture, hf_config=cfg, device=device)


class Line(NamedTuple):
    """One way, timed."""

    what: str
    run: Callable[[], Any]


def lines(model: Any, ids: torch.Tensor, *, on_device: list[str]) -> list[Line]:
    """What is compared."""

    def probe(engine: str, **options: Any) -> Callable[[], Any]:
        batch = {"batch_size": len(ids), "progress": False, "engine": engine}
        return lambda: hooks.collapse_probe(model, ids, **(batch | options))

    def forward() -> None:
        with torch.no_grad():
            model(ids)

    def recipe() -> None:
        """Draws on whole score tensors, one layer's at a time."""

        def count(scores: torch.Tensor, hook: Any) -> None:
            best = scores.argmax(-1)
            for _ in range(DRAWS):
                factor = 1 + 0.3 * torch.rand(scores.shape[-1], device=scores.device)
                ((scores * factor).argmax(-1) != best).sum()

        names = [n for n in model.hook_dict if n.endswith("attn.hook_attn_scores")]
        with torch.no_grad():
            model.run_with_hooks(ids, fwd_hooks=[(n, count) for n in names])

    found = [Line("forward", forward)]
    for engine in on_device:
        found.append(Line(f"probe, {engine}", probe(engine)))
        found.append(Line(f"probe, {engine}, loose rates", probe(engine, strict=False)))
    found.append(Line("probe, scores copied to the CPU (the build before)", probe("compiled")))
    return [*found, Line(f"recipe, {DRAWS} draws at one sigma", recipe)]


def timed(line: Line, device: str) -> tuple[float, float, Any]:
    """Seconds, peak MiB above what was there, and what came back."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    there, begin = (torch.cuda.memory_allocated() if cuda else 0), time.perf_counter()
    found = line.run()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() - there if cuda else 0
    return took, peak / 2**20, found


def apart(mine: Any, theirs: Any) -> dict[str, float]:
    """Largest difference of two reports, in a row."""
    rows = np.maximum(1, mine.rows)
    return {
        "counts": float(np.abs(mine.rows - theirs.rows).max()),
        "loose": float((np.abs(mine.loose - theirs.loose) / rows).max()),
        "centred": float((np.abs(mine.centred - theirs.centred) / rows).max()),
    }


def measure(shape: Shape, device: str, until: float, *, tiny: bool) -> dict[str, Any]:
    """All lines of one shape, twice after a first run, while time is left."""
    model = build(shape, device, tiny=tiny)
    ids = torch.randint(model.cfg.d_vocab, (shape.batch, shape.pos), device=device)
    cuda = device.startswith("cuda")
    times: dict[str, list[float]] = {}
    peaks, reports, left_out = {}, {}, []
    for line in lines(model, ids, on_device=["triton", "torch"] if cuda else ["torch"]):
        first = time.perf_counter()
        if first > until:
            left_out.append(line.what)
            continue
        _, peaks[line.what], reports[line.what] = timed(line, device)
        warm = time.perf_counter() - first
        again = 2 if time.perf_counter() + 2 * warm < until else 0
        times[line.what] = [timed(line, device)[0] for _ in range(again)] or [warm]
    base = statistics.median(times["forward"])
    table = [
        {
            "what": what,
            "s": statistics.median(each),
            "forward passes": statistics.median(each) / base,
            "peak MiB": peaks[what],
        }
        for what, each in times.items()
    ]
    made = {what: x for what, x in reports.items() if hasattr(x, "loose")}
    checked = {what: x for what, x in made.items() if "copied" in what}
    right = {
        what: apart(report, theirs) for theirs in checked.values() for what, report in made.items()
    }
    sparse = [x.n_sparse / int(x.examined.sum()) for x in made.values()][:1]
    return {"shape": shape.name, "table": table, "sparse": sparse, "apart": right} | {
        "left out, no time": left_out
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    until = time.perf_counter() + 60 * options.minutes
    results: dict[str, Any] = {"machine": machine(), "shapes": []}
    if device == "cuda":
        results["device"] = torch.cuda.get_device_name()
    for shape in TINY if options.dry_run else SHAPES:
        if time.perf_counter() > until:
            results["shapes"].append({"shape": shape.name, "left out, no time": ["all"]})
            continue
        found = measure(shape, device, until, tiny=options.dry_run)
        results["shapes"].append(found)
        print(
            f"\n## {shape.name}\n\n{markdown_table(found['table'])}\n{found['apart']}", flush=True
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
