"""What starting costs: `import hooks` over `import transformer_lens`, and `qkvnorm-lens --help`.

    python -m benchmarks.startup [--repeats 5] [--json FILE]

Each in a fresh process, turn and turn about; bytecode and file caches are warm from a first round.
`hooks` alone imports no TransformerLens, so what a user of both pays is timed too: `import hooks`
in a process that has TransformerLens already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._side_by_side import ROOT, Row, print_table, spread, write_json

LENS, HOOKS, HELP = "import transformer_lens", "import hooks", "qkvnorm-lens --help"
# What the installed script does, without needing it on the path.
_HELP = "import sys; from qkvnorm_lens.cli import main; sys.argv = ['qkvnorm-lens', '--help']; "
BESIDE = "import hooks, after import transformer_lens"
_BESIDE = """
import time, transformer_lens
began = time.perf_counter()
import hooks
print("took", time.perf_counter() - began)
"""
COMMANDS = {
    "python, nothing imported": "pass",
    LENS: "import transformer_lens",
    HOOKS: "import hooks",
    BESIDE: _BESIDE,
    HELP: _HELP + "sys.exit(main())",
}
IMPORT_LIMIT, HELP_LIMIT = 0.3, 0.5


def seconds_of(code: str) -> float:
    """Wall time of a process that runs this code; of a part of it, if the code says so itself."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{code!r}: wanted exit 0; got {done.returncode}: {done.stderr[-300:]}")
    _, said, own = done.stdout.rpartition("took ")
    return float(own) if said else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(options.repeats + 1):
        for name, code in COMMANDS.items():
            took = seconds_of(code)
            if repeat:
                seconds[name].append(took)
    seconds[f"{HOOKS}, over {LENS}"] = [
        a - b for a, b in zip(seconds[HOOKS], seconds[LENS], strict=True)
    ]
    limits = {HELP: HELP_LIMIT, f"{HOOKS}, over {LENS}": IMPORT_LIMIT, BESIDE: IMPORT_LIMIT}
    table: list[Row] = []
    for name, values in seconds.items():
        middle, low, high = spread(values)
        limit = limits.get(name)
        met = None if limit is None else "yes" if middle <= limit else "no"
        table.append(
            {"what": name, "median s": middle, "IQR s": high - low, "wanted <=": limit, "met": met}
        )
    print_table(table)
    write_json(options.json, {"repeats": options.repeats, "table": table, "seconds": seconds})


if __name__ == "__main__":
    main()
