"""Attention masks as graphs: which token reaches which, in how many layers.

In a mask ``[N, N]`` True at (i, j) says that token i attends to token j, so that content flows from
j to i. The graph's edges are this flow: j -> i. (A networkx graph given as a mask says which token
sees which, as the mask does: see `as_mask`.)
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

from hooks.arguments import check_integers

WIDEST = 1 << 14
"""Tokens, widths and layers: float64 matrices of this size have 2 GiB."""
MaskLike = Any  # numpy, scipy and networkx have no type in common


def complete_mask(n: int) -> Bool[Tensor, "n n"]:
    """Each token attends to each: radius 1."""
    (n,) = check_integers(n=(n, 1, WIDEST))
    return torch.ones(n, n, dtype=torch.bool)


def causal_mask(n: int) -> Bool[Tensor, "n n"]:
    """Token i attends to j <= i: radius 1, from the first token."""
    (n,) = check_integers(n=(n, 1, WIDEST))
    return torch.ones(n, n, dtype=torch.bool).tril()


def window_mask(n: int, width: int) -> Bool[Tensor, "n n"]:
    """Token i attends to |i - j| <= width: radius ceil((N // 2) / width), from the middle."""
    n, width = check_integers(n=(n, 1, WIDEST), width=(width, 1))
    return _offsets(n).abs() <= width


def one_way_window_mask(n: int, width: int) -> Bool[Tensor, "n n"]:
    """Token i attends to 0 <= i - j <= width: radius ceil((N - 1) / width), from the first."""
    n, width = check_integers(n=(n, 1, WIDEST), width=(width, 1))
    return (_offsets(n) >= 0) & (_offsets(n) <= width)


def star_mask(n: int) -> Bool[Tensor, "n n"]:
    """Each token attends to the first and to itself: radius 1."""
    (n,) = check_integers(n=(n, 1, WIDEST))
    mask = torch.eye(n, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def _offsets(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


@dataclass(frozen=True, eq=False)
class MaskGraph:
    """Which tokens reach which under a mask.

    Args:
        mask: True at (i, j) where token i attends to token j; what `as_mask` reads. Kept as a
            boolean tensor.

    Raises:
        ValueError: as for `as_mask`.
        ImportError: scipy is not installed.
    """

    mask: Bool[Tensor, "n n"]

    def __init__(self, mask: MaskLike) -> None:
        object.__setattr__(self, "mask", as_mask(mask))

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
                "graphs need scipy, which is not installed: pip install 'qkvnorm-lens[experiments]'"
            ) from error
        flow = self.mask.T.numpy().astype(np.int8)
        found: np.ndarray = csgraph.shortest_path(flow, method="D", directed=True, unweighted=True)
        return found

    @cached_property
    def eccentricities(self) -> tuple[float, ...]:
        """For each token, the layers until its content has reached every token; inf for most."""
        return tuple(float(x) for x in self.distances.max(1))

    @property
    def centres(self) -> tuple[int, ...]:
        """Tokens that reach every token."""
        return tuple(i for i, x in enumerate(self.eccentricities) if math.isfinite(x))

    @property
    def quasi_strongly_connected(self) -> bool:
        """Whether some token reaches every token: without one, tokens need not become equal.

        This alone isn't enough for collapse: two tokens that see each other but not themselves
        change places for ever. It is enough where such a token also attends to itself (``centre``
        is not None) and no weight on an edge goes to 0.
        """
        return bool(self.centres)

    @property
    def strongly_connected(self) -> bool:
        """Whether every token reaches every token."""
        return len(self.centres) == self.n

    @property
    def radius(self) -> float:
        """The least eccentricity; inf if no token reaches all."""
        return min(self.eccentricities)

    @cached_property
    def centre(self) -> int | None:
        """The nearest to all of the ``centres`` that attend to themselves; None without any.

        With one, pure attention with weights above some eps > 0 collapses (`Trajectory.bound`).
        """
        fit = [i for i in self.centres if bool(self.mask[i, i])]
        return min(fit, key=lambda i: self.eccentricities[i], default=None)


def as_mask(mask: MaskLike) -> Bool[Tensor, "n n"]:
    """A boolean tensor ``[N, N]``, True at (i, j) where token i attends to token j.

    Args:
        mask: a boolean tensor or numpy array; a scipy.sparse matrix of booleans or of zeros and
            ones; a networkx graph, whose tokens are its nodes in the order of ``graph.nodes`` and
            in which an edge u -> v says that u sees v (undirected: both ways). Self-loops are kept,
            and none is added.

    Raises:
        ValueError: something else, not a square matrix, or a token that attends to none.
    """
    graph = not isinstance(mask, type)
    if graph and callable(getattr(mask, "is_directed", None)) and hasattr(mask, "nodes"):
        found = _from_graph(mask)
    elif graph and callable(getattr(mask, "toarray", None)):
        found = _from_sparse(mask)
    elif isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        found = torch.tensor(mask)
    elif isinstance(mask, Tensor) and mask.dtype == torch.bool:
        found = mask
    else:
        got = getattr(mask, "dtype", None) or type(mask).__name__
        raise ValueError(
            "mask: wanted a boolean tensor or numpy array [N, N], a scipy.sparse matrix or a "
            f"networkx graph (a matrix of numbers: mask != 0); got {got}"
        )
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found):
        raise ValueError(f"mask: wanted a boolean matrix [N, N]; got shape {list(found.shape)}")
    alone = (~found.any(1)).nonzero().flatten().tolist()
    if alone:
        raise ValueError(f"mask: wanted a token to attend to in each row; got none in {alone}")
    return found


def _from_graph(graph: Any) -> Tensor:
    place = {node: i for i, node in enumerate(graph.nodes)}
    mask = torch.zeros(len(place), len(place), dtype=torch.bool)
    for u, v in graph.edges():
        mask[place[u], place[v]] = True
        if not graph.is_directed():
            mask[place[v], place[u]] = True
    return mask


def _from_sparse(matrix: Any) -> Tensor:
    entries = np.asarray(matrix.toarray())
    if not np.isin(entries, (0, 1)).all():
        other = entries[~np.isin(entries, (0, 1))][0]
        raise ValueError(f"mask: wanted booleans, or zeros and ones; got {other}")
    return torch.tensor(entries != 0)
