"""A noise sweep against as many rows of plain batched passes of the bridge, logits included.

    python benchmarks/sweep.py [--models gpt2 smollm2 addition] [--rounds 5] [--json FILE]

Both in one process, turn by turn; the plain passes have the sweep's own batch size and as many rows
as it has noisy ones. The result of every timed sweep is held against a loop of `NormNoise.applied`
over the same draws. On a busy machine look at the processor's time (`cpu`), at one thread best:
`OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import Tensor

import hooks

UNSCORED = -100

LIMITS = {"gpt2": 1.05, "smollm2": 1.05, "addition": 1.15}


def gpt2() -> tuple[Any, Tensor, Tensor]:
    """GPT-2 small's shape, random, queries and keys enlarged so that sparse rows exist."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(attn_implementation="eager")
    config.architectures = ["GPT2LMHeadModel"]
    inner = GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in inner.transformer.h:
            block.attn.c_attn.weight *= 8
    model = build_bridge_from_module(inner, "GPT2LMHeadModel", hf_config=config).eval()
    return model, *_next(torch.randint(config.vocab_size, (2, 128)))


def smollm2() -> tuple[Any, Tensor, Tensor]:
    """SmolLM2-135M-Instruct, as `make real-model` builds it."""
    from transformer_lens.model_bridge import TransformerBridge

    cache = os.environ.get("QKVNORM_LENS_CACHE") or Path.home() / ".cache" / "qkvnorm-lens"
    model = TransformerBridge.boot_transformers(str(Path(cache) / "smollm2-135m-instruct"))
    text = (Path(__file__).parents[1] / "tests/data/shakespeare.txt").read_text(encoding="utf-8")
    passages = [model.to_tokens(p.strip())[0, :128].cpu() for p in text.split("\n\n\n")[:2]]
    return model, *_next(torch.stack(passages))


def addition() -> tuple[Any, Tensor, Tensor]:
    """The shipped Pre-Norm model on sums of one length; answers and the end are scored."""
    from qkvnorm_lens import load_checkpoint
    from qkvnorm_lens.training import PAD, draw

    drawn = draw("small-train", 4000, seed=0)
    length = (drawn.tokens != PAD).sum(1)
    rows = (length == length.median()).nonzero().flatten()[:128]
    width = int(length.median())
    targets = drawn.targets[rows, :width]
    targets = targets.masked_fill(targets == PAD, UNSCORED)
    return load_checkpoint("addition-pre"), drawn.tokens[rows, :width], targets


def _next(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=UNSCORED)


# model, sigmas, replicates, rows of a pass
CASES: dict[str, tuple[Callable[[], tuple[Any, Tensor, Tensor]], int, int, int]] = {
    "gpt2": (gpt2, 8, 8, 33),
    "smollm2": (smollm2, 8, 8, 33),
    "addition": (addition, 8, 8, 260),
}


def by_hand(
    model: Any, tokens: Tensor, targets: Tensor, sigmas: list[float], draws: int
) -> dict[str, np.ndarray]:
    """Loss and KL sums as [sigma, draw, prompt], from a loop of plain noisy passes."""
    out = {n: np.zeros((len(sigmas), draws, len(tokens))) for n in ("loss", "kl")}
    scored = targets != UNSCORED
    with torch.no_grad():
        clean = model(tokens).double().log_softmax(-1)
        for s, sigma in enumerate(sigmas):
            for d in range(draws):
                with hooks.NormNoise(sigma=sigma, draw=d).applied(model):
                    noisy = model(tokens).double().log_softmax(-1)
                kl = (clean.exp() * (clean - noisy)).sum(-1)
                loss = -noisy.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
                for name, values in (("kl", kl), ("loss", loss)):
                    out[name][s, d] = (values * scored).sum(1).numpy()
    return out


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and seconds of the processor over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def case(name: str, rounds: int, checked: int) -> dict[str, Any]:
    """One line of the table."""
    build, n_sigmas, draws, batch = CASES[name]
    model, tokens, targets = build()
    sigmas = [0.01 * (i + 1) for i in range(n_sigmas)]
    rows = torch.arange(len(tokens)).repeat_interleave(n_sigmas * draws)

    def plain() -> None:
        with torch.no_grad():
            for at in range(0, len(rows), batch):
                model(tokens[rows[at : at + batch]])

    def ours() -> hooks.SweepReport:
        return hooks.sweep(
            model,
            tokens,
            targets=targets,
            sigmas=sigmas,
            replicates=draws,
            batch_size=batch,
            progress=False,
        )

    hooks.attention_sites(model)
    with torch.no_grad():
        model(tokens[:2])
    times: dict[str, list[float]] = {n: [] for n in ("plain", "sweep", "plain cpu", "sweep cpu")}
    reports = []
    for _ in range(rounds):
        for kind, run in (("plain", plain), ("sweep", ours)):
            result, wall, cpu = timed(run)
            times[kind].append(wall)
            times[f"{kind} cpu"].append(cpu)
            if result is not None:
                reports.append(result)
    expected = by_hand(model, tokens, targets, sigmas[-checked:], draws)
    error = max(
        float(np.abs(getattr(r, n)[-checked:] - v).max() / np.abs(v).max())
        for r in reports
        for n, v in expected.items()
    )
    if not error < 1e-3:
        raise SystemExit(f"{name}: wanted the sums of plain noisy passes; off by {error:.2g}")
    ratio = [b / a for a, b in zip(times["plain"], times["sweep"], strict=True)]
    cpu_ratio = [b / a for a, b in zip(times["plain cpu"], times["sweep cpu"], strict=True)]
    return {
        "model": name,
        "rows": len(rows),
        "batch": batch,
        "tokens": tokens.shape[1],
        "plain s": round(statistics.median(times["plain"]), 3),
        "sweep s": round(statistics.median(times["sweep"]), 3),
        "ratio": round(statistics.median(ratio), 3),
        "from": round(min(ratio), 3),
        "to": round(max(ratio), 3),
        "cpu ratio": round(statistics.median(cpu_ratio), 3),
        "cpu from": round(min(cpu_ratio), 3),
        "cpu to": round(max(cpu_ratio), 3),
        "error": f"{error:.1e}",
        "threads": torch.get_num_threads(),
    }


def targets(table: list[dict[str, object]]) -> list[dict[str, object]]:
    """What each ratio was wanted to be."""
    return [
        {
            "target": f"{row['model']}: hooks.sweep / plain batched passes, {row['rows']} rows",
            "wanted": f"<= {LIMITS[str(row['model'])]}",
            "got": row["ratio"],
            "met": "yes" if float(str(row["ratio"])) <= LIMITS[str(row["model"])] else "no",
        }
        for row in table
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checked", type=int, default=1, help="sigmas held against plain passes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = [case(name, options.rounds, options.checked) for name in options.models]
    width = {n: max(len(n), *(len(str(row[n])) for row in table)) for n in table[0]}
    print("  ".join(f"{n:>{w}}" for n, w in width.items()))
    for row in table:
        print("  ".join(f"{row[n]!s:>{w}}" for n, w in width.items()))
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        results = {"about": about, "table": table, "targets": targets(table)}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
