"""Engines that reduce a layer's rows where their scores lie, beside the compiled loops."""

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
]
