"""All benchmarks, one after another: tables on the screen, one JSON file, and the document.

    python -m benchmarks [--only one_pass scaling ...] [--quick] [--out DIR] [--docs]

Writes DIR/benchmarks.json and DIR/bench_*.png; with --docs also docs/benchmarks.md and its figures
and data. A part that fails or misses its own limit is recorded as that, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._document import document
from benchmarks._side_by_side import CLOCKS, ROOT, THREADS, machine, write_json

DOCS = ROOT / "docs"
PARTS = (
    "one_pass",
    "kernel",
    "scaling",
    "sweep",
    "measures",
    "caches",
    "memory",
    "startup",
    "training",
)
HOURS = ("corpus",)  # run only by name
QUICK = {
    "corpus": ["--tokens", "40000"],
    "one_pass": ["--repeats", "2", "--lengths", "128", "21", "--long", "8192", "--no-memory"],
    "scaling": ["--repeats", "2"],
    "startup": ["--repeats", "2"],
    "sweep": ["--rounds", "2"],
    "measures": ["--repeats", "1", "--cases", "addition"],
    "caches": ["--repeats", "1", "--cases", "addition"],
    "memory": ["--lengths", "512", "--layers", "2", "8"],
    "kernel": ["--repeats", "2"],
    "training": ["--steps", "10", "--repeats", "1"],
}


def run_part(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one benchmark in a process of its own; what it wrote, and how it ended."""
    print(f"\n== {name}", flush=True)
    # The parts set their own number of threads.
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(path)]
        done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        data = json.loads(path.read_text()) if path.exists() else None
    out = {"data": data, "took s": round(time.perf_counter() - began)}
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        out["failed"] = words[0].replace(str(ROOT), ".")[:300]
        print(f"{name} failed: {out['failed']}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    there = [name for name in PARTS if (ROOT / "benchmarks" / f"{name}.py").exists()]
    parser.add_argument("--only", nargs="*", default=there, choices=[*there, *HOURS])
    parser.add_argument("--quick", action="store_true", help="few repeats, short shapes only")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--docs", action="store_true", help="bring docs/benchmarks.md up to date")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(THREADS)
    out = options.out.resolve()
    figures = DOCS / "figures" if options.docs else out
    target = DOCS / "benchmarks.json" if options.docs else out / "benchmarks.json"
    # Parts that are not run again keep their last results.
    results = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"parts": {}}
    if options.only:
        results["machine"] = machine()
    for name in options.only:
        arguments = QUICK.get(name, []) if options.quick else []
        if name in ("one_pass", "scaling", "measures", "caches", "training"):
            arguments = [*arguments, "--clock", options.clock]
        if name == "scaling":
            arguments = [*arguments, "--figures", str(figures)]
        if name == "corpus":
            arguments = [*arguments, "--figure", str(figures / "bench_corpus.png")]
        results["parts"][name] = run_part(name, arguments)
        write_json(target, results)
    if options.docs:
        (DOCS / "benchmarks.md").write_text(document(results), encoding="utf-8")
    print(f"\nwritten: {target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}")


if __name__ == "__main__":
    main()
