"""A fused attention in parts: each has the scores that the whole has there."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from hooks.model import Fused


@given(
    batch=st.integers(1, 4),
    n_kv=st.integers(1, 4),
    group=st.integers(1, 3),
    n=st.integers(1, 6),
    mask=st.sampled_from(["none", "causal", "keys", "rows", "heads", "prompts", "two"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_ranges_of_matrices(
    batch: int, n_kv: int, group: int, n: int, mask: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, n_query, n_key = n_kv * group, 5, 7

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    masks = {
        "keys": draw(1, 1, 1, n_key),
        "rows": draw(n_query, n_key),
        "heads": draw(1, heads, n_query, n_key),
        "prompts": draw(batch, 1, n_query, n_key) > 0,
        "two": draw(batch, heads, n_query, n_key),
    }
    whole = Fused(
        draw(batch, heads, n_query, 8),
        draw(batch, n_kv, n_key, 8),
        masks.get(mask),
        is_causal=mask == "causal",
    )
    wanted = whole.scores(0, n_query).flatten(0, 1)
    parts = whole.split(n)
    assert 1 <= len(parts) <= max(n, 2 * batch * n)
    at = 0
    for first, part in parts:
        found = part.scores(0, n_query).flatten(0, 1)
        assert first == at
        torch.testing.assert_close(found, wanted[first : first + len(found)], equal_nan=True)
        at += len(found)
    assert at == batch * heads
    if batch * n_kv >= n and (n <= batch or n_kv >= n):
        assert len(parts) >= n
