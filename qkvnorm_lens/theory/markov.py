"""Random Markov attention: its spectrum, and what it does to signals and gradients.

A row-stochastic matrix has the singular value 1 or more; where the rest are near 0, as in random
ones without a mask, tokens become alike in one layer. Everything here is float64, on the CPU, and
a function of its seed. Source: Naderi et al. 2024 (arXiv 2410.07799).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import (
    brief,
    check_booleans,
    check_choice,
    check_integers,
    check_kind,
    check_number,
)
from qkvnorm_lens.theory.graphs import WIDEST

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
        causal: keys after a row's own position get nothing.

    Raises:
        ValueError: no token, or a seed that is not an integer >= 0.
    """
    n_tokens, causal = _check_tokens(n_tokens, causal)
    rng = _generator(n_tokens, seed)
    scores = math.sqrt(VARIANCE) * torch.randn(n_tokens, n_tokens, generator=rng, dtype=_WIDE)
    return _softmax(scores - VARIANCE / 2, causal=causal)


def uniform(n_tokens: int, *, causal: bool = False) -> Matrix:
    """U: equal weights over the keys that each row sees; (1/T) 1 1^T without a mask."""
    n_tokens, causal = _check_tokens(n_tokens, causal)
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
        causal: keys after a row's own position get nothing.
        d_head: columns of W_Q and W_K, on which the rank of the scores depends; default: d.

    Raises:
        ValueError: tokens that are not a float64 matrix, a d_head below 1, or a seed that is not an
            integer >= 0.
    """
    _check_matrix("x", x)
    (causal,) = check_booleans(causal=causal)
    width = x.shape[1]
    (d_head,) = check_integers(d_head=(width if d_head is None else d_head, 1, WIDEST))
    rng = _generator(len(x), seed)
    w_q, w_k = torch.randn(2, width, d_head, generator=rng, dtype=_WIDE) / math.sqrt(width)
    scores = math.sqrt(VARIANCE / d_head) * (x @ w_q) @ (x @ w_k).T
    return _softmax(scores, causal=causal)


def stable_rank(x: Stream) -> float:
    """|S|_F^2 / |S|_2^2 of S = X X^T: sum of s_i^4 over s_1^4, for the singular values of X.

    1 where all tokens are multiples of one, T where they are orthogonal and equally long. Naderi
    et al. 2024.

    Raises:
        ValueError: X is zero or not finite.
    """
    _check_matrix("x", x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: wanted finite numbers that are not all zero; got an infinity or NaN")
    s = torch.linalg.svdvals(x)
    top = float(s[0])
    if not (math.isfinite(top) and top > 0):
        raise ValueError(f"x: wanted finite numbers that are not all zero; got s_1 = {top}")
    return float((s / top).pow(4).sum())


@dataclass(frozen=True, kw_only=True)
class Recursion:
    """X_{l+1} = N(X_l [skip] + gain (A_l - U [centred]) X_l W_l), W_l with N(0, 1/d) entries.

    N is the identity or LayerNorm of each token (mean off, length sqrt(d), no gain, eps 1e-5). The
    attention-only network of Naderi et al. 2024; LayerNorm and skip are placed as in the first
    transformers, after the update and around it.

    Args:
        attention: A_l: ``"markov"``, a new random one in each layer; ``"softmax"`` of X_l with new
            random W_Q and W_K.
        causal: under a causal mask.
        centred: with the fix.
        norm: with LayerNorm.
        skip: with a skip connection.
        gain: of the update. What the fix leaves of a random Markov matrix has entries of variance
            1/T^2: sqrt(T) keeps the length of X. Under a causal mask row i's entries have about
            1/i^2, so no single number does.
    """

    attention: AttentionKind = "markov"
    causal: bool = False
    centred: bool = False
    norm: bool = False
    skip: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        read: dict[str, Any] = {
            "attention": check_choice("attention", self.attention, get_args(AttentionKind)),
            "gain": check_number("gain", self.gain, "a number > 0", lambda x: 0 < x < math.inf),
        }
        names = ("causal", "centred", "norm", "skip")
        answers = check_booleans(**{name: getattr(self, name) for name in names})
        for name, value in (read | dict(zip(names, answers, strict=True))).items():
            object.__setattr__(self, name, value)

    def step(self, x: Stream, weight: Float[Tensor, "width width"], *, seed: int) -> Stream:
        """One layer; ``seed`` is that of its attention."""
        _check_matrix("x", x)
        _check_matrix("weight", weight)
        if weight.shape != (x.shape[1], x.shape[1]):
            wanted = [x.shape[1]] * 2
            raise ValueError(f"weight: wanted shape {wanted}; got shape {list(weight.shape)}")
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
        seed: of tokens, weights and attention, which are shared by recursions that differ only in
            `centred`, `norm` or `skip`.
        width: d, at least T; default: T.

    Raises:
        ValueError: a width below T (no room for orthogonal tokens), or a number that is not an
            integer >= 1.
    """
    check_kind("recursion", recursion, Recursion, "a Recursion")
    depth, n_tokens = check_integers(depth=(depth, 1, WIDEST), n_tokens=(n_tokens, 2, WIDEST))
    (width,) = check_integers(width=(n_tokens if width is None else width, n_tokens, WIDEST))
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
        ValueError: fewer than one probe.
    """
    check_kind("signal", signal, Signal, "a Signal, as propagate gives")
    (probes,) = check_integers(probes=(probes, 1))
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


def _check_tokens(n_tokens: Any, causal: Any) -> tuple[int, bool]:
    (causal,) = check_booleans(causal=causal)
    return check_integers(n_tokens=(n_tokens, 1, WIDEST))[0], causal


def _check_matrix(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a float64 tensor of two axes; got {brief(x)}")
    if x.ndim != 2 or x.dtype != _WIDE or not x.numel():
        got = f"{list(x.shape)} in {x.dtype}"
        raise ValueError(f"{name}: wanted a matrix in float64; got {got}")


def _generator(n_tokens: int, seed: int) -> torch.Generator:
    """A separate generator, so that the global random state is left alone."""
    n_tokens, seed = check_integers(n_tokens=(n_tokens, 1, WIDEST), seed=(seed, 0))
    return torch.Generator().manual_seed(seed)


def _softmax(scores: Matrix, *, causal: bool) -> Matrix:
    if causal:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)
