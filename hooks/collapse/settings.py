"""How a probe was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooks.arguments import check_fields

By = Literal["head", "layer", "model"]
CONTENT, SINK = 0, 1


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How a probe was run; two reports of equal settings can be merged."""

    sigmas: tuple[float, ...]
    on: str
    law: str
    method: str
    shared: str
    sparse: float
    layers: tuple[int, ...]
    draws: int
    seed: int
    keep: int
    keep_rows: int = 0  # reports written before rows were kept have none
    strict: str = "sampled"  # as in reports written before it was "computed"
    pooled: bool = False  # sums over all prompts, with moments, in place of sums for each

    def __post_init__(self) -> None:
        check_fields(self)
