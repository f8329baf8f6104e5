"""This build of the library beside another one: the same calls, turn and turn about.

    git worktree add ../before COMMIT
    python -m benchmarks.builds ../before [--cases gpt2-8x128 sums ...] [--rounds 3] [--json FILE]

Each build runs each case in a process of its own, in turns; ratios are taken within a round, to a
forward pass with logits of the same process and to the other build. Both builds' rates must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._side_by_side import (
    CASES,
    ROOT,
    THREADS,
    Row,
    machine,
    print_table,
    spread,
    write_json,
)

SHAPES = {
    "gpt2-8x128": ("gpt2", 8, 128),
    "gpt2-1x1024": ("gpt2", 1, 1024),
    "smollm2-8x128": ("smollm2", 8, 128),
    "smollm2-1x1024": ("smollm2", 1, 1024),
    "own-1x8192": ("own", 1, 8192),
    "sums": ("addition", 128, 21),
}
PACKAGES = ("hooks", "qkvnorm_lens")
CALLS: dict[str, dict[str, Any]] = {"default": {}, "loose": {"strict": False}}
AGREE = 1e-4  # of a head's rate: builds may integrate to another accuracy, below their own bound


def child(name: str, repeats: int) -> Row:
    """Seconds of a forward pass and of each call, and the rates, by whatever build is imported."""
    import torch

    import hooks

    torch.set_num_threads(THREADS)
    of, batch, pos = SHAPES[name]
    case = CASES[of](batch, pos)
    prompts: Any = case.tokens
    if name == "sums":  # of all lengths: a build may run each length by itself
        lengths = np.random.default_rng(0).integers(9, pos + 1, batch)
        prompts = [row[:n].tolist() for row, n in zip(case.tokens, lengths, strict=True)]
    own = {} if name == "sums" else {"batch_size": batch}

    def probe(options: dict[str, Any]) -> Any:
        return hooks.collapse_probe(case.bridge, prompts, progress=False, **own, **options)

    reports = {call: probe(options) for call, options in CALLS.items()}
    seconds: dict[str, list[float]] = {what: [] for what in ("forward", *CALLS)}
    with torch.no_grad():
        for _ in range(repeats):
            began = time.perf_counter()
            case.bridge(case.tokens)
            seconds["forward"].append(time.perf_counter() - began)
            for call, options in CALLS.items():
                began = time.perf_counter()
                reports[call] = probe(options)
                seconds[call].append(time.perf_counter() - began)
    rows = reports["default"].rows
    rates = {
        which: (getattr(reports["default"], which).sum((3, 4)) / np.maximum(rows.sum((2, 3)), 1))
        for which in ("loose", "strict")
    }
    return {
        "seconds": {what: spread(values)[0] for what, values in seconds.items()},
        "rows": int(rows.sum()),
        "sparse share": int(rows.sum()) / int(reports["default"].examined.sum()),
        "rates": {which: values.tolist() for which, values in rates.items()},
    }


def run_build(tree: Path, name: str, repeats: int) -> Row:
    """:func:`child` with the packages of this tree."""
    folder = ROOT
    if tree != ROOT:  # in one place, as compiled kernels are cached by theirs
        folder = ROOT / "runs" / "builds"
        folder.mkdir(parents=True, exist_ok=True)
        for package in (*PACKAGES, "benchmarks", "tests"):
            (folder / package).unlink(missing_ok=True)
            where = tree.resolve() if package in PACKAGES else ROOT
            (folder / package).symlink_to(where / package)
    command = [sys.executable, "-m", "benchmarks.builds", str(tree), "--child", name]
    done = subprocess.run(
        [*command, "--repeats", str(repeats)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def compare(mine: Row, other: Row) -> float:
    """The largest distance between both builds' rates of a head."""
    if mine["rows"] != other["rows"]:
        raise SystemExit(f"rows: wanted {other['rows']} in both builds; got {mine['rows']}")
    loose, _ = (
        float(np.abs(np.subtract(mine["rates"][which], other["rates"][which])).max())
        for which in ("loose", "strict")
    )
    if not loose <= AGREE:
        raise SystemExit(f"loose rates: wanted them within {AGREE} in both builds; got {loose}")
    return loose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("other", type=Path, help="a tree of the other build")
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.repeats)))
        return
    about, table, seconds = machine(), [], {}
    for name in args.cases:
        rounds = [
            (run_build(ROOT, name, args.repeats), run_build(args.other, name, args.repeats))
            for _ in range(args.rounds)
        ]
        apart = max(compare(mine, other) for mine, other in rounds)
        seconds[name] = [[row["seconds"] for row in both] for both in rounds]
        for call in CALLS:
            both = [[build["seconds"] for build in pair] for pair in rounds]
            to_other = [mine[call] / other[call] for mine, other in both]
            passes = [[build[call] / build["forward"] for build in pair] for pair in both]
            table.append(
                {
                    "case": name,
                    "call": call,
                    "time over the other build's": spread(to_other)[0],
                    "passes": spread([mine for mine, _ in passes])[0],
                    "passes, other build": spread([other for _, other in passes])[0],
                    "sparse share": rounds[0][0]["sparse share"],
                    "rates apart": apart,
                }
            )
        print_table(table)
    write_json(args.json, {"machine": about, "table": table, "seconds": seconds})


if __name__ == "__main__":
    main()
