"""Nats that an error of keys or values costs the output, from gradients of the model itself.

To second order KL(clean || cached) = 1/2 dx^T F dx, where F is the Fisher information of the
predicted tokens with respect to the keys (or values) x: F = E[g g^T] for the gradient g of the
log-probability of tokens that the model itself draws, one at each position. Errors of different
tokens are taken as independent:

    risk = 1/2 sum_t E[(g_t . dx_t)^2]

For a sample of tokens one backward pass gives all gradients, of every layer; a format then costs
one dot product per vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
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
        self, logits: Any, tokens: Callable[[Tensor, int], Tensor], samples: int
    ) -> Iterator[Leaves]:
        """Gradients of sum_t log p(token t), ``[batch, pos, kv_head, d]``, sample by sample.

        Args:
            logits: the pass's output.
            tokens: from log-probabilities and the sample's index, a token for each position.
            samples: how many.

        Raises:
            UnsupportedModelError: no gradient reaches the keys and values.
        """
        log_p = torch.log_softmax(checked_logits(logits).float(), -1)
        places = list(self._zeros)
        for sample in range(samples):
            drawn = tokens(log_p.detach(), sample).to(log_p.device)
            total = log_p.gather(-1, drawn[..., None]).sum()
            try:
                found = torch.autograd.grad(
                    total, [self._zeros[p] for p in places], retain_graph=sample < samples - 1
                )
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


def draw_tokens(
    log_p: Float[Tensor, "batch pos d_vocab"], seeds: Sequence[tuple[int, ...]]
) -> Int[Tensor, "batch pos"]:
    """Tokens from these distributions; each prompt's from its own seed alone."""
    rows = []
    for row, seed in zip(log_p, seeds, strict=True):
        u = torch.from_numpy(np.random.default_rng(seed).random(len(row))).to(row.device)
        share = row.double().exp().cumsum(-1)
        at = torch.searchsorted(share, (u * share[:, -1])[:, None], right=True)[:, 0]
        rows.append(at.clamp_max(row.shape[-1] - 1))
    return torch.stack(rows)


def risk_of(
    gradient: Float[Tensor, "batch pos head d"], error: Float[Tensor, "batch pos head d"]
) -> Float[Tensor, "batch head"]:
    """1/2 sum over tokens of (g . dx)^2, nats."""
    return (gradient * error).sum(-1).double().square().sum(1) / 2
