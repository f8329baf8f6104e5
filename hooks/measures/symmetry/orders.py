"""The orders into which a prompt's tokens are put."""

from __future__ import annotations

from collections.abc import Set
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Int

from hooks.arguments import MANY, brief, check_integers, plain, read_array, read_list
from hooks.model import Prompts


def asked_orders(permutations: Any) -> int | list[np.ndarray]:
    """Read the argument: how many permutations, or the permutations themselves."""
    if isinstance(plain(permutations), Integral):
        return check_integers(permutations=(permutations, 1, MANY))[0]
    wanted = "an integer >= 1, or permutations [permutation, position]"
    if isinstance(permutations, Set):  # of no order
        raise ValueError(f"permutations: wanted {wanted}; got {brief(permutations)}")
    try:
        rows = read_list("permutations", permutations, wanted)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not rows:
        raise ValueError("permutations: wanted one or more; got none")
    out = []
    for row in rows:
        each = "each to be a list of integers, [permutation, position]"
        try:
            order = read_array("permutations", row, "iu", each)
        except TypeError as error:
            raise ValueError(str(error)) from None
        if order.ndim != 1:
            raise ValueError(f"permutations: wanted {each}; got {brief(row)}")
        out.append(order.astype(np.int64))
    return out


def orders_of(
    prompts: Prompts, permutations: int | list[np.ndarray], seed: int, keep_first: bool
) -> list[Int[np.ndarray, "_ _"]]:
    """For each prompt the identity, and its permutations."""
    first, out = int(keep_first), []
    for index, tokens in enumerate(prompts.first):
        ids = tokens.cpu().numpy()
        n = len(ids)
        if n - 1 - first < 2:
            raise ValueError(
                f"prompt {index}: wanted at least {3 + first} tokens (two to swap before the last"
                f"{', the first kept' if first else ''}); got {n}"
            )
        if (ids[first : n - 1] == ids[first]).all():
            raise ValueError(
                f"prompt {index}: wanted different tokens before the last"
                f"{' and after the first' if first else ''}, so that a permutation changes the "
                f"prompt; got {n - 1 - first} times the id {ids[first]}"
            )
        if isinstance(permutations, int):
            drawn = _drawn(ids, permutations, first, np.random.default_rng([seed, index]))
        else:
            drawn = _given(permutations, ids, first, index)
        out.append(np.stack([np.arange(n), *drawn]))
    return out


def _drawn(
    ids: Int[np.ndarray, "pos"], count: int, first: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Permutations of positions first .. n - 2 that change the ids.

    Where two ids differ, at least half of all permutations change the ids.
    """
    out: list[np.ndarray] = []
    identity = np.arange(len(ids))
    while len(out) < count:
        order = identity.copy()
        order[first:-1] = rng.permutation(identity[first:-1])
        if not np.array_equal(ids[order], ids):
            out.append(order)
    return out


def _given(
    permutations: list[np.ndarray], ids: Int[np.ndarray, "pos"], first: int, prompt: int
) -> list[np.ndarray]:
    """The caller's, where each is a permutation that changes this prompt."""
    n = len(ids)
    for order in permutations:
        fits = np.array_equal(np.sort(order), np.arange(n))
        if not fits or order[-1] != n - 1 or (first and order[0] != 0):
            raise ValueError(
                f"permutations: wanted each to hold the positions 0 to {n - 1} of prompt {prompt} "
                f"once, the last{' and the first' if first else ''} in its place; got "
                f"{order.tolist()}"
            )
        if np.array_equal(ids[order], ids):
            raise ValueError(
                f"permutations: wanted each to change the ids of prompt {prompt}; got one that "
                f"leaves them as they are: {order.tolist()}"
            )
    return permutations
