#!/usr/bin/env bash
# numba 0.68.1: in compiled code float(x) of a float32 is a float32; in Python it is a double.
#
# The same function gives another number once it is compiled: float(x) * float(x) overflows, and a long sum that
# starts from float(x) rounds to 24 bits. Adding a literal widens, so most code never shows it. np.float64(x) does
# what float(x) says. A function that is called with both is compiled twice.
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check numba==0.68.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import numba
import numpy as np
from numba import njit


def squared(x):
    return float(x) * float(x)


def squared_wide(x):
    return np.float64(x) * np.float64(x)


x = np.float32(1e30)
plain, compiled, wide = squared(x), njit(squared), njit(squared_wide)
print("Python:", plain, " compiled:", compiled(x), " with np.float64:", wide(x))
kinds = [str(f.nopython_signatures[0].return_type) for f in (compiled, wide)]
print("compiled to return:", *kinds)
held = math.isinf(compiled(x)) and wide(x) == plain == float(x) ** 2
sys.exit(0 if held and kinds == ["float32", "float64"] else 1)
PYTHON
echo "as stated: numba $("$folder/venv/bin/python" -c 'import numba; print(numba.__version__)') keeps float32 in float()"
