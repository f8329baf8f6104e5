"""Attention blocks of ours with hand-set weights, and what happens inside them.

A stream is made of subspaces of three dimensions: x = basis (a, b, ..), and head i reads the
coordinates in the i-th. Scores are w = q.k (no 1/sqrt(d)), in float64, with a norm's eps of zero in
effect. Menary et al. 2024 (arXiv 2406.17837), Section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from qkvnorm_lens.models import Block, Norm, NormSpec, QKVNormConfig, QKVNormTransformer

DIM: Final = 3  # of a subspace
OVERLAP: Final = 0.7  # cosine-like overlap of neighbouring independent subspaces
F64: Final = torch.float64
Edit = Callable[[Tensor], Tensor]


def new_block(
    placement: str, *, d_model: int, d_head: int = DIM, n_heads: int = 1, kind: str = "rms"
) -> Block:
    """A block with attention only; its weights are to be set.

    Args:
        placement: ``"none"``, ``"pre"`` or ``"qkv"``.
        d_model, d_head, n_heads: sizes.
        kind: Pre-Norm's norm, ``"rms"`` or ``"layer"``.
    """
    cfg = QKVNormConfig(
        placement=placement,
        norm=NormSpec(kind, "input") if placement == "pre" else None,
        score_scale="none",
        eps=1e-30,
        dtype=F64,
        positional_embedding_type="none",
        attn_only=True,
        n_layers=1,
        n_ctx=64,
        d_vocab=2,
        d_model=d_model,
        d_head=d_head,
        n_heads=n_heads,
        seed=0,
    )
    made = QKVNormTransformer(cfg).eval().layers[0]
    assert isinstance(made, Block)
    return made.requires_grad_(False)


def set_weights(block: Block, **weights: Tensor) -> None:
    """Set W_Q, W_K, W_V (``q``, ``k``, ``v``) and W_O (``o``), as ``[out, in]``."""
    for site, weight in weights.items():
        getattr(block.attn, site).weight.copy_(weight)


def scale_queries(block: Block, factor: float | Tensor) -> None:
    """Multiply the queries that enter the dot product, by a number or by one for each dimension."""
    factor = torch.as_tensor(factor, dtype=F64)
    norm = block.attn.q_norm
    if isinstance(norm, Norm):  # a factor before it would be taken away
        assert norm.weight is not None
        norm.weight.mul_(factor)
    else:
        block.attn.q.weight.mul_(factor[..., None])


@dataclass(frozen=True)
class Seen:
    """What happened inside one attention: vectors that enter the dot product, messages W_O v."""

    q: Float[Tensor, "batch head pos d_head"]
    k: Float[Tensor, "batch head pos d_head"]
    m: Float[Tensor, "batch head pos d_model"]
    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    out: Float[Tensor, "batch pos d_model"]

    @property
    def row(self) -> Float[Tensor, "batch head key"]:
        """Scores of the last token, which sees all those before it."""
        return self.scores[:, :, -1, :-1]

    @property
    def attention(self) -> Float[Tensor, "batch head key"]:
        """Attention of the last token."""
        return self.pattern[:, :, -1, :-1]


def attend(block: Block, x: Float[Tensor, "batch pos d_model"], **edits: Edit) -> Seen:
    """Run a block's norm and attention; a token sees those before it, and not itself.

    Args:
        block: of :func:`new_block`.
        x: the stream at its input.
        **edits: functions of q, k or v (the vectors that enter the dot product, or are averaged) as
            ``[batch, pos, head, d_head]``.
    """
    attn, kept = block.attn, dict[str, Tensor]()

    def at(site: str) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, value: Tensor) -> Tensor:
            heads = value.reshape(*x.shape[:2], attn.n_heads, attn.d_head)
            kept[site] = edits[site](heads) if site in edits else heads
            return kept[site].reshape(value.shape)

        return hook

    def tap(name: str, value: Tensor) -> Tensor:
        kept[name] = value
        return value

    modules = {
        s: getattr(attn, f"{s}_norm") if s in attn.normed else getattr(attn, s) for s in "qkv"
    }
    handles = [m.register_forward_hook(at(site)) for site, m in modules.items()]
    n = x.shape[1]
    try:
        earlier = torch.ones(n, n, dtype=torch.bool).tril(-1)[None, None]
        out = attn(block.ln1(x), visible=earlier, tap=tap)
    finally:
        for handle in handles:
            handle.remove()
    w_o = attn.o.weight.unflatten(1, (attn.n_heads, attn.d_head))
    q, k = (kept[site].transpose(1, 2) for site in "qk")
    m = torch.einsum("bthd,nhd->bhtn", kept["v"], w_o)
    return Seen(q, k, m, kept["hook_attn_scores"], kept["hook_pattern"], out)


# -- subspaces ------------------------------------------------------------------------------


def independent_basis(n: int = 2) -> Float[Tensor, "d_model d_model"]:
    """Bases of n linearly independent subspaces, side by side: neighbours are not orthogonal."""
    basis = torch.eye(n * DIM, dtype=F64)
    for i in range(1, n):
        basis[(i - 1) * DIM : i * DIM, i * DIM : (i + 1) * DIM] = OVERLAP * torch.eye(
            DIM, dtype=F64
        )
    return basis


def orthogonal_basis(n: int = 2, *, mean_free: bool = False) -> Float[Tensor, "d_model d"]:
    """Orthonormal bases of n mutually orthogonal subspaces.

    ``mean_free``: orthogonal to (1, .., 1) too, in one dimension more, as LayerNorm wants it.
    """
    start = torch.eye(n * DIM + mean_free, n * DIM, dtype=F64)
    if not mean_free:
        return start
    basis: Tensor = torch.linalg.qr(start - start.mean(0))[0]
    return basis


def readers(placement: str, basis: Float[Tensor, "d_model d"], kind: str = "rms") -> Block:
    """A block whose head i reads the coordinates in the i-th subspace, for q, k and v alike."""
    d_model, width = basis.shape
    block = new_block(placement, d_model=d_model, n_heads=width // DIM, kind=kind)
    read = torch.linalg.pinv(basis)
    set_weights(block, q=read, k=read, v=read, o=basis)
    return block


def stream(
    basis: Float[Tensor, "d_model d"], *coordinates: Float[Tensor, "*batch pos dim"]
) -> Float[Tensor, "*batch pos d_model"]:
    """x = basis (a, b, ..): tokens from their coordinates in each subspace."""
    return torch.cat(coordinates, -1) @ basis.T


def unit(x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Vectors of length one."""
    out: Tensor = x / x.norm(dim=-1, keepdim=True)
    return out


def tokens(*rows: tuple[float | int, ...]) -> Float[Tensor, "pos 3"]:
    """Coordinates of tokens in one subspace."""
    return torch.tensor(rows, dtype=F64)


def rand(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def even(*shape: int, seed: int) -> Tensor:
    """Uniform in [-sqrt 3, sqrt 3]: noise of RMS one."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (2 * u - 1) * 3**0.5


def bisect(test: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a test turns from false (at ``low``) to true (at ``high``), elementwise.

    Raises:
        ValueError: a test that is not false at ``low`` and true at ``high``.
    """
    if bool(test(low).any()) or not bool(test(high).all()):
        raise ValueError("bisect: wanted a test that is false at low and true at high")
    for _ in range(50):
        middle = (low + high) / 2
        beyond = test(middle)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return high
