"""How the probe's time over a plain pass grows with layers, heads, length, sigmas and draws.

    python -m benchmarks.scaling [--repeats 5] [--figures DIR] [--json FILE]

One thing changes at a time on a random model of GPT-2's kind (queries and keys enlarged, so that
sparse rows exist); the plain pass and the probe are timed turn and turn about in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks._side_by_side import (
    CLOCKS,
    THREADS,
    Row,
    gpt2_shape,
    interleaved,
    machine,
    print_table,
    spread,
    write_json,
)

BASE = {"layers": 4, "heads": 8, "length": 256, "sigmas": 16, "draws": 0}
SWEEPS = {
    "layers": (1, 2, 4, 8, 16),
    "heads": (2, 4, 8, 16, 32),
    "length": (64, 128, 256, 512, 1024),
    "sigmas": (1, 4, 16, 64),
    "draws": (0, 4, 16, 64),
}
LABELS = {
    "layers": "layers",
    "heads": "heads per layer, d_model = 512",
    "length": "length of the prompt (tokens)",
    "sigmas": "noise levels (sigmas) of one probe",
    "draws": "draws for the strict rate",
}
D_MODEL, BATCH, VOCAB = 512, 2, 512


def measure(sizes: dict[str, int], repeats: int, clock: str) -> Row:
    """Seconds of the plain pass and of the probe at these sizes."""
    import numpy as np

    import hooks

    case = gpt2_shape(
        BATCH,
        sizes["length"],
        n_layer=sizes["layers"],
        n_embd=D_MODEL,
        n_head=sizes["heads"],
        vocab_size=VOCAB,
        n_positions=sizes["length"],
        bos_token_id=0,
        eos_token_id=0,
    )
    sigmas = np.geomspace(0.01, 0.5, sizes["sigmas"]) if sizes["sigmas"] > 1 else [0.1]
    reports: list[Any] = []

    def probe() -> None:
        reports[:] = [
            hooks.collapse_probe(
                case.bridge,
                case.tokens,
                sigmas=[float(s) for s in sigmas],
                draws=sizes["draws"],
                progress=False,
            )
        ]

    probe()  # the self-check, once per model, is no part of what grows
    lines = {"plain": lambda: case.bridge(case.tokens), "probe": probe}
    seconds = interleaved(lines, repeats, clock)
    ratios = [a / b for a, b in zip(seconds["probe"], seconds["plain"], strict=True)]
    ratio, low, high = spread(ratios)
    return {
        "plain s": spread(seconds["plain"])[0],
        "probe s": spread(seconds["probe"])[0],
        "ratio": ratio,
        "ratio lower quartile": low,
        "ratio upper quartile": high,
        "sparse share": reports[0].n_sparse / int(reports[0].examined.sum()),
    }


def figure(name: str, rows: list[Row], path: Path) -> None:
    """Time of both, and their ratio, against what changes."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8.0, 3.2), layout="constrained")
    time, over = canvas.subplots(1, 2)
    x = [row[name] for row in rows]
    time.plot(x, [1e3 * row["plain s"] for row in rows], "o--", color="0.45", label="plain pass")
    time.plot(x, [1e3 * row["probe s"] for row in rows], "s-", color="tab:blue", label="probe")
    time.set_ylabel("time (ms)")
    time.set_ylim(bottom=0)
    time.legend(frameon=False)
    ratio = [row["ratio"] for row in rows]
    low = [row["ratio"] - row["ratio lower quartile"] for row in rows]
    high = [row["ratio upper quartile"] - row["ratio"] for row in rows]
    over.errorbar(x, ratio, yerr=[low, high], fmt="s-", color="tab:blue", capsize=3)
    over.axhline(1, color="0.45", linestyle="--", linewidth=1)
    over.set_ylabel("probe / plain pass")
    over.set_ylim(bottom=0)
    for axes in (time, over):
        if name == "draws":
            axes.set_xscale("symlog", base=2, linthresh=4)
        else:
            axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_xlabel(LABELS[name])
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(THREADS)
    results: Row = {
        "machine": machine(),
        "base": BASE,
        "clock": options.clock,
        "batch": BATCH,
        "d_model": D_MODEL,
    }
    print(f"{BATCH} prompts, d_model {D_MODEL}; unless it changes: {BASE}")
    for name in options.sweeps:
        rows = [
            {name: value, **measure({**BASE, name: value}, options.repeats, options.clock)}
            for value in SWEEPS[name]
        ]
        results[name] = rows
        print_table(rows)
        if options.figures:
            figure(name, rows, options.figures / f"bench_{name}.png")
        write_json(options.json, results)


if __name__ == "__main__":
    main()
