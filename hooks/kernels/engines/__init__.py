"""Engines that reduce a layer's rows where their scores lie, beside the compiled loops."""

import warnings

import torch

from hooks.kernels.engines.attention import Operands, operands
from hooks.kernels.engines.listing import FragileRows, Listed
from hooks.kernels.engines.slots import Slots
from hooks.kernels.engines.strict import computes
from hooks.kernels.engines.vectorised import (
    SUMS,
    Brought,
    LayerSums,
    TorchPass,
    from_number,
)


def pass_of(engine: str) -> type[TorchPass]:
    """What reduces a pass: ``torch``, or ``triton``, which is imported now.

    Raises:
        ImportError: triton is not installed.
    """
    if engine != "triton":
        return TorchPass
    try:
        from hooks.kernels.engines.triton_pass import FusedPass
    except ImportError as error:
        raise ImportError(
            "engine: wanted triton, which is not installed: pip install 'qkvnorm-lens[triton]'; "
            f"got {error}"
        ) from error
    return FusedPass


def fastest(device: torch.device) -> str:
    """The engine for scores on a device: ``triton`` where its kernels give there what torch does.

    Where they do not, or fail, a warning says so.
    """
    if device.type != "cuda":
        return "torch"
    try:
        from hooks.kernels.engines.triton_check import agrees
    except ImportError:
        return "torch"
    try:
        fault = None if agrees(device) else "other numbers than torch"
    except Exception as error:  # a compiler's, a driver's: whatever it is, torch does without
        fault = f"{type(error).__name__}: {error}"
    if fault is None:
        return "triton"
    warnings.warn(
        f"engine: wanted Triton's kernels to give on {device} what torch does; got {fault}; torch "
        "reduces the scores, which takes longer",
        RuntimeWarning,
        stacklevel=2,
    )
    return "torch"


__all__ = [
    "Brought",
    "FragileRows",
    "LayerSums",
    "Listed",
    "Operands",
    "SUMS",
    "Slots",
    "TorchPass",
    "computes",
    "fastest",
    "from_number",
    "operands",
    "pass_of",
]
