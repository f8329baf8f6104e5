"""Triton kernels compiled for an H200 where there is none, with the machine code they become.

Inside :func:`compiling` a launch compiles its kernel for the arguments' types, as a launch on the
device would, and runs nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H200 = GPUTarget("cuda", 90, 32)
_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
_OP = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Block:
    """A basic block of machine code: its labels, its instructions and where it may jump to."""

    labels: tuple[str, ...]
    ops: tuple[str, ...]
    target: str | None


@dataclass
class Kernel:
    """A kernel's machine code.

    Attributes:
        name: of its function.
        constants: what it was specialised to.
        registers: of a thread.
        stack: bytes of a thread that did not fit into registers.
        shared: bytes of shared memory.
        warps: of a program.
        blocks: its code.
    """

    name: str
    constants: dict[str, Any]
    registers: int
    stack: int
    shared: int
    warps: int
    blocks: list[Block] = field(repr=False)

    def loops(self) -> list[list[Block]]:
        """Blocks between a label and a jump back to it, inner loops within outer ones."""
        at = {label: i for i, block in enumerate(self.blocks) for label in block.labels}
        ends = ((i, at.get(block.target or "", i + 1)) for i, block in enumerate(self.blocks))
        return [self.blocks[first : i + 1] for i, first in ends if first < i or first == i > 0]


@contextmanager
def compiling() -> Iterator[list[Kernel]]:
    """Inside, launches compile; the kernels, each once for its types and constants."""
    kernels: dict[str, Kernel] = {}

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        source, how = _source(self, args, options)
        key = f"{self.fn.__name__} {source.signature} {source.constants} {how}"
        if key not in kernels:
            kernels[key] = _built(self, source, how)

    found: list[Kernel] = []
    with patch.object(triton.JITFunction, "run", launch):
        yield found
    found += kernels.values()


def _source(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """The source as a launch with these arguments specialises it, and the other options."""
    given = dict(zip(function.arg_names, args, strict=False))
    given |= {name: options.pop(name) for name in function.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], even = "*" + _NAMES[value.dtype], True
        elif isinstance(value, float):
            signature[name], even = "fp32", False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            even = value % 16 == 0
        if even:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes), options


def _built(function: Any, source: Any, options: dict[str, Any]) -> Kernel:
    made = triton.compile(source, target=H200, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        code = _run("nvdisasm", "-c", path)
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))  # type: ignore[index]
    named = {function.arg_names[i]: value for (i,), value in source.constants.items()}
    return Kernel(
        function.fn.__name__, named, registers, stack, made.metadata.shared,
        made.metadata.num_warps, blocks(code),
    )  # fmt: skip


def _run(tool: str, *args: object) -> str:
    command = [str(_TOOLS / tool), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def blocks(code: str) -> list[Block]:
    """Basic blocks of disassembled code."""
    found: list[Block] = []
    labels: list[str] = []
    ops: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            if ops:
                found.append(Block(tuple(labels), tuple(ops), None))
                labels, ops = [], []
            labels.append(label[1])
        elif op := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line
        ):
            ops.append(op[1])
            if op[1].split(".")[0] in ("BRA", "EXIT", "RET"):
                target = re.search(r"\.L_x_\d+", op[2])
                found.append(Block(tuple(labels), tuple(ops), target[0] if target else None))
                labels, ops = [], []
    return found
