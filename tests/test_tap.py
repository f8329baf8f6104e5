"""Scores read where a model takes its softmax: the operands are those of the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hooks._tap import AttentionTap, Factors, Taken

B, H, Q, K, D = 2, 4, 5, 7, 3


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taken_of(tap: AttentionTap, batch: int = B) -> Taken:
    taken = tap.take(batch)
    assert taken is not None
    assert tap.take(batch) is None, "let go of"
    return taken


@given(
    seed=st.integers(0, 999),
    mask=st.sampled_from(["none", "causal", "bool", "added"]),
    scale=st.none() | st.floats(0.1, 2),
    kv_heads=st.sampled_from([H, 2, 1]),
)
def test_a_fused_attention_is_taken_as_documented(
    seed: int, mask: str, scale: float | None, kv_heads: int
) -> None:
    """Its output is the taken pattern's average of v: torch's own kernel says so."""
    n_key = Q if mask == "causal" else K
    q, k = vectors(seed, B, H, Q, D), vectors(seed + 1, B, kv_heads, n_key, D)
    v = vectors(seed + 2, B, kv_heads, n_key, D)
    options: dict[str, object] = {"scale": scale, "enable_gqa": kv_heads < H}
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "bool":
        options["attn_mask"] = vectors(seed + 3, B, 1, Q, n_key) > -0.5
        options["attn_mask"][..., 0] = True  # type: ignore[index]
    elif mask == "added":
        options["attn_mask"] = vectors(seed + 3, B, H, Q, n_key)
    with AttentionTap() as tap:
        out = functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    taken = taken_of(tap)
    shared = v.repeat_interleave(H // kv_heads, 1)
    torch.testing.assert_close(taken.pattern @ shared, out, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(taken.pattern, torch.softmax(taken.scores, -1))
    assert taken.q is not None
    assert taken.k is not None
    assert torch.equal(taken.q, q)
    assert torch.equal(taken.k, k.repeat_interleave(H // kv_heads, 1))


@pytest.mark.parametrize(
    "softmax",
    [
        lambda w: functional.softmax(w, dim=-1),
        lambda w: torch.softmax(w, dim=-1),
        lambda w: w.softmax(dim=-1),
        nn.Softmax(dim=-1),
        lambda w: functional.softmax(input=w, dim=-1, dtype=torch.float64),
    ],
)
def test_every_way_to_take_a_softmax_is_seen(softmax: object) -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    with AttentionTap() as tap:
        scores = q @ k.transpose(-1, -2) / 2
        pattern = softmax(scores)  # type: ignore[operator]
        pattern @ v  # the next product is not the scores'
    taken = taken_of(tap)
    assert taken.scores is scores
    assert taken.pattern is pattern
    assert taken.q is q
    assert taken.k is not None
    assert torch.equal(taken.k, k)
    assert tap.attentions == 1


def test_axes_that_are_folded_come_apart() -> None:
    """[batch * head, query, key] and [batch, kv head, group, query, key], in the same order."""
    scores = vectors(0, B, H, Q, K)
    for folded in (scores.flatten(0, 1), scores.unflatten(1, (2, 2))):
        with AttentionTap() as tap:
            torch.softmax(folded, -1)
        assert torch.equal(taken_of(tap).scores, scores)
    with AttentionTap() as tap:
        torch.softmax(vectors(0, B, 7), -1)  # a router's: no attention
    assert tap.take(B) is None
    assert tap.attentions == 0


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_armed_multiplies_the_next_attention_and_no_other(fused: bool) -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    factors = Factors(vectors(3, B, Q, H), vectors(4, B, K, H))

    def attention() -> torch.Tensor:
        if fused:
            return functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / D**0.5, -1) @ v

    clean = attention()
    with AttentionTap() as tap:
        tap.arm(factors)
        torch.matmul(v, v.transpose(-1, -2))  # of another shape: not meant
        noisy, again = attention(), attention()
    assert torch.equal(again, clean)
    f_q, f_k = (f.transpose(1, 2)[..., None] for f in (factors.q, factors.k))
    scores = (q * f_q) @ (k * f_k).transpose(-1, -2) / D**0.5
    torch.testing.assert_close(noisy, torch.softmax(scores, -1) @ v)
    assert (noisy - clean).abs().max() > 0.01
