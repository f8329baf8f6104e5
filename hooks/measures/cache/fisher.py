"""Nats that an error of keys or values costs the output, from gradients of the model itself.

To second order KL(clean || cached) = 1/2 dx^T F dx, where F is the Fisher information of the
predicted tokens with respect to the keys (or values) x: F = E[g g^T] for the gradient g of u . z,
with z the logits of all positions and u random, E[u u^T] = diag(p) - p p^T at each
(:func:`draw_seeds`). Errors of different tokens are taken as independent:

    risk = 1/2 sum_t E[(g_t . dx_t)^2]

For one u a backward pass gives all gradients, of every layer; a format then costs one dot product
per vector. The gradient of the log-probability of a token that the model draws has the same mean
square, but rare tokens carry most of it: it takes several times as many draws to tell as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.measures.cache.formats import ROLES, CacheRole
from hooks.model import checked_logits
from hooks.sites import Hook, LayerSites

Leaves = dict[tuple[int, CacheRole], Tensor]


class Gradients:
    """Adds a zero to every layer's keys and values; gradients are taken with respect to it.

    The model's own parameters get none.
    """

    def __init__(self, layers: Sequence[LayerSites]) -> None:
        self._layers = layers
        self._zeros: Leaves = {}
        for sites in layers:
            if sites.bare:
                raise UnsupportedModelError(
                    "gradients of keys and values",
                    wanted="hooks with the keys and values (or samples=0: no risk)",
                    got="vectors that are read where the model multiplies them",
                    layer=sites.layer,
                )

    def hooks(self) -> list[Hook]:
        """To be on the model in the pass."""
        return [
            (sites.vector(role).dot.hook, partial(self._add, at=(index, role)))
            for index, sites in enumerate(self._layers)
            for role in ROLES
        ]

    def _add(self, x: Tensor, hook: Any, at: tuple[int, CacheRole]) -> Tensor:
        self._zeros[at] = torch.zeros_like(x, requires_grad=True)
        return x + self._zeros[at]

    def of(
        self, logits: Any, seeds: Callable[[Tensor, int], Tensor], samples: int
    ) -> Iterator[Leaves]:
        """Gradients of sum_t u_t . z_t, ``[batch, pos, kv_head, d]``, sample by sample.

        Args:
            logits: the pass's output z.
            seeds: u, of the logits' shape, from log-probabilities and the sample's index.
            samples: how many.

        Raises:
            UnsupportedModelError: no gradient reaches the keys and values.
        """
        z, places = checked_logits(logits).float(), list(self._zeros)
        log_p = torch.log_softmax(z.detach(), -1)
        for sample in range(samples):
            u, more = seeds(log_p, sample), sample < samples - 1
            try:
                found = torch.autograd.grad(z, [self._zeros[p] for p in places], u, more)
            except RuntimeError as error:
                raise UnsupportedModelError(
                    "gradients of keys and values",
                    wanted="a pass that torch can differentiate (or samples=0: no risk)",
                    got=str(error).splitlines()[0][:200],
                ) from error
            yield {
                (index, role): self._layers[index].vector(role).dot.by_position(g).float()
                for (index, role), g in zip(places, found, strict=True)
            }
        self._zeros = {}


def draw_seeds(
    log_p: Float[Tensor, "batch pos d_vocab"], seeds: Sequence[tuple[int, ...]]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Vectors u with E[u u^T] = diag(p) - p p^T at each position, the Fisher information of logits.

    u = sqrt(p) e - p (sqrt(p) . e), products by token, with each e +1 or -1 at random
    (Hutchinson 1990). Each prompt's come from its own seed alone.
    """
    rows = []
    for row, seed in zip(log_p, seeds, strict=True):
        drawn = np.random.default_rng(seed).bytes(-(-row.numel() // 8))
        bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=row.numel())
        signs = 2 * torch.from_numpy(bits).to(row.device).to(row.dtype).view(row.shape) - 1
        p = row.exp()
        x = p.sqrt() * signs
        rows.append(x - p * x.sum(-1, keepdim=True))
    return torch.stack(rows)


def risk_of(
    gradient: Float[Tensor, "batch pos head d"], error: Float[Tensor, "batch pos head d"]
) -> Float[Tensor, "batch head"]:
    """1/2 sum over tokens of (g . dx)^2, nats; infinite where an error is."""
    nats = (gradient * error).sum(-1).double().square().sum(1) / 2
    return nats.nan_to_num(nan=torch.inf, posinf=torch.inf)
