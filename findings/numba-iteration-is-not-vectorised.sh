#!/usr/bin/env bash
# numba 0.68.1: `for x in row` over an array is compiled to strided access, `for i in range(row.shape[0])` is not.
#
# The two loops say the same in Python. Compiled with reassociation allowed, a sum of 4,096 float32 by iteration takes
# some five to fifteen times as long: on x86 with AVX2 or AVX-512 its loads are gathers. An index that may be negative
# (start + i, with a start that the compiler does not know) is read the same way; an unsigned one is not.
# Seen on an AMD EPYC (Zen 4): 1.9 against 0.3 microseconds.
#
# Exits 0 while iteration takes at least twice as long, 1 when the behaviour has changed, 2 on a processor without AVX2,
# where nothing is said. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check numba==0.68.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import llvmlite.binding as llvm
import numpy as np
from numba import njit

if not llvm.get_host_cpu_features().get("avx2"):
    print("no AVX2 here: nothing is said")
    sys.exit(2)


def iterate(row):
    total = np.float32(0)
    for x in row:
        total += x if x > np.float32(-3e4) else np.float32(0)
    return total


def count(row):
    total = np.float32(0)
    for i in range(row.shape[0]):
        x = row[i]
        total += x if x > np.float32(-3e4) else np.float32(0)
    return total


def offset(row, start):
    total = np.float32(0)
    for i in range(4096):
        x = row[start + i]
        total += x if x > np.float32(-3e4) else np.float32(0)
    return total


def seconds(function, *given):
    function(*given)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(2000):
            function(*given)
        best = min(best, (time.perf_counter() - begin) / 2000)
    return best


row = np.random.default_rng(0).normal(size=4096).astype(np.float32)
fast = {"contract", "reassoc", "nsz", "arcp"}
compiled = {f.__name__: njit(fastmath=fast)(f) for f in (iterate, count, offset)}
empty = seconds(njit(lambda row: 0), row)
took = {n: seconds(f, row, *([0] if n == "offset" else [])) - empty for n, f in compiled.items()}
gathers = {n: next(iter(f.inspect_asm().values())).count("vgather") for n, f in compiled.items()}
for name, time_taken in took.items():
    print(f"{name}: {1e6 * time_taken:.2f} us, {gathers[name]} gathers in its code")
held = took["iterate"] > 2 * took["count"] and abs(compiled["iterate"](row) - compiled["count"](row)) < 1e-2
sys.exit(0 if held else 1)
PYTHON
echo "as stated: numba $("$folder/venv/bin/python" -c 'import numba; print(numba.__version__)') iterates slower than it counts"
