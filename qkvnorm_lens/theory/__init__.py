"""Attention as a Markov chain over tokens: what a mask, a norm and a skip connection do to rank."""

from qkvnorm_lens.theory.dynamics import (
    FLOOR as FLOOR,
    Dynamics,
    Fit,
    Trajectory,
    fit_decay,
    gaussian,
    orthogonal,
    unit_tokens,
)
from qkvnorm_lens.theory.equilibria import Equilibrium, anchored, hold, two_tokens
from qkvnorm_lens.theory.graphs import (
    MaskGraph,
    as_mask,
    causal_mask,
    complete_mask,
    one_way_window_mask,
    star_mask,
    window_mask,
)
from qkvnorm_lens.theory.markov import (
    Recursion,
    Signal,
    gradient_norms,
    propagate,
    random_markov,
    random_softmax,
    stable_rank,
    uniform,
)

__all__ = [
    "Dynamics", "Equilibrium", "Fit", "MaskGraph", "Recursion", "Signal", "Trajectory", "anchored",
    "as_mask", "causal_mask", "complete_mask", "fit_decay", "gaussian", "gradient_norms", "hold",
    "one_way_window_mask", "orthogonal", "propagate", "random_markov", "random_softmax",
    "stable_rank", "star_mask", "two_tokens", "uniform", "unit_tokens", "window_mask",
]  # fmt: skip
