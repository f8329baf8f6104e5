"""Noise on some heads only: pairs of a layer and a query head, as a probe's report names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooks.arguments import brief, check_integers, read_list
from hooks.model import Role
from hooks.sites import LayerSites

Heads = tuple[tuple[int, int], ...]


def read_heads(heads: Any) -> Heads:
    """Pairs (layer, head).

    Raises:
        TypeError, ValueError: none, one twice, or something else.
    """
    wanted = "one or more pairs (layer, head) in a list, each once"
    pairs = []
    for pair in read_list("heads", heads, wanted):
        given = read_list("heads", pair, wanted)
        if len(given) != 2:
            raise ValueError(f"heads: wanted {wanted}; got {brief(pair)}")
        layer, head = (check_integers(heads=(x, 0))[0] for x in given)
        pairs.append((layer, head))
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"heads: wanted {wanted}; got {brief(heads)}")
    return tuple(pairs)


def check_heads(heads: Sequence[Sequence[int]], layers: list[LayerSites]) -> None:
    """Refuse a head that its layer does not have."""
    for sites in layers:
        for layer, head in heads:
            if layer == sites.layer and head >= sites.n_heads:
                wanted = f"a head of layer {layer} from 0 to {sites.n_heads - 1}"
                raise ValueError(f"heads: wanted {wanted}; got {head}")


def spare_others(
    factors: Float[Tensor, "batch pos head"],
    heads: Sequence[Sequence[int]],
    sites: LayerSites,
    role: Role,
) -> Float[Tensor, "batch pos head"]:
    """The factors with 1 for all heads of this layer but these, and those that they read."""
    mine = [head for layer, head in heads if layer == sites.layer]
    chosen = mine if role == "q" else sorted({sites.kv_head_of[head] for head in mine})
    spared = factors.new_ones(factors.shape)
    spared[..., chosen] = factors[..., chosen]
    return spared
