#!/usr/bin/env bash
# triton 3.9.0: under its interpreter a block of booleans and a scalar boolean can't be combined.
#
# `block & scalar` compiles for a device, where the scalar is spread over the block. TRITON_INTERPRET=1 spreads it as
# a float, so that numpy's bitwise_and refuses the pair ("ufunc 'bitwise_and' not supported for the input types"); of
# two blocks it does what it should. A kernel that is developed without a device has to make a block of the scalar.
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps triton==3.9.0
cat > "$folder/kernel.py" <<'PYTHON'
import sys

import torch
import triton
from triton import language as tl


@triton.jit
def kernel(x_ptr, out_ptr, AS_BLOCK: tl.constexpr):
    at = tl.arange(0, 4)
    positive = tl.load(x_ptr) > 0
    if AS_BLOCK:
        positive = tl.load(x_ptr + tl.zeros([4], tl.int32)) > 0
    tl.store(out_ptr + at, ((at < 3) & positive).to(tl.int32))


def runs(as_block):
    out = torch.zeros(4, dtype=torch.int32)
    try:
        kernel[(1,)](torch.ones(1), out, AS_BLOCK=as_block)
    except Exception as error:
        return str(error)
    return out.tolist()


def compiles():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x_ptr": "*fp32", "out_ptr": "*i32", "AS_BLOCK": "constexpr"}
    source = ASTSource(kernel, types, {(2,): False})
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]) > 0


if sys.argv[1] == "compile":
    print("compiled for a device:", compiles())
    sys.exit(0 if compiles() else 1)
scalar, block = runs(False), runs(True)
print("interpreted, a scalar:", scalar)
print("interpreted, a block:", block)
sys.exit(0 if block == [1, 1, 1, 0] and "bitwise_and" in scalar else 1)
PYTHON
cd "$folder"
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore kernel.py run
"$folder/venv/bin/python" -W ignore kernel.py compile
echo "as stated: triton $("$folder/venv/bin/python" -W ignore -c 'import triton; print(triton.__version__)') refuses it under the interpreter alone"
