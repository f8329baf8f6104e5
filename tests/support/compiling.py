"""Compile what the tests need of the kernels, once: `python -m tests.support.compiling float64`.

Numba compiles for each dtype at the first call, for a minute. Without this, every process of a run
on several would do so for itself, and whatever file came first would wait.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

DTYPES = ("float32", "float64")


def mark(dtype: str) -> Path | None:
    """A file that exists once all is compiled; None where no machine code can be kept."""
    from hooks.kernels import compile as compiler

    return None if compiler.FOLDER is None else Path(compiler.FOLDER) / f"has-{dtype}"


def compile_once() -> None:
    """A process for each dtype that has not been compiled from these sources."""
    marks = {dtype: mark(dtype) for dtype in DTYPES}
    missing = [dtype for dtype, file in marks.items() if file is not None and not file.exists()]
    if missing:
        print(f"compiling the kernels for {' and '.join(missing)}, once: a minute or two")
    calls = [[sys.executable, "-m", __name__, dtype] for dtype in missing]
    jobs = [subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL) for call in calls]
    for job in jobs:
        job.wait()  # what goes wrong here goes wrong in a test, which says more


def main(dtype: str) -> None:
    import torch

    import hooks
    from tests.support import models

    torch.set_num_threads(1)
    model = models.tiny_gpt2().to(getattr(torch, dtype))
    hooks.collapse_probe(model, models.tokens()).sigma_at(0.1)
    file = mark(dtype)
    if file is not None:
        file.touch()


if __name__ == "__main__":
    main(sys.argv[1])
