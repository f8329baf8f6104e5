#!/usr/bin/env bash
# hqq 0.2.8.post1: at 2 bits it stores tensors that it cannot read back, without a word.
#
# Codes are packed four to a byte (two at 4 bits) by cutting the groups into as many slices and shifting each. Where the
# number of groups is no multiple, the last slice is longer. From nine groups on the sum of the slices is an error of
# sizes; with five to seven groups a slice has one row, which broadcasts: the tensor is stored, with the wrong number of
# rows, and reading it back raises an error. Of one group nothing at all is stored: no bytes, no error. At 4 bits the
# same holds for one and three groups; at 8 bits all is well. transformers 5.23.0's quantised cache (backend HQQ) meets
# it with three key heads of 128 dimensions and one token: the first update stores six groups, the second one can't read
# them.
#
# Exits 0 while it is so, 1 when the behaviour has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0
# Its other requirements are for loading models, and unused here.
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps hqq==0.2.8.post1
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check termcolor accelerate einops
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from hqq.core.quantize import Quantizer
from transformers.cache_utils import HQQQuantizedLayer

torch.manual_seed(0)


def outcome(bits, groups):
    """What becomes of a tensor of so many groups of 64."""
    x = torch.randn(groups, 64)
    try:
        codes, meta = Quantizer.quantize(x, nbits=bits, axis=1, group_size=64, device="cpu", compute_dtype=x.dtype)
    except RuntimeError:
        return "refused"
    try:
        back = Quantizer.dequantize(codes, meta)
    except RuntimeError:
        return f"stored in {codes.numel()} bytes, not readable"
    near = back.shape == x.shape and float((back - x).abs().max()) < 2
    return "read" if near else "read, and wrong"


found = {bits: [outcome(bits, groups) for groups in range(1, 13)] for bits in (2, 4, 8)}
for bits, each in found.items():
    for groups, what in enumerate(each, 1):
        print(f"{bits} bits, {groups} groups: {what}")

x, layer = torch.randn(1, 3, 1, 128), HQQQuantizedLayer(nbits=2, axis_key=1, axis_value=1)
layer.update(x, x)
try:
    layer.update(x, x)
    cache = "read"
except RuntimeError as error:
    cache = str(error)
print("transformers' cache:", cache)
lost = {bits: [g for g, what in enumerate(each, 1) if "not readable" in what] for bits, each in found.items()}
nothing = [bits for bits, each in found.items() if each[0].startswith("stored in 0 bytes")]
same = lost == {2: [1, 5, 6, 7], 4: [1, 3], 8: []} and nothing == [2, 4] and "size of tensor" in cache
sys.exit(0 if same else 1)
PYTHON
