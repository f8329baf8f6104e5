"""Tokens under layers of only attention: do they become equal, how fast, what keeps them apart.

Source: Wu, Ajorlou, Wang, Jegelka, Jadbabaie 2024, *On the Role of Attention Masks and LayerNorm in
Transformers* (arXiv 2405.18781). All in float64, on the CPU.

    A = softmax over j with M_ij of  (x_i W_Q) . (x_j W_K) / (sqrt(d) temperature)
    Y = A X W_V                            residual:  X + A X W_V
    MLP:   relu(Y W_1) W_2                 residual:  Y + relu(Y W_1) W_2
    norm:  "rms"  y / |y|                  "layer":   y minus its mean, to length 1
                                           (LayerNorm and RMSNorm without gains, to length 1)

**What is proved** (`Trajectory.bound`). Let X be run through pure attention (no norm, residual,
MLP), A_t its attention, P_t = A_{t-1} ... A_0, s_t = |W_V,t|_2, D(X) = max_ij |x_i - x_j|. Then

    X_t = P_t X_0 W_V,0 ... W_V,t-1,   D(X_t) <= tau(P_t) prod s  D(X_0),

with tau(P) = 1/2 max_ij sum_k |P_ik - P_jk| (Dobrushin's coefficient: two rows of P are one common
part of weight 1 - tau and two rests, so that their difference is tau times one of points in the
convex hull). If the mask's graph has a node c that attends to itself and reaches all within r
layers (one that reaches all isn't enough: two tokens that see each other and not themselves change
places for ever), and eps is the least weight that any A has on an edge, then every row of a product
of r layers has at least eps^r in column c (along a path from c, waiting at c first), so that its
tau is at most 1 - eps^r, and tau of a product is at most the product of the taus:

    mu(X_t) <= sqrt((N-1)/2) D(X_t) <= sqrt((N-1)/2) D(X_0) (1 - eps^r)^floor(t/r) prod s.

The first step: mu^2 = (1/2N) sum_ij |x_i - x_j|^2. With orthogonal W_V prod s = 1.

With norm "rms" and orthogonal W_V, let h be a unit vector with <x_i, h> >= m > 0 for the tokens of
X_0 (length 1). W_V turns h along, and <x_i, h> never falls below m, since a mean of such tokens has
at least m and a length of at most 1. In the coordinates y_i = x_i / <x_i, h> a layer is
Y <- B Y W_V with the row-stochastic B_ij = A_ij <x_j, h> / sum_k A_ik <x_k, h> >= A_ij m, so the
same holds with eps m in the place of eps; D(X) <= D(Y), as x_i is the nearest point of the unit
ball to y_i. Tokens that lie in no common half-space have no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import (
    MANY,
    brief,
    check_booleans,
    check_choice,
    check_index,
    check_integers,
    check_number,
    read_array,
)
from hooks.measures.rank import distance_to_mean, measures
from qkvnorm_lens.theory.graphs import (
    WIDEST,
    MaskGraph,
    MaskLike,
    as_mask,
    causal_mask,
    complete_mask,
    one_way_window_mask,
    star_mask,
    window_mask,
)

__all__ = [
    "Dynamics", "Fit", "MaskGraph", "Trajectory", "as_mask", "causal_mask", "complete_mask",
    "fit_decay", "gaussian", "one_way_window_mask", "orthogonal", "star_mask", "unit_tokens",
    "window_mask",
]  # fmt: skip

Norm = Literal["none", "rms", "layer"]
FLOOR: Final = 1e-10  # mu over |X|_F below which rounding is seen


def orthogonal(d: int, seed: int, layers: int | None = None) -> Float[Tensor, "*layers d d"]:
    """Orthogonal matrices, uniformly distributed (Haar); ``layers`` of them, or one.

    Raises:
        ValueError: a width or a number of layers below 1, a negative seed, or not integers.
    """
    q, r = torch.linalg.qr(gaussian(d, seed, layers))
    signed: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return signed


def gaussian(d: int, seed: int, layers: int | None = None) -> Float[Tensor, "*layers d d"]:
    """Entries N(0, 1/d); ``layers`` matrices, or one.

    Raises:
        ValueError: as for `orthogonal`.
    """
    d, seed, many = check_integers(
        d=(d, 1, WIDEST), seed=(seed, 0), layers=(1 if layers is None else layers, 1, WIDEST)
    )
    shape = (d, d) if layers is None else (many, d, d)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(d)


def unit_tokens(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Tokens of length 1 in uniformly distributed directions.

    Raises:
        ValueError: a number or a width below 1, a negative seed, or not integers.
    """
    n, d, seed = check_integers(n=(n, 1, WIDEST), d=(d, 1, WIDEST), seed=(seed, 0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return normalise(x, "rms")


@dataclass(frozen=True, eq=False)
class Dynamics:
    """Layers of attention under a mask; the module's docstring has the update.

    Weights are ``[d, d]``, one for all layers, or ``[layers, d, d]``.

    Args:
        mask: True at (i, j) where token i attends to token j; what `as_mask` reads. Kept as a
            boolean tensor.
        w_q, w_k, w_v: query, key and value matrices.
        temperature: divides the scores in addition to sqrt(d).
        norm: ``"none"``, ``"rms"`` or ``"layer"``, at each layer's end.
        residual: add a layer's input to its output.
        mlp: W_1 ``[d, f]`` and W_2 ``[f, d]``, or None.

    Raises:
        ValueError: weights of other shapes, a temperature that is not above 0, an unknown norm.
        TypeError: weights that are not float64, a temperature that is not a number, a residual that
            is not a boolean, an MLP that is not a pair.
    """

    mask: MaskLike
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    temperature: float = 1.0
    norm: Norm = "none"
    residual: bool = False
    mlp: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", as_mask(self.mask))
        weights = (("w_v", self.w_v), ("w_q", self.w_q), ("w_k", self.w_k))
        for name, w in weights:
            _check_float64(name, w)
            if w.ndim not in (2, 3):
                raise ValueError(
                    f"{name}: wanted [d, d] or [layers, d, d]; got shape {list(w.shape)}"
                )
        for name, w in weights:
            square = w.ndim in (2, 3) and w.shape[-1] == w.shape[-2]
            if not square or w.shape[-1] != self.w_v.shape[-1]:
                raise ValueError(
                    f"{name}: wanted [d, d] or [layers, d, d] with d = {self.w_v.shape[-1]}; got "
                    f"{list(w.shape)}"
                )
        warm = check_number(
            "temperature", self.temperature, "a number > 0", lambda x: 0 < x < math.inf
        )
        object.__setattr__(self, "temperature", warm)
        object.__setattr__(self, "norm", check_choice("norm", self.norm, get_args(Norm)))
        object.__setattr__(self, "residual", *check_booleans(residual=self.residual))
        if self.mlp is not None:
            _check_mlp(self.mlp, self.d)

    @property
    def d(self) -> int:
        """Width of a token."""
        return int(self.w_v.shape[-1])

    def attention(self, x: Float[Tensor, "n d"], layer: int = 0) -> Float[Tensor, "n n"]:
        """Weights of a layer on these tokens; rows sum to 1, 0 where the mask is False."""
        self._check_tokens("x", x)
        layer = self._check_layer(layer)
        q, k = x @ _at(self.w_q, layer), x @ _at(self.w_k, layer)
        scores = q @ k.T / (math.sqrt(self.d) * self.temperature)
        return scores.masked_fill(~self.mask, -math.inf).softmax(-1)

    @property
    def _layers(self) -> int | None:
        """How many layers have weights; None: all, as they share them."""
        return min((len(w) for w in (self.w_q, self.w_k, self.w_v) if w.ndim == 3), default=None)

    def _check_tokens(self, name: str, x: object) -> None:
        _check_float64(name, x)
        shape, wanted = list(x.shape), [len(self.mask), self.d]  # type: ignore[attr-defined]
        if shape != wanted:
            raise ValueError(f"{name}: wanted {wanted}; got {shape}")

    def _check_layer(self, layer: int) -> int:
        if self._layers is None:
            return check_integers(layer=(layer, 0))[0]
        return check_index("layer", layer, self._layers, "layers")

    def step(self, x: Float[Tensor, "n d"], layer: int = 0) -> Float[Tensor, "n d"]:
        """One layer."""
        return self._after(x, self.attention(x, layer), layer)

    def _after(self, x: Tensor, attention: Tensor, layer: int) -> Tensor:
        y = attention @ x @ _at(self.w_v, layer)
        y = x + y if self.residual else y
        if self.mlp is not None:
            w1, w2 = self.mlp
            z = (y @ w1).relu() @ w2
            y = y + z if self.residual else z
        return normalise(y, self.norm)

    def run(self, x0: Float[Tensor, "n d"], layers: int) -> Trajectory:
        """Run this many layers on these tokens, which are first normalised like a layer's output.

        Raises:
            ValueError: another number or width of tokens, or a number of layers below 1 or beyond
                the weights.
            ArithmeticError: a token became infinite or NaN.
        """
        self._check_tokens("x0", x0)
        most = self._layers
        (layers,) = check_integers(layers=(layers, 1, MANY))
        if most is not None and layers > most:
            raise ValueError(f"layers: wanted at most {most}, as there are weights; got {layers}")
        states, weights = [normalise(x0, self.norm)], []
        for layer in range(layers):
            weights.append(self.attention(states[-1], layer))
            states.append(self._after(states[-1], weights[-1], layer))
            if not bool(torch.isfinite(states[-1]).all()):
                raise ArithmeticError(
                    f"layer {layer}: wanted finite tokens; got an infinity or NaN"
                )
        return Trajectory(self, torch.stack(states), torch.stack(weights))


def normalise(x: Float[Tensor, "n d"], norm: Norm) -> Float[Tensor, "n d"]:
    """Tokens normalised to length 1, with "layer" after subtracting their mean."""
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / lengths


def _at(w: Tensor, layer: int) -> Tensor:
    return w if w.ndim == 2 else w[layer]


def _check_float64(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        got = x.dtype if isinstance(x, Tensor) else brief(x)
        raise TypeError(f"{name}: wanted a float64 tensor; got {got}")


def _check_mlp(mlp: object, d: int) -> None:
    if not isinstance(mlp, tuple) or len(mlp) != 2:
        many = f" of {len(mlp)}" if isinstance(mlp, tuple) else ""
        raise TypeError(f"mlp: wanted a pair (W_1, W_2); got a {type(mlp).__name__}{many}")
    for w in mlp:
        _check_float64("mlp", w)
    w1, w2 = mlp
    if w1.ndim != 2 or w1.shape != w2.shape[::-1] or w1.shape[0] != d:
        raise ValueError(
            f"mlp: wanted [{d}, f] and [f, {d}]; got {list(w1.shape)} and {list(w2.shape)}"
        )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Tokens of every layer.

    Attributes:
        dynamics: the layers that gave them.
        states: ``[layers + 1, N, d]``, the initial tokens first.
        attention: ``[layers, N, N]``.
    """

    dynamics: Dynamics
    states: Float[Tensor, "steps n d"] = field(repr=False)
    attention: Float[Tensor, "layers n n"] = field(repr=False)

    @cached_property
    def mu(self) -> Float[np.ndarray, "steps"]:
        """|| X - 1 mean(X)^T ||_F by layer."""
        found: np.ndarray = distance_to_mean(self.states).numpy()
        return found

    @cached_property
    def relative_mu(self) -> Float[np.ndarray, "steps"]:
        """mu / ||X||_F by layer."""
        lengths: np.ndarray = torch.linalg.matrix_norm(self.states).numpy()
        return np.asarray(self.mu / lengths)

    @cached_property
    def diameter(self) -> Float[np.ndarray, "steps"]:
        """max_ij |x_i - x_j| by layer."""
        apart = self.states[:, :, None] - self.states[:, None]
        found: np.ndarray = torch.linalg.vector_norm(apart, dim=-1).amax((1, 2)).numpy()
        return found

    @cached_property
    def graph(self) -> MaskGraph:
        """The mask's graph."""
        return MaskGraph(self.dynamics.mask)

    @cached_property
    def least_weight(self) -> Float[np.ndarray, "layers"]:
        """eps of each layer: the least attention weight on an edge."""
        on_edges = self.attention.masked_fill(~self.dynamics.mask, math.inf)
        found: np.ndarray = on_edges.amin((1, 2)).numpy()
        return found

    @cached_property
    def ergodicity(self) -> Float[np.ndarray, "steps"]:
        """tau(P_t) by layer, P_t the product of the attention so far; 1 at the start."""
        product = torch.eye(len(self.dynamics.mask), dtype=torch.float64)
        found = [1.0 if len(product) > 1 else 0.0]
        for weights in self.attention:
            product = weights @ product
            found.append(dobrushin(product))
        return np.array(found)

    @cached_property
    def _gain(self) -> Float[np.ndarray, "steps"]:
        """prod of |W_V|_2 by layer."""
        w = self.dynamics.w_v
        of = [float(torch.linalg.matrix_norm(_at(w, t), 2)) for t in range(len(self.attention))]
        return np.cumprod([1.0, *of])

    @cached_property
    def margin(self) -> float:
        """m = min <x_i, h> at the start, h the direction of the mean token; NaN without "rms".

        Not above 0 where the tokens are not in the half-space of their mean.
        """
        if self.dynamics.norm != "rms":
            return math.nan
        mean = self.states[0].mean(0)
        length = float(torch.linalg.vector_norm(mean))
        return float((self.states[0] @ mean).min()) / length if length > 0 else 0.0

    @cached_property
    def bound(self) -> Float[np.ndarray, "steps"]:
        """What mu cannot exceed, by the module's two statements; NaN where neither applies.

        eps is the least weight on an edge in any layer of this trajectory, r the eccentricity of
        the graph's centre.
        """
        return self._bounds[0]

    @property
    def bound_rate(self) -> float:
        """-ln(1 - eps^r) / r: the bound's decay rate per layer, |W_V|_2 = 1; NaN without one."""
        return self._bounds[1]

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, float]:
        steps, d, n = np.arange(len(self.mu)), self.dynamics, len(self.dynamics.mask)
        none = np.full(len(steps), math.nan), math.nan
        centre = self.graph.centre
        if centre is None or d.residual or d.mlp is not None or d.norm == "layer":
            return none
        eps, start, gain = float(self.least_weight.min()), self.diameter[0], self._gain
        if d.norm == "rms":
            if not (self.margin > 0 and self._turns):
                return none
            x = self.states[0]
            mean = x.mean(0)
            apart = x / (x @ (mean / torch.linalg.vector_norm(mean)))[:, None]
            start = float(torch.pdist(apart).max()) if n > 1 else 0.0
            eps, gain = eps * self.margin, np.ones(len(steps))
        r = max(int(self.graph.eccentricities[centre]), 1)
        shrinks = np.log1p(-min(eps**r, 1 - 1e-300))
        bound = math.sqrt((n - 1) / 2) * start * np.exp((steps // r) * shrinks) * gain
        return bound, float(-shrinks / r)

    @property
    def _turns(self) -> bool:
        """Whether every value matrix is orthogonal."""
        w = self.dynamics.w_v
        one = torch.eye(self.dynamics.d, dtype=torch.float64)
        return bool(((w @ w.mT - one).abs() < 1e-9).all())

    def fit(self, first: int = 0, *, relative: bool = True) -> Fit:
        """`fit_decay` of relative mu (or of mu) from a given layer."""
        (relative,) = check_booleans(relative=relative)
        return fit_decay(self.relative_mu if relative else self.mu, first)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer.

        Columns:
            layer: 0 is the start.
            mu, relative_mu, diameter: the attributes of these names.
            bound, ergodicity: what mu cannot exceed; tau of the attention's product.
            stable_rank, effective_rank, rank, mean_cosine: as in `hooks.RankReport`, taking 1e-10
                for rounding (rank: singular values above 1e-10 ||X||_F).
        """
        found = pd.DataFrame([measures(x, FLOOR) for x in self.states])
        columns = ["stable_rank", "effective_rank", "rank", "mean_cosine"]
        mine = {
            name: getattr(self, name)
            for name in ("mu", "relative_mu", "diameter", "bound", "ergodicity")
        }
        return pd.DataFrame({"layer": range(len(self.mu)), **mine, **found[columns]})


def dobrushin(p: Float[Tensor, "n n"]) -> float:
    """tau(P) = 1/2 max_ij sum_k |P_ik - P_jk| of a row-stochastic matrix."""
    return float(0.5 * torch.cdist(p, p, p=1).max())


@dataclass(frozen=True)
class Fit:
    """mu ~ exp(-rate layer): a least-squares line through ln mu.

    Attributes:
        rate: per layer; NaN with fewer than three layers above the floor.
        first, last: layers of the window, both included.
        off: root mean square of ln mu about the line.
    """

    rate: float
    first: int
    last: int
    off: float


def fit_decay(mu: Sequence[float] | np.ndarray, first: int = 0, floor: float = FLOOR) -> Fit:
    """Decay rate of mu over layers: least squares of ln mu, above rounding.

    Args:
        mu: by layer.
        first: layer from which to fit.
        floor: the window ends before the first layer, from ``first`` on, that is not above it.

    Raises:
        ValueError: ``first`` is not an integer or is outside the layers; ``mu`` is not a list of
            numbers.
        TypeError: a floor that is not a number.
    """
    y = read_array("mu", mu, "iuf", "a list of numbers, by layer").astype(float)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"mu: wanted one number or more, by layer; got shape {list(y.shape)}")
    floor = check_number("floor", floor, "a number", lambda x: not math.isnan(x))
    (first,) = check_integers(first=(first, 0, len(y) - 1))
    below = np.flatnonzero(~(y[first:] > floor))
    end = first + int(below[0]) if len(below) else len(y)
    if end - first < 3:
        return Fit(math.nan, first, end - 1, math.nan)
    layers = np.arange(first, end)
    slope, at = np.polyfit(layers, np.log(y[first:end]), 1)
    off = np.log(y[first:end]) - (slope * layers + at)
    return Fit(float(-slope), first, end - 1, float(np.sqrt((off**2).mean())))
