"""Attention masks as graphs: which token reaches which, and in how many layers.

In a mask ``[N, N]`` True at (i, j) says that token i attends to token j, so that content flows
from j to i. The graph's edges are that flow: j -> i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks._arguments import check_integers


def complete_mask(n: int) -> Bool[Tensor, "n n"]:
    """Each token attends to each: radius 1."""
    check_integers(n=(n, 1))
    return torch.ones(n, n, dtype=torch.bool)


def causal_mask(n: int) -> Bool[Tensor, "n n"]:
    """Token i attends to j <= i: radius 1, from the first token."""
    check_integers(n=(n, 1))
    return torch.ones(n, n, dtype=torch.bool).tril()


def window_mask(n: int, width: int) -> Bool[Tensor, "n n"]:
    """Token i attends to |i - j| <= width: radius ceil((N // 2) / width), from the middle."""
    check_integers(n=(n, 1), width=(width, 1))
    return _offsets(n).abs() <= width


def one_way_window_mask(n: int, width: int) -> Bool[Tensor, "n n"]:
    """Token i attends to 0 <= i - j <= width: radius ceil((N - 1) / width), from the first."""
    check_integers(n=(n, 1), width=(width, 1))
    return (_offsets(n) >= 0) & (_offsets(n) <= width)


def star_mask(n: int) -> Bool[Tensor, "n n"]:
    """Each token attends to the first and to itself: radius 1."""
    check_integers(n=(n, 1))
    mask = torch.eye(n, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def _offsets(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


@dataclass(frozen=True, eq=False)
class MaskGraph:
    """Who reaches whom under a mask.

    Args:
        mask: True at (i, j) where token i attends to token j.

    Raises:
        ValueError: no square boolean matrix, or a token that attends to none.
        ImportError: scipy is not installed.
    """

    mask: Bool[Tensor, "n n"]

    def __post_init__(self) -> None:
        check_mask(self.mask)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.mask)

    @cached_property
    def distances(self) -> Float[np.ndarray, "n n"]:
        """Layers that content of token i needs to reach token j; inf where it never does."""
        try:
            from scipy.sparse import csgraph
        except ImportError as error:
            raise ImportError(
                "graphs want scipy, which is not installed: pip install 'qkvnorm-lens[experiments]'"
            ) from error
        flow = self.mask.T.numpy().astype(np.int8)
        found: np.ndarray = csgraph.shortest_path(flow, method="D", directed=True, unweighted=True)
        return found

    @cached_property
    def eccentricities(self) -> tuple[float, ...]:
        """Of each token: layers until its content has reached every token; inf for most."""
        return tuple(float(x) for x in self.distances.max(1))

    @property
    def centres(self) -> tuple[int, ...]:
        """Tokens that reach every token."""
        return tuple(i for i, x in enumerate(self.eccentricities) if math.isfinite(x))

    @property
    def quasi_strongly_connected(self) -> bool:
        """Whether some token reaches every token: the condition for collapse."""
        return bool(self.centres)

    @property
    def strongly_connected(self) -> bool:
        """Whether every token does."""
        return len(self.centres) == self.n

    @property
    def radius(self) -> float:
        """The least eccentricity; inf if no token reaches all."""
        return min(self.eccentricities)

    @cached_property
    def centre(self) -> int | None:
        """The first token of that eccentricity that attends to itself; None if there is none."""
        fit = [i for i in self.centres if bool(self.mask[i, i])]
        return min(fit, key=lambda i: self.eccentricities[i], default=None)


def check_mask(mask: Any) -> None:
    """Refuse what is no square boolean matrix in which each token attends to one at least."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: wanted a boolean tensor [N, N]; got {got}")
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or not len(mask):
        raise ValueError(f"mask: wanted a boolean tensor [N, N]; got shape {list(mask.shape)}")
    alone = (~mask.any(1)).nonzero().flatten().tolist()
    if alone:
        raise ValueError(f"mask: wanted a token to attend to in each row; got none in {alone}")
