"""Random Markov attention: its spectrum, and what it does to signals and gradients.

A row-stochastic matrix has the singular value 1 or more; where the rest are near 0, as in random
ones without a mask, tokens become alike in one layer. Everything here is float64, on the CPU, and
a function of its seed. Source: Naderi et al. 2024 (arXiv 2410.07799).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Matrix = Float[Tensor, "token key"]
Stream = Float[Tensor, "token width"]
AttentionKind = Literal["markov", "softmax"]

VARIANCE: Final = math.log(2)
"""Of the scores, whose mean is minus half of it: exp of them has mean 1 and variance 1."""
EPS: Final = 1e-5  # of LayerNorm: a row of zeros stays one


def random_markov(n_tokens: int, *, seed: int, causal: bool = False) -> Matrix:
    """A = D / row sums, D_ij = exp(N(-ln2/2, ln2)) with mean 1 and variance 1.

    Without a mask s_1 is near 1 and s_2 near 2/sqrt(T), for large T. Naderi et al. 2024.

    Args:
        n_tokens: T.
        seed: of the entries.
        causal: keys behind a row's own position get nothing.

    Raises:
        ValueError: no token, or a seed that is no integer >= 0.
    """
    rng = _generator(n_tokens, seed)
    scores = math.sqrt(VARIANCE) * torch.randn(n_tokens, n_tokens, generator=rng, dtype=_WIDE)
    return _softmax(scores - VARIANCE / 2, causal=causal)


def uniform(n_tokens: int, *, causal: bool = False) -> Matrix:
    """U: equal weights over the keys that each row sees; (1/T) 1 1^T without a mask."""
    return _softmax(torch.zeros(n_tokens, n_tokens, dtype=_WIDE), causal=causal)


def random_softmax(
    x: Stream, *, seed: int, causal: bool = False, d_head: int | None = None
) -> Matrix:
    """softmax(c X W_Q (X W_K)^T / sqrt(d_head)), W_Q, W_K of N(0, 1/d) entries, c = sqrt(ln2).

    For orthogonal tokens of length sqrt(d) the scores' variance is that of `random_markov`; shorter
    tokens have smaller scores.

    Args:
        x: the tokens.
        seed: of W_Q and W_K.
        causal: keys behind a row's own position get nothing.
        d_head: columns of W_Q and W_K, on which the rank of the scores hangs; default: d.

    Raises:
        ValueError: tokens that are no matrix in float64, a d_head below 1, or a seed that is no
            integer >= 0.
    """
    if x.ndim != 2 or x.dtype != _WIDE:
        raise ValueError(f"x: wanted [token, width] in float64; got {list(x.shape)} in {x.dtype}")
    width = x.shape[1]
    d_head = width if d_head is None else d_head
    _check_integer("d_head", d_head, 1)
    rng = _generator(len(x), seed)
    w_q, w_k = torch.randn(2, width, d_head, generator=rng, dtype=_WIDE) / math.sqrt(width)
    scores = math.sqrt(VARIANCE / d_head) * (x @ w_q) @ (x @ w_k).T
    return _softmax(scores, causal=causal)


def stable_rank(x: Stream) -> float:
    """|S|_F^2 / |S|_2^2 of S = X X^T: sum of s_i^4 over s_1^4, for the singular values of X.

    1 where all tokens are multiples of one, T where they are orthogonal and equally long. Naderi
    et al. 2024.

    Raises:
        ValueError: X is zero or holds no finite number.
    """
    s = torch.linalg.svdvals(x)
    top = float(s[0])
    if not (math.isfinite(top) and top > 0):
        raise ValueError(f"x: wanted finite numbers that are not all zero; got s_1 = {top}")
    return float((s / top).pow(4).sum())


@dataclass(frozen=True, kw_only=True)
class Recursion:
    """X_{l+1} = N(X_l [skip] + gain (A_l - U [centred]) X_l W_l), W_l with N(0, 1/d) entries.

    N is the identity or LayerNorm of each token (mean off, length sqrt(d), no gain, eps 1e-5). The
    attention-only network of Naderi et al. 2024; LayerNorm and skip stand here as in the first
    transformers, behind the update and around it.

    Args:
        attention: A_l: ``"markov"``, a new random one in each layer; ``"softmax"`` of X_l with new
            random W_Q and W_K.
        causal: under a causal mask.
        centred: with the fix.
        norm: with LayerNorm.
        skip: with a skip connection.
        gain: of the update. What the fix leaves of a random Markov matrix has entries of variance
            1/T^2: sqrt(T) keeps the length of X. Not under a causal mask, where row i's have about
            1/i^2, so that no one number does.
    """

    attention: AttentionKind = "markov"
    causal: bool = False
    centred: bool = False
    norm: bool = False
    skip: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionKind):
            raise ValueError(
                f"attention: wanted one of {list(get_args(AttentionKind))}; got {self.attention!r}"
            )
        for name in ("causal", "centred", "norm", "skip"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: wanted True or False; got {value!r}")
        gain = self.gain
        number = isinstance(gain, Real) and not isinstance(gain, bool)
        if not (number and math.isfinite(gain) and gain > 0):
            raise ValueError(f"gain: wanted a number > 0; got {gain!r}")

    def step(self, x: Stream, weight: Float[Tensor, "width width"], *, seed: int) -> Stream:
        """One layer; ``seed`` is that of its attention."""
        if self.attention == "markov":
            a = random_markov(len(x), seed=seed, causal=self.causal)
        else:
            a = random_softmax(x, seed=seed, causal=self.causal)
        if self.centred:
            a = a - uniform(len(x), causal=self.causal)
        out: Stream = self.gain * a @ x @ weight
        out = x + out if self.skip else out
        return F.layer_norm(out, out.shape[1:], eps=EPS) if self.norm else out


@dataclass(frozen=True)
class Signal:
    """A forward pass.

    Attributes:
        states: X_0, ..., X_L.
        weights: W_0, ..., W_{L-1}: they require a gradient.
    """

    states: tuple[Stream, ...]
    weights: tuple[Float[Tensor, "width width"], ...]


def propagate(
    recursion: Recursion, n_tokens: int, depth: int, *, seed: int, width: int | None = None
) -> Signal:
    """X_0, ..., X_L from orthogonal tokens of length sqrt(d).

    Args:
        recursion: the layers.
        n_tokens: T.
        depth: L, layers.
        seed: of tokens, weights and attention; recursions that differ in `centred`, `norm` or
            `skip` alone have the same.
        width: d, at least T; default: T.

    Raises:
        ValueError: a width below T (no room for orthogonal tokens), or a number that is no integer
            >= 1.
    """
    width = n_tokens if width is None else width
    for name, value, least in (
        ("depth", depth, 1),
        ("n_tokens", n_tokens, 2),
        ("width", width, n_tokens),
    ):
        _check_integer(name, value, least)
    rng = _generator(n_tokens, seed)
    directions = torch.linalg.qr(torch.randn(width, n_tokens, generator=rng, dtype=_WIDE))[0]
    drawn = torch.randn(depth, width, width, generator=rng, dtype=_WIDE) / math.sqrt(width)
    weights = tuple(w.clone().requires_grad_() for w in drawn)
    states = [math.sqrt(width) * directions.T]
    for layer, weight in enumerate(weights):
        states.append(recursion.step(states[-1], weight, seed=_of_layer(seed, layer)))
    return Signal(tuple(states), weights)


def gradient_norms(signal: Signal, *, probes: int = 8, seed: int = 0) -> list[float]:
    """|dX_L/dW_l|_F for l = 0, ..., L-1: the Frobenius norm of the whole Jacobian.

        |J|_F^2 = E |J^T g|^2,    g ~ N(0, 1) entries

    estimated by backward passes, one for each probe g.

    Args:
        signal: of `propagate`.
        probes: how many g; the relative error falls as 1/sqrt(probes).
        seed: of the g.

    Raises:
        ValueError: no probe.
    """
    _check_integer("probes", probes, 1)
    last = signal.states[-1]
    rng = _generator(len(last), seed)
    squares = torch.zeros(len(signal.weights), dtype=_WIDE)
    for _ in range(probes):
        g = torch.randn(last.shape, generator=rng, dtype=_WIDE)
        found: Sequence[Tensor] = torch.autograd.grad(
            (last * g).sum(), signal.weights, retain_graph=True
        )
        squares += torch.stack([x.square().sum() for x in found])
    norms: list[float] = (squares / probes).sqrt().tolist()
    return norms


_WIDE: Final = torch.float64
_LAYER: Final = 1_000_003  # apart from the seeds that callers count from 0


def _of_layer(seed: int, layer: int) -> int:
    return seed + _LAYER * (layer + 1)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: wanted an integer >= {least}; got {value!r}")


def _generator(n_tokens: int, seed: int) -> torch.Generator:
    """A generator of its own, so that the global random state is left alone."""
    _check_integer("n_tokens", n_tokens, 1)
    _check_integer("seed", seed, 0)
    return torch.Generator().manual_seed(int(seed))


def _softmax(scores: Matrix, *, causal: bool) -> Matrix:
    if causal:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)
