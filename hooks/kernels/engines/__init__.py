"""Engines that reduce a layer's rows where their scores lie, beside the compiled loops."""

from hooks.kernels.engines.listing import FragileRows, Listed
from hooks.kernels.engines.slots import Slots
from hooks.kernels.engines.strict import computes
from hooks.kernels.engines.vectorised import (
    SUMS,
    TORCH,
    Brought,
    Kernels,
    LayerSums,
    TorchPass,
    from_number,
)


def kernels(engine: str) -> Kernels:
    """What an engine computes with: ``torch``, or ``triton``, which is imported now.

    Raises:
        ImportError: triton is not installed.
    """
    if engine != "triton":
        return TORCH
    try:
        from hooks.kernels.engines import fused
    except ImportError as error:
        raise ImportError(
            "engine: wanted triton, which is not installed: pip install 'qkvnorm-lens[triton]'; "
            f"got {error}"
        ) from error
    return Kernels(fused.tell_rows_apart, fused.rates)


__all__ = [
    "Brought",
    "FragileRows",
    "LayerSums",
    "Listed",
    "SUMS",
    "Slots",
    "TorchPass",
    "computes",
    "from_number",
    "kernels",
]
