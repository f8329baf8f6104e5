"""Attention read and written where a model takes it: the operands are those of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional

from hooks.model import Anchor
from hooks.model.protocol import Role
from hooks.model.tap import AttentionTap, Taken
from hooks.sites.types import LayerSites, Site, VectorSite

B, H, Q, K, D = 2, 4, 5, 7, 3
NOWHERE = VectorSite(Site("", 0, 2), Site("", 0, 2), "none")


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(kv_heads: tuple[int, ...] = (0, 1, 2, 3), product: int = 1) -> LayerSites:
    """A layer of which no hook shows anything."""
    anchor = Anchor("blocks.0.attn.hook_in", product, D, kv_heads)
    sites = LayerSites(0, NOWHERE, NOWHERE, NOWHERE, "", "", None, anchor=anchor)
    return sites.without_hooks()


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
    assert taken.v is not None
    assert torch.equal(taken.q, q)
    assert torch.equal(taken.k, k.repeat_interleave(H // kv_heads, 1))
    assert torch.equal(taken.v, shared)
    assert taken.z is out


@pytest.mark.parametrize(
    "softmax",
    [
        lambda w: functional.softmax(w, dim=-1),
        lambda w: torch.softmax(w, dim=-1),
        lambda w: w.softmax(dim=-1),
        nn.Softmax(dim=-1),
        lambda w: functional.softmax(input=w, dim=-1, dtype=torch.float64),
        lambda w: torch.softmax(w, 3),
    ],
)
def test_every_way_to_take_a_softmax_is_seen(softmax: object) -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    seen: list[Taken] = []
    with AttentionTap(seen.append) as tap:
        scores = q @ k.transpose(-1, -2) / 2
        pattern = softmax(scores)  # type: ignore[operator]
        z = pattern @ v  # this product is not the scores'
    taken = taken_of(tap)
    assert taken.scores is scores
    assert taken.pattern is pattern
    assert taken.q is q
    assert taken.k is not None
    assert torch.equal(taken.k, k)
    (over,) = seen
    assert over.scores is scores
    assert over.v is v
    assert over.z is z


def test_a_sink_beside_the_keys_and_a_number_taken_from_a_row() -> None:
    """As in DeepSeek V4: the scores are those of the keys, as they were before."""
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, 1, K, D), vectors(2, B, 1, K, D)
    seen: list[Taken] = []
    with AttentionTap(seen.append):
        scores = q @ k.transpose(-1, -2)
        beside = torch.cat([scores, torch.ones(B, H, Q, 1, dtype=scores.dtype)], dim=-1)
        beside = beside - beside.max(dim=-1, keepdim=True).values
        pattern = torch.softmax(beside, dim=-1)[..., :-1]
        pattern @ v
    (taken,) = seen
    assert torch.equal(taken.scores, scores)
    assert torch.equal(taken.pattern, pattern)
    assert taken.k is not None
    assert torch.equal(taken.k, k.expand(B, H, K, D)), "shared by all heads"
    assert taken.z is not None
    torch.testing.assert_close(taken.z, pattern @ v)


def test_axes_that_are_folded_come_apart() -> None:
    """[batch * head, query, key] and [batch, kv head, group, query, key], in the same order."""
    scores = vectors(0, B, H, Q, K)
    for folded in (scores.flatten(0, 1), scores.unflatten(1, (2, 2))):
        with AttentionTap() as tap:
            torch.softmax(folded, -1)
        assert torch.equal(taken_of(tap).scores, scores)
    with AttentionTap() as tap:
        torch.softmax(vectors(0, B, 7), -1)  # a router's: no attention
        torch.softmax(scores, 2)  # over no keys
    assert tap.take(B) is None


def test_a_softmax_over_windows_is_told_and_is_no_attention() -> None:
    shapes: list[tuple[int, ...]] = []
    seen: list[Taken] = []
    with AttentionTap(seen.append, shapes.append):
        q, k = vectors(0, B, 1, Q, H, D), vectors(1, B, 1, K, H, D)
        scores = torch.einsum("...qhd,...khd->...hqk", q, k)
        torch.einsum("...hqk,...khd->...qhd", torch.softmax(scores, -1), k)
    assert shapes == [(B, 1, H, Q, K)]
    assert not seen


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / D**0.5, -1) @ v


ATTENTIONS = pytest.mark.parametrize(
    "attention", [eager, functional.scaled_dot_product_attention], ids=["eager", "fused"]
)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def drawn(role: Role, n_pos: int) -> torch.Tensor:
    return vectors(10 + "qkv".index(role), B, n_pos, H)


def by_head(role: Role, n_pos: int) -> torch.Tensor:
    """The same as operands have it."""
    return drawn(role, n_pos).transpose(1, 2)[..., None]


@ATTENTIONS
def test_what_is_expected_is_multiplied_and_shown_and_nothing_else(attention: Attention) -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    clean = attention(q, k, v)
    seen: list[Taken] = []
    with AttentionTap() as tap:
        tap.expect(layer(), vectors(0, B, Q, 1), factors=drawn, show=seen.append)
        torch.matmul(v, v.transpose(-1, -2))  # of another shape: not meant
        noisy, again = attention(q, k, v), attention(q, k, v)
    assert torch.equal(again, clean)
    f_q, f_k, f_v = by_head("q", Q), by_head("k", K), by_head("v", K)
    torch.testing.assert_close(noisy, eager(q * f_q, k * f_k, v * f_v))
    assert (noisy - clean).abs().max() > 0.01
    (taken,) = seen
    for shown, came in ((taken.q, q), (taken.k, k), (taken.v, v), (taken.z, noisy)):
        assert shown is not None
        assert torch.equal(shown, came), "the vectors as they came"
    torch.testing.assert_close(taken.pattern @ (v * f_v), noisy)


@ATTENTIONS
def test_factors_of_one_change_nothing(attention: Attention) -> None:
    q, k, v = (vectors(i, B, H, n, D).float() for i, n in enumerate((Q, K, K)))
    clean = attention(q, k, v)
    with AttentionTap() as tap:
        tap.expect(layer(), q.transpose(1, 2), factors=lambda role, n: torch.ones(B, n, H))
        assert torch.equal(attention(q, k, v), clean)
        tap.expect(layer(), q.transpose(1, 2), factors=lambda role, n: None)
        assert torch.equal(attention(q, k, v), clean)


def test_keys_that_are_values_too_are_scaled_in_their_product_alone() -> None:
    """One tensor for both, shared by all heads: noise on k leaves the values, and v the pattern."""
    q, kv = vectors(0, B, H, Q, D), vectors(1, B, 1, K, D)

    def only(wanted: str) -> Callable[[Role, int], torch.Tensor | None]:
        return lambda role, n: drawn(role, n) if role == wanted else None

    clean = torch.softmax(q @ kv.mT / D**0.5, -1)
    for role in ("k", "v"):
        seen: list[Taken] = []
        with AttentionTap() as tap:
            tap.expect(layer((0, 0, 0, 0)), q[:, 0], factors=only(role), show=seen.append)
            eager(q, kv, kv)
        (taken,) = seen
        by = by_head("k" if role == "k" else "v", K)
        assert taken.z is not None
        if role == "k":
            torch.testing.assert_close(taken.pattern, torch.softmax(q @ (kv * by).mT / D**0.5, -1))
            torch.testing.assert_close(taken.z, taken.pattern @ kv)
        else:
            assert torch.equal(taken.pattern, clean)
            torch.testing.assert_close(taken.z, clean @ (kv * by))


@ATTENTIONS
def test_what_an_outer_tap_writes_an_inner_one_sees(attention: Attention) -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    shown: dict[str, Taken] = {}
    with AttentionTap() as outer:
        outer.expect(layer(), q[:, 0], factors=drawn, show=lambda t: shown.update(outer=t))
        with AttentionTap() as inner:
            inner.expect(layer(), q[:, 0], show=lambda t: shown.update(inner=t))
            attention(q, k, v)
    f_q, f_k, f_v = by_head("q", Q), by_head("k", K), by_head("v", K)
    for at, by in (("q", f_q), ("k", f_k), ("v", f_v)):
        torch.testing.assert_close(getattr(shown["inner"], at), getattr(shown["outer"], at) * by)
    torch.testing.assert_close(shown["inner"].pattern, shown["outer"].pattern)
    assert not torch.allclose(shown["inner"].pattern, torch.softmax(q @ k.mT / D**0.5, -1))


def test_the_product_is_counted_from_the_anchor() -> None:
    """A product of the very same shape before the scores' is left alone."""
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    with AttentionTap() as tap:
        tap.expect(layer(product=2), q[:, 0], factors=drawn)
        before = q @ k.mT
        noisy = eager(q, k, v)
    assert torch.equal(before, q @ k.mT)
    assert not torch.allclose(noisy, eager(q, k, v))


def test_noise_that_would_not_be_written_is_an_error() -> None:
    """Another product than the self-check saw, no attention at all, another thread."""
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    wrong = "layer 0: wanted the attention that the self-check saw after blocks.0.attn.hook_in"

    def run(*, product: int = 1, times: int = 1, attends: bool = False) -> None:
        with AttentionTap() as tap:
            for _ in range(times):
                tap.expect(layer(product=product), q[:, 0], factors=drawn)
            if attends:
                eager(q, k, v)

    with pytest.raises(RuntimeError, match=f"{wrong}; got another product"):
        run(product=2, attends=True)
    with pytest.raises(RuntimeError, match=f"{wrong}; got none"):
        run()
    with pytest.raises(RuntimeError, match=f"{wrong}; got none"):
        run(times=2, attends=True)
    tap = AttentionTap()
    said: list[str] = []

    def elsewhere() -> None:
        try:
            tap.expect(layer(), q[:, 0], factors=drawn)
        except RuntimeError as error:
            said.append(str(error))

    with tap:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "in the thread that opened the noise's context" in said[0]


def test_a_pass_that_is_broken_off_leaves_nothing() -> None:
    q, k, v = vectors(0, B, H, Q, D), vectors(1, B, H, K, D), vectors(2, B, H, K, D)
    clean = eager(q, k, v)
    tap = AttentionTap()

    def broken() -> None:
        with tap:
            tap.expect(layer(), q[:, 0], factors=drawn)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with tap:
        assert torch.equal(eager(q, k, v), clean)
        tap.expect(layer(), q[:, 0], factors=drawn)
        tap.reset()
        assert torch.equal(eager(q, k, v), clean)
