"""The Triton kernels under their interpreter, against the torch engine and the compiled code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_in_a_process_of_its_own() -> None:
    """The interpreter is chosen as triton is imported."""
    code = "from tests.support.triton_checks import check; check()"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
