"""The twelve theorems of Menary et al. 2024 (arXiv 2406.17837), calculated on our models.

Theorems 1-3 as constructed examples and counterexamples, 4-8 as derivatives and limits, 9-12 as
identities. Everything runs in float64, on the attention blocks of `QKVNormTransformer`, with the
paper's scores w = q.k (no 1/sqrt(d)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.functional import jacobian, jvp

from hooks.noise.probability import critical_half_width
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer

PLACEMENTS = ("none", "pre", "qkv")
Edit = Callable[[torch.Tensor], torch.Tensor]
F64 = torch.float64


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make_block(placement: str, *, seed: int = 0, size: float = 0.6, **options: Any) -> Any:
    """One attention block with random weights and gains: two heads, scores w = q.k."""
    sizes = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 32, "d_vocab": 5}
    cfg = QKVNormConfig(
        placement=placement,
        score_scale="none",
        eps=1e-30,
        dtype=F64,
        positional_embedding_type="none",
        attn_only=True,
        **{**sizes, **options},
    )
    block = QKVNormTransformer(cfg).eval().layers[0]
    with torch.no_grad():
        for i, (name, p) in enumerate(block.named_parameters()):
            centre = 1.0 if "gain" in name or "norm" in name else 0.0
            p.copy_(centre + (0.2 if centre else size) * rand(*p.shape, seed=100 * seed + i))
    return block.requires_grad_(False)


@dataclasses.dataclass
class Seen:
    """What happened inside one attention, [head, ...], batch left away."""

    q: torch.Tensor
    k: torch.Tensor
    m: torch.Tensor  # messages W_O v_t, [head, key, d_model]
    scores: torch.Tensor
    pattern: torch.Tensor
    out: torch.Tensor


def attend(block: Any, x: torch.Tensor, *, causal: bool = True, **edits: Edit) -> Seen:
    """Run a block's norm and attention on x [pos, d_model], with edits of q, k, v or scores.

    `edits` see the vectors that enter the dot product, or are averaged, as [pos, head, d_head].
    """
    attn, kept = block.attn, {}

    def at(site: str) -> Callable[..., torch.Tensor]:
        def hook(module: Any, args: Any, value: torch.Tensor) -> torch.Tensor:
            heads = value.reshape(1, len(x), attn.n_heads, attn.d_head)
            kept[site] = edits[site](heads[0])[None] if site in edits else heads
            return kept[site].reshape(value.shape)

        return hook

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        name = name.removeprefix("hook_attn_").removeprefix("hook_")
        kept[name] = edits[name](value[0])[None] if name in edits else value
        return kept[name]

    modules = {
        s: getattr(attn, f"{s}_norm") if s in attn.normed else getattr(attn, s) for s in "qkv"
    }
    handles = [m.register_forward_hook(at(s)) for s, m in modules.items()]
    seen = torch.ones(len(x), len(x), dtype=torch.bool)
    try:
        out = attn(
            block.ln1(x[None]), visible=(seen.tril() if causal else seen)[None, None], tap=tap
        )
    finally:
        for handle in handles:
            handle.remove()
    w_o = attn.o.weight.unflatten(1, (attn.n_heads, attn.d_head))
    m = torch.einsum("thd,nhd->htn", kept["v"][0], w_o)
    q, k = (kept[site][0].transpose(0, 1) for site in "qk")
    return Seen(q, k, m, kept["scores"][0], kept["pattern"][0], out[0])


def even(*shape: int, seed: int) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# --- theorems 1-3: which subspaces two heads can read apart ------------------------------------

T, DIM = 7, 3  # tokens, and dimensions of each of the two subspaces A and B


def two_readers(placement: str, basis: torch.Tensor, **options: Any) -> Any:
    """Head 0 reads the coordinates in A (the basis's first columns), head 1 those in B."""
    block = make_block(placement, d_model=len(basis), d_head=DIM, **options)
    dual = torch.linalg.pinv(basis)
    for i, site in enumerate("qkv"):
        read = torch.block_diag(rand(DIM, DIM, seed=40 + i), rand(DIM, DIM, seed=50 + i)) @ dual
        gain = getattr(getattr(block.attn, f"{site}_gain"), "weight", torch.ones(1, dtype=F64))
        getattr(block.attn, site).weight.copy_(read / gain)
    return block


def independent_basis(dim: int = 2 * DIM) -> torch.Tensor:
    basis = rand(dim, 2 * DIM, seed=7) + 2 * torch.eye(dim, 2 * DIM, dtype=F64)
    a, b = basis[:, :DIM], basis[:, DIM:]
    assert (a.T @ b).abs().max() > 0.5  # independent, and far from orthogonal
    return basis


def orthogonal_basis(dim: int = 2 * DIM, *, mean_free: bool = False) -> torch.Tensor:
    start = rand(dim, 2 * DIM, seed=8)
    if mean_free:
        start = start - start.mean(0)
    q: torch.Tensor = torch.linalg.qr(start)[0]
    return q


def points(*, spheres: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates in A, and two choices of those in B; on spheres of radius 2 and 3 or anywhere."""
    a, b, other = (rand(T, DIM, seed=3 * seed + i) for i in (60, 61, 62))
    return (2 * unit(a), 3 * unit(b), 3 * unit(other)) if spheres else (a, b, other)


def stream(basis: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat((a, b), 1) @ basis.T


def test_theorem_1_no_norm_separates_linearly_independent_subspaces() -> None:
    """Theorem 1: W_QK is of low rank, and its null spaces hold everything not attended to."""
    basis = independent_basis()
    block = two_readers("none", basis)
    a, b, other = points(spheres=False)
    one, two = (attend(block, stream(basis, a, x)) for x in (b, other))
    assert same(one.scores[0].tril(), two.scores[0].tril())
    assert same(one.pattern[0], two.pattern[0])
    assert far(one.pattern[1], two.pattern[1])
    w_q, w_k = (getattr(block.attn, s).weight.unflatten(0, (2, DIM))[0] for s in "qk")
    w_qk = w_q.T @ w_k
    assert torch.linalg.matrix_rank(w_qk) == DIM < len(w_qk)
    for null in (w_qk @ basis[:, DIM:], w_qk.T @ basis[:, DIM:]):
        assert null.abs().max() < 1e-12
    assert (w_qk @ basis[:, :DIM]).abs().max() > 0.1


def test_theorem_1_no_norm_cannot_separate_dependent_subspaces() -> None:
    """Theorem 1, necessity: a head blind to B is blind to what A shares with B."""
    basis = independent_basis()
    basis[:, DIM] = basis[:, 0]  # the first directions of A and B coincide
    a, b, other = points(spheres=False)
    move = torch.zeros_like(a)
    move[:, 0] = rand(T, seed=1)
    x, b_moved, a_moved = stream(basis, a, b), stream(basis, a, other), stream(basis, a + move, b)
    not_b = torch.linalg.svd(basis[:, DIM:])[0][:, DIM:].T  # rows that B does not reach
    blind, reader = (
        make_block("none", d_model=6, d_head=DIM),
        make_block("none", d_model=6, d_head=DIM),
    )
    for i, site in enumerate("qk"):
        mixed = rand(2 * DIM, DIM, seed=70 + i)
        getattr(blind.attn, site).weight.copy_(mixed @ not_b)
        getattr(reader.attn, site).weight.copy_(mixed @ torch.linalg.pinv(basis[:, :DIM]))
    clean = attend(blind, x).pattern
    assert same(attend(blind, b_moved).pattern, clean)
    assert same(attend(blind, a_moved).pattern, clean)
    assert far(attend(blind, stream(basis, other, b)).pattern, clean)  # the rest of A it does see
    clean = attend(reader, x).pattern
    assert far(attend(reader, a_moved).pattern, clean)
    assert far(attend(reader, b_moved).pattern, clean)


def test_theorem_2_pre_norm_interferes_by_one_factor_on_linear_subspaces() -> None:
    """Theorem 2: a change in B scales head A's scores by (|x| |y_t|) / (|x'| |y'_t|)."""
    basis = orthogonal_basis()
    block = two_readers("pre", basis)
    a, b, other = points(spheres=False)
    x, changed = stream(basis, a, b), stream(basis, a, other)
    one, two = attend(block, x, causal=False), attend(block, changed, causal=False)
    shrink = x.norm(dim=1) / changed.norm(dim=1)
    assert far(shrink, torch.ones(T, dtype=F64))
    assert same(two.scores[0], one.scores[0] * shrink[:, None] * shrink)
    assert far(one.pattern[0], two.pattern[0])
    # the receiver alone: one factor common to all other tokens, a temperature
    receiver = x.clone()
    receiver[-1] = changed[-1]
    ratio = (attend(block, receiver).scores / one.scores)[0, -1, :-1]
    assert same(ratio, shrink[-1].expand(T - 1))
    # an attended sender alone: its factor can move the arg max
    w = one.scores[0]
    second = w.topk(2, 1)
    usable = (second.values > 0).all(1) & (second.indices[:, 0] != torch.arange(T))
    row = int(usable.nonzero()[0])
    best = int(w[row].argmax())
    loud = b.clone()
    loud[best] *= 100
    moved = attend(block, stream(basis, a, loud), causal=False).scores[0, row]
    assert int(moved.argmax()) == int(second.indices[row, 1])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("orthogonal", "spheres"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_theorem_2_pre_norm_wants_mutually_orthogonal_spheres(
    kind: str, orthogonal: bool, spheres: bool
) -> None:
    """Theorem 2: orthogonal spheres do not interfere; less than that does.

    LayerNorm takes one more dimension, the mean's.
    """
    dim = 2 * DIM + (kind == "layer")
    basis = orthogonal_basis(dim, mean_free=kind == "layer")
    if not orthogonal:
        basis = basis @ independent_basis()
    block = two_readers("pre", basis, norm=NormSpec(kind, "input"))
    a, b, other = points(spheres=spheres)
    means = (kind == "layer") * rand(2, T, 1, seed=5)  # LayerNorm lets it be anything
    one, two = (
        attend(block, stream(basis, a, x) + mean) for x, mean in zip((b, other), means, strict=True)
    )
    assert same(one.pattern[0], two.pattern[0]) == (orthogonal and spheres)
    assert far(one.pattern[0], two.pattern[0]) != (orthogonal and spheres)
    assert far(one.pattern[1], two.pattern[1])


def test_theorem_2_orthogonality_holds_behind_constant_offsets() -> None:
    """Theorem 2: x_A = (2, cos a, sin a, 0, 0), x_B = (3, 0, 0, cos b, sin b) do not interfere."""

    def circles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(a)
        x_a = torch.stack((zero + 2, a.cos(), a.sin(), zero, zero), 1)
        x_b = torch.stack((zero + 3, zero, zero, b.cos(), b.sin()), 1)
        assert same((x_a * x_b).sum(1), zero + 6)
        return x_a + x_b

    block = make_block("pre", d_model=5, d_head=3)
    keep = torch.zeros(2, 3, 5, dtype=F64)
    keep[0, :, :3] = keep[1, :, 0::3] = keep[1, :, 4] = 1  # head 0 sees offset and A, head 1 and B
    for site in "qk":
        getattr(block.attn, site).weight.mul_(keep.flatten(0, 1))
    a, b, other = (3 * rand(T, seed=i) for i in (1, 2, 3))
    clean = attend(block, circles(a, b)).pattern
    changed = attend(block, circles(a, other)).pattern
    assert same(changed[0], clean[0])
    assert far(changed[1], clean[1])
    changed = attend(block, circles(other, b)).pattern
    assert far(changed[0], clean[0])
    assert same(changed[1], clean[1])
    off = circles(a, b)  # off the circle the norm comes back as a factor
    off[:, 3:] *= rand(T, 1, seed=4).exp()
    assert far(attend(block, off).pattern[0], clean[0])


def test_theorem_3_qkv_norm_separates_linearly_independent_subspaces() -> None:
    """Theorem 3: linear independence suffices; each subspace's own length is what is lost."""
    basis = independent_basis()
    block = two_readers("qkv", basis)
    a, b, other = points(spheres=False)
    clean = attend(block, stream(basis, a, b))
    changed = attend(block, stream(basis, a, 5 * other))
    for name in ("scores", "pattern", "m"):
        one, two = getattr(clean, name)[0], getattr(changed, name)[0]
        finite = one.isfinite()
        assert same(one[finite], two[finite])
    assert far(changed.pattern[1], clean.pattern[1])
    length = rand(T, 1, seed=5).exp()
    assert same(attend(block, stream(basis, length * a, b)).pattern, clean.pattern)
    assert far(attend(block, stream(basis, a.roll(1, 1), b)).pattern[0], clean.pattern[0])


@pytest.mark.parametrize(
    ("placement", "kind", "lost"),
    [("none", "", 0), ("pre", "rms", 2), ("pre", "layer", 3), ("qkv", "", 2)],
)
def test_theorem_3_degrees_of_freedom_that_can_be_attended_to(
    placement: str, kind: str, lost: int
) -> None:
    """Theorems 1-3: N, N - N_s, N - N_s - 1, N - N_s of N, for N_s = 2 subspaces.

    Measured as the rank of the keys as a function of the free coordinates.
    """
    n = 2 * DIM + (kind == "layer")
    norm = NormSpec(kind, "input") if placement == "pre" else None
    basis = orthogonal_basis(n, mean_free=kind == "layer")
    block = two_readers(placement, basis, norm=norm)

    def keys(free: torch.Tensor) -> torch.Tensor:
        a, b = free[: 2 * DIM].chunk(2)
        if placement == "pre":  # the subspaces that do not interfere there
            a, b = unit(a), unit(b)
        mean = free[2 * DIM :].sum()  # the dimension that LayerNorm takes away
        return attend(block, stream(basis, a[None], b[None]) + mean).k.flatten()

    found = torch.linalg.matrix_rank(jacobian(keys, rand(n, seed=9)), rtol=1e-9)
    assert found == n - lost


# --- theorems 4-6: first-order noise on q, k, m, and its two limits ------------------------------


def moved_by(block: Any, x: torch.Tensor, site: str, e: torch.Tensor) -> torch.Tensor:
    """The derivative of the attention's output along noise e [pos, head, d_head] on q, k or v."""

    def out(noise: torch.Tensor) -> torch.Tensor:
        return attend(block, x, **{site: lambda value: value + noise}).out

    derivative: torch.Tensor = jvp(out, torch.zeros_like(e), e)[1]
    return derivative


def first_order(block: Any, seen: Seen, site: str, e: torch.Tensor) -> torch.Tensor:
    """Theorem 4, summed over heads; E is the mean under a."""
    a, e = seen.pattern, e.transpose(0, 1)
    mean_k, mean_m = a @ seen.k, a @ seen.m
    if site == "q":  # E[m k~^T] e_q
        k = seen.k[:, None] - mean_k[:, :, None]
        return torch.einsum("hrt,htn,hrtd,hrd->rn", a, seen.m, k, e)
    if site == "k":  # E[m~ e_k^T] q
        m = seen.m[:, None] - mean_m[:, :, None]
        return torch.einsum("hrt,hrtn,htd,hrd->rn", a, m, e, seen.q)
    e_m = torch.einsum("htd,nhd->htn", e, block.attn.o.weight.unflatten(1, (2, -1)))
    return (a @ e_m).sum(0)  # E[e_m]


@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_4_first_order_noise(placement: str, site: str) -> None:
    """Theorem 4: E[m k~^T] e_q, E[m~ e_k^T] q, E[e_m]."""
    block = make_block(placement)
    x, e = rand(T, 8, seed=1), rand(T, 2, 4, seed=2)
    wanted = first_order(block, attend(block, x), site, e)
    assert wanted.abs().max() > 0.1
    assert same(moved_by(block, x, site, e), wanted)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_5_sparse_limit(placement: str) -> None:
    """Theorem 5: towards one-hot attention, noise on q and k dies out; that on m is the token's."""
    block = make_block(placement)
    x, e = rand(T, 8, seed=1), rand(T, 2, 4, seed=2)
    gains = block.attn.q_norm if placement == "qkv" else block.attn.q
    sizes: dict[str, list[float]] = {"q": [], "k": [], "v": []}
    start = gains.weight.clone()
    for inverse_temperature in (1, 100, 10_000):
        gains.weight.copy_(start * inverse_temperature)
        seen = attend(block, x)
        w_o = block.attn.o.weight.unflatten(1, (2, 4))
        e_m = torch.einsum("thd,nhd->htn", e, w_o)
        attended = e_m.gather(1, seen.scores.argmax(-1)[..., None].expand(-1, -1, 8)).sum(0)
        for site, limit in (("q", 0 * attended), ("k", 0 * attended), ("v", attended)):
            off = (moved_by(block, x, site, e) - limit).abs().amax(1)
            sizes[site].append(float(off[1:].max()))  # row 0 has one key, and is always one-hot
    assert seen.pattern.amax(-1).min() > 1 - 1e-9
    for site in "qkv":
        assert sizes[site][0] > 0.05, site
        assert sizes[site][-1] < 1e-6, site


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_6_isotropic_limit(placement: str) -> None:
    """Theorem 6: <m k~^T> e_q, <m~ e_k^T> q and <e_m>, plain means over the visible tokens."""
    block = make_block(placement)
    half = torch.tensor([1.0, 1, 0, 0] * 2, dtype=F64)[:, None]
    block.attn.q.weight.mul_(half)  # queries and keys in orthogonal halves: every score is zero
    block.attn.k.weight.mul_(1 - half)
    x, e = rand(T, 8, seed=1), rand(T, 2, 4, seed=2)
    seen = attend(block, x)
    n = torch.arange(1, T + 1, dtype=F64)
    assert same(seen.pattern, (1 / n)[:, None].expand(T, T).tril().expand(2, T, T))
    e_h, w_o = e.transpose(0, 1), block.attn.o.weight.unflatten(1, (2, 4))
    e_m = torch.einsum("htd,nhd->htn", e_h, w_o)
    for site in "qkv":
        rows = []
        for r in range(T):
            k, m = seen.k[:, : r + 1], seen.m[:, : r + 1]
            if site == "q":
                row = (m.mT @ (k - k.mean(1, keepdim=True)) / (r + 1)) @ e_h[:, r, :, None]
            elif site == "k":
                m_off = m - m.mean(1, keepdim=True)
                row = (m_off.mT @ e_h[:, : r + 1] / (r + 1)) @ seen.q[:, r, :, None]
            else:
                row = e_m[:, : r + 1].mean(1)[..., None]
            rows.append(row.sum(0)[:, 0])
        wanted = torch.stack(rows)
        assert wanted[1:].abs().max() > 0.05, site
        assert same(moved_by(block, x, site, e), wanted), site


# --- theorems 7 and 8: multiplicative noise ------------------------------------------------------


def times(kappa: torch.Tensor) -> Edit:
    """Scale vectors [pos, head, d_head] by 1 + kappa [pos, head]."""
    return lambda value: value * (1 + kappa[..., None])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_7_collapse_condition(placement: str) -> None:
    """Theorem 7: collapse iff some t has w*/w_t < (1+kq+k_t)/(1+kq+k_*), by brute force.

    Exactly the factors are (1+kq)(1+k_t); the theorem's sum is their first order, so it is held to
    the rows whose margin is more than second order.
    """
    block = make_block(placement, size=1.5)
    if placement == "qkv":
        block.attn.q_norm.weight.mul_(5)  # unit gains give |w| <= 4, which is never sparse
    noise, n_moved, n_sparse, n_checked = 0.1, 0, 0, 0
    for seed in range(40):
        x, (k_q, k_k) = rand(12, 8, seed=seed), noise * even(2, 12, 2, seed=seed)
        clean = attend(block, x, causal=False)
        noisy = attend(block, x, causal=False, q=times(k_q), k=times(k_k)).scores
        star = clean.scores.argmax(-1, keepdim=True)
        moved = noisy.argmax(-1, keepdim=True) != star
        w, w_star = clean.scores, clean.scores.gather(-1, star)
        f_q, f_k = k_q.T[:, :, None], k_k.T[:, None, :].expand_as(w)
        f_star = f_k.gather(-1, star)
        sign = (w * (1 + f_q + f_star)).sign()  # of the comparison
        margin = sign * ((1 + f_q + f_k) / (1 + f_q + f_star) - w_star / w)
        exact = sign * ((1 + f_k) / (1 + f_star) - w_star / w)
        for which in (margin, exact):
            which.scatter_(-1, star, -math.inf)
        assert torch.equal((exact > 0).any(-1, keepdim=True), moved)
        clear = (margin.amax(-1, keepdim=True)).abs() > 4 * noise**2
        assert torch.equal((margin > 0).any(-1, keepdim=True)[clear], moved[clear])
        n_checked += int(clear.sum())
        n_moved += int(moved[clear].sum())
        n_sparse += int((clean.pattern.amax(-1, keepdim=True) > 0.95)[clear].sum())
        # and no row moves below its critical half-width
        others = torch.ones_like(w, dtype=torch.bool).scatter_(-1, star, False)
        rows = w[others].reshape(-1, 11)
        a = critical_half_width(w_star.flatten(), rows).amin(1).reshape(moved.shape)
        assert not moved[a > noise].any()
    assert n_moved > 20, n_moved
    assert n_sparse > 100, n_sparse
    assert n_moved < n_checked / 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_7_query_noise_alone_never_collapses(placement: str) -> None:
    """Theorem 7: with k_t = 0 the condition is w* < w_t."""
    block = make_block(placement, size=1.5)
    x = rand(12, 8, seed=0)
    clean, k_q = attend(block, x), 4 + 4.99 * even(12, 2, seed=3)
    noisy = attend(block, x, q=times(k_q))
    assert far(noisy.pattern, clean.pattern)
    assert torch.equal(noisy.scores.argmax(-1), clean.scores.argmax(-1))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_8_isotropic_key_noise(placement: str) -> None:
    """Theorem 8: the output moves by w <m~_t k_t>; by nothing in three cases."""
    block = make_block(placement, attn_bias=True)
    block.attn.k.weight.zero_()  # all keys alike: isotropic, with w != 0
    block.attn.o.bias.zero_()
    x, kappa = rand(12, 8, seed=1), rand(12, 2, seed=2)

    def moved(kappa: torch.Tensor) -> torch.Tensor:
        noise = attend(block, x, causal=False).k.transpose(0, 1) * kappa[..., None]

        def out(size: torch.Tensor) -> torch.Tensor:
            return attend(block, x, causal=False, k=lambda value: value + size * noise).out

        derivative: torch.Tensor = jvp(out, torch.zeros((), dtype=F64), torch.ones((), dtype=F64))[
            1
        ]
        return derivative

    seen = attend(block, x, causal=False)
    assert same(seen.pattern, torch.full((2, 12, 12), 1 / 12, dtype=F64))
    w, m_off = seen.scores[:, :, 0], seen.m - seen.m.mean(1, keepdim=True)
    wanted = torch.einsum("hr,htn,th->rn", w, m_off, kappa) / 12
    assert wanted.abs().max() > 0.05
    assert same(moved(kappa), wanted)
    nothing = torch.zeros(12, 8, dtype=F64)
    assert same(moved(torch.full((12, 2), 0.3, dtype=F64)), nothing)  # the same for all t
    independent = torch.stack([torch.linalg.svd(m.T)[2][-1] for m in m_off], 1)
    assert independent.abs().max() > 0.1
    assert same(moved(independent), nothing)  # <m~ k> = 0
    block.attn.q.weight.zero_()
    block.attn.q.bias.zero_()
    assert same(moved(kappa), nothing)  # q = 0


# --- theorems 9-12: identities -------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_9_softmax_ignores_a_constant_shift(placement: str) -> None:
    """Theorem 9: w_t + c gives the same attention; c_t does not."""
    block, x = make_block(placement), rand(T, 8, seed=1)
    clean, shift = attend(block, x), 5 * rand(2, T, T, seed=2)
    shifted = attend(block, x, scores=lambda w: w + shift[..., :1])
    assert same(shifted.out, clean.out)
    assert far(attend(block, x, scores=lambda w: w + shift).out, clean.out)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("where", ["scores", "q", "k"])
def test_theorem_10_scaling_scores_is_an_inverse_temperature(placement: str, where: str) -> None:
    """Theorem 10: b w gives a_t^b / sum a^b, whether the factor is on w, on q or on all k."""
    block, x = make_block(placement), rand(T, 8, seed=1)
    clean = attend(block, x).pattern
    for b in (0.25, 3.0):
        scaled = attend(block, x, **{where: lambda value, b=b: value * b}).pattern
        assert same(scaled, clean**b / (clean**b).sum(-1, keepdim=True))
        assert far(scaled, clean)


def test_theorem_11_no_norm_scores_are_an_inner_product() -> None:
    """Theorem 11: w_t = y_t . (W_QK^T x) for No-Norm; a norm makes it fail on the raw x."""
    x = rand(T, 8, seed=1)
    for placement in PLACEMENTS:
        block = make_block(placement)
        w_q, w_k = (getattr(block.attn, s).weight.unflatten(0, (2, 4)) for s in "qk")
        w_qk = w_q.mT @ w_k  # w = x^T W_QK y
        wanted = (w_qk.mT @ x.T).mT @ x.T
        scores = attend(block, x, causal=False).scores
        assert same(scores, wanted) == (placement == "none")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_theorem_12_biases_can_be_absorbed(placement: str) -> None:
    """Theorem 12: softmax removes the key's bias; the query's is a constant direction of x.

    Behind QKV-Norm's norm the key's bias is no constant shift, but is absorbed the same way. Under
    Pre-Norm the direction is constant behind the norm where all |x| are equal.
    """
    x = rand(T, 8, seed=1)
    x[:, -1] = 0.0
    x = 2 * unit(x)
    x[:, -1] = 1.5  # the constant direction, |x| = 2.5
    block = make_block(placement, attn_bias=True)
    scale = 1.5 * math.sqrt(8) / 2.5 if placement == "pre" else 1.5
    clean = attend(block, x).pattern
    without_k = make_block(placement, attn_bias=True)
    without_k.attn.k.bias.zero_()
    removed = attend(without_k, x).pattern
    assert same(removed, clean) == (placement != "qkv")
    absorbed = make_block(placement, attn_bias=True)
    for site in "qk" if placement == "qkv" else "q":
        part = getattr(absorbed.attn, site)
        gain = getattr(absorbed.attn, f"{site}_gain").weight[-1] if placement == "pre" else 1.0
        part.weight[:, -1] += part.bias / (scale * gain)
        part.bias.zero_()
    if placement != "qkv":
        absorbed.attn.k.bias.zero_()
    assert same(attend(absorbed, x).pattern, clean)
    without_q = make_block(placement, attn_bias=True)
    without_q.attn.q.bias.zero_()
    assert far(attend(without_q, x).pattern, clean)
