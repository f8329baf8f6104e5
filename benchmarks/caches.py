"""Cache risk against isolated KL: what it costs to rank a model's layers for a quantised cache.

    python -m benchmarks.caches [--cases smollm2] [--repeats 3] [--json FILE]

In one process, turn and turn about: a plain pass, `hooks.cache_risk`, and passes with the cache in
one layer, keys and values at once, of which isolated KL takes one for each layer and format; a few
are timed and multiplied, which is called so. The risk of the timed runs is checked against isolated
KL of every layer and format, keys and values apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks._side_by_side import (
    CASES,
    CLOCKS,
    THREADS,
    Row,
    interleaved,
    machine,
    print_table,
    ratio_row,
    write_json,
)

SHAPES = {"smollm2": (8, 128), "gpt2": (8, 128), "addition": (128, 21)}
FORMATS = ("fp8-e4m3", "q8_0", "q5_0", "q4_0", "quanto-int2")
SAMPLES = (0, 2, 8)
PASSES = 4  # of isolated KL's that are timed in each repeat
CHEAPER = 20
FORWARD, ONE = "bridge, forward with logits", "isolated KL, one of its passes"


def case(name: str, repeats: int, clock: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Costs, how the timed risks rank layers, and the target."""
    import hooks
    from hooks.model import encode
    from qkvnorm_lens.experiments.beyond.caches.passes import Watched

    of = CASES[name](*SHAPES[name])
    model, tokens = of.bridge, of.tokens
    layers = list(hooks.attention_sites(model))
    watched = Watched(model, layers, encode(model, tokens), FORMATS)
    reports: dict[int, Any] = {}

    def risk(samples: int) -> None:
        how: Any = {"formats": watched.formats, "batch_size": len(tokens), "progress": False}
        reports[samples] = hooks.cache_risk(model, tokens, samples=samples, **how)

    step = max(1, len(layers) // PASSES)
    some = [(sites, watched.formats[i % len(watched.formats)]) for i, sites in enumerate(layers)]
    chosen = some[::step][:PASSES]
    lines = {
        FORWARD: lambda: model(tokens),
        **{f"cache_risk, {n} samples": lambda n=n: risk(n) for n in SAMPLES},
        ONE: lambda: [watched.with_cache(sites, form) for sites, form in chosen],
    }
    seconds = interleaved(lines, repeats, clock)
    passes = len(layers) * len(watched.formats)
    seconds[ONE] = [s / len(chosen) for s in seconds[ONE]]
    seconds[f"isolated KL, {passes} such passes (extrapolated)"] = [
        s * passes for s in seconds[ONE]
    ]
    table = [{"model": of.name} | ratio_row(k, v, seconds[FORWARD]) for k, v in seconds.items()]
    print(f"{of.name}: timed; isolated KL of every layer and format, minutes", flush=True)
    isolated = watched.isolated()
    checks = [_check(of.name, watched, reports[n], isolated) for n in SAMPLES if n]
    default = seconds[f"cache_risk, {SAMPLES[1]} samples"]
    ratios = sorted(a * passes / b for a, b in zip(seconds[ONE], default, strict=True))
    got = ratios[len(ratios) // 2]
    target = {
        "target": f"{of.name}: isolated KL / cache_risk",
        "wanted": f">= {CHEAPER}",
        "got": got,
        "met": "yes" if got >= CHEAPER else "no",
    }
    return table, checks, [target]


def _check(model: str, watched: Any, report: Any, isolated: Any) -> Row:
    """Spearman's rank correlation over layers with isolated KL, by format."""
    from scipy import stats

    frame = report.to_frame("layer")
    row: Row = {"model": model, "samples": report.settings.samples}
    for form in watched.formats:
        reference = [
            sum(isolated[form, i, role].sum() for role in ("k", "v"))
            for i in range(len(watched.layers))
        ]
        ours = frame[frame["format"] == form].sort_values("layer")["risk"]
        row[form] = float(stats.spearmanr(reference, ours).statistic)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(SHAPES), default=["smollm2"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(THREADS)
    found: dict[str, list[Row]] = {"cost": [], "Spearman with isolated KL": [], "targets": []}
    for name in options.cases:
        for rows, new in zip(
            found.values(), case(name, options.repeats, options.clock), strict=True
        ):
            rows += new
    for rows in found.values():
        print_table(rows)
    write_json(options.json, {"about": machine(), **found})


if __name__ == "__main__":
    main()
