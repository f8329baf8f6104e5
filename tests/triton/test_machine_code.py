"""Every kernel becomes machine code of an H200, and fits into its registers."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.engines import NothingIsAsked
from tests.support.launches import launch_all
from tests.support.sm90 import Kernel, blocks, compiling

SPILLED = 128  # bytes of a thread beside its registers: addresses of what is out of the loops


def test_in_a_process_of_its_own() -> None:
    """Without the interpreter, which replaces the compiler as triton is imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from tests.triton.test_machine_code import check; check()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_walk" in done.stdout


def check() -> None:
    """Launch all kernels on all kinds of rows, compiling only; nothing waits for a device."""
    with compiling() as kernels, NothingIsAsked():
        launch_all()
    names = {kernel.name for kernel in kernels}
    assert names == {"_tell", "_walk", "_nearest", "_rates", "_strict", "_list", "_keep"}
    for kernel in kernels:
        print(kernel)
        assert kernel.stack <= SPILLED, kernel
        assert kernel.shared <= 227 << 10, kernel
        assert kernel.registers * 32 * kernel.warps <= 1 << 16, kernel


def test_blocks_of_machine_code() -> None:
    code = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 FADD R1, R2, R3 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
"""
    kernel = Kernel("k", {}, 1, 0, 0, 4, blocks(code))
    assert [block.ops for block in kernel.blocks] == [("MOV",), ("FADD", "BRA"), ("EXIT",)]
    (loop,) = kernel.loops()
    assert sum(len(block.ops) for block in loop) == 2
