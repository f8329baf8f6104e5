"""What is measured: a table for each part."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import Part, Size, Subject, by_size
from qkvnorm_lens.experiments.related.masks import words
from qkvnorm_lens.experiments.related.masks.words import FEW, MASKS, SETTINGS, D, N

if TYPE_CHECKING:
    from qkvnorm_lens.theory import Dynamics, Trajectory


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much: seeds, layers, layers of the equilibria."""

    seeds: tuple[int, ...]
    layers: int
    held: int


# With a residual stream and no norm tokens grow up to twofold a layer, and scores fourfold: float64
# ends at some 500 layers.
SCALES: Final = by_size(
    Scale((1, 2), 64, 64), Scale((1, 2, 3), 256, 256), Scale((1, 2, 3, 4, 5), 256, 1024)
)


# -- measuring ------------------------------------------------------------------------------


def mask_of(name: str, n: int = N) -> Any:
    """A mask by its name; ``"two parts"``: two halves, neither of which sees the other."""
    import torch

    from qkvnorm_lens.theory import causal_mask, complete_mask, one_way_window_mask, window_mask

    kind, width = MASKS[name]
    half = torch.arange(n) < n // 2
    return {
        "complete": lambda: complete_mask(n),
        "causal": lambda: causal_mask(n),
        "window": lambda: window_mask(n, width),
        "one-way": lambda: one_way_window_mask(n, width),
        "two parts": lambda: half[:, None] == half,
    }[kind]()


def dynamics_of(mask: str, setting: str, seed: int, layers: int) -> Dynamics:
    """Entries of W_Q and W_K are N(0, 1): scores of unit tokens have a standard deviation near 1.

    The MLP (width 4 d) has He's variances, so that it keeps lengths on average.
    """
    import torch

    from qkvnorm_lens.theory import Dynamics, gaussian, orthogonal

    chosen = dict(SETTINGS[setting])
    values, mlp = chosen.pop("values", "orthogonal"), chosen.pop("mlp", False)
    first = 1000 * seed
    w_v = {
        "orthogonal": lambda: orthogonal(D, first + 3, layers),
        "random": lambda: gaussian(D, first + 3, layers),
        "identity": lambda: torch.eye(D, dtype=torch.float64),
    }[values]()
    weights = None
    if mlp:
        both = gaussian(4 * D, first + 4)[: 2 * D]  # entries N(0, 1 / 4d)
        weights = (math.sqrt(8) * both[:D], both[D:].T)  # variances 2 / d and 1 / 4d
    return Dynamics(
        mask_of(mask),
        math.sqrt(D) * gaussian(D, first + 1, layers),
        math.sqrt(D) * gaussian(D, first + 2, layers),
        w_v,
        mlp=weights,
        **chosen,
    )


def even_rate(mask: Any) -> float:
    """-ln |second eigenvalue| of the mask with rows of sum 1, at most `EVEN_MOST`."""
    import torch

    weights = mask.double() / mask.sum(1, keepdim=True)
    second = float(torch.linalg.eigvals(weights).abs().sort(descending=True)[0][1])
    return abs(math.log(max(min(second, 1.0), math.exp(-words.EVEN_MOST))))


def measure(setting: str, masks: tuple[str, ...], scale: Scale) -> pd.DataFrame:
    """One row per mask and seed (``run``), and the seeds' geometric mean by layer (``curve``)."""
    with _one_thread():
        frames = [_of_mask(setting, mask, scale) for mask in masks]
    return pd.concat(frames, ignore_index=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Many small products are faster without threads that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of_mask(setting: str, mask: str, scale: Scale) -> pd.DataFrame:
    from qkvnorm_lens.theory import unit_tokens

    what, paths = {"setting": setting, "mask": mask}, []
    for seed in scale.seeds:
        layers = dynamics_of(mask, setting, seed, scale.layers)
        paths.append(layers.run(unit_tokens(N, D, 1000 * seed), scale.layers))
    size = {"tokens": N, "width": D, "layers": scale.layers}
    rows = [
        {"row": "run", **what, "seed": seed, **size, **_facts(path)}
        for seed, path in zip(scale.seeds, paths, strict=True)
    ]
    steps = np.unique(np.round(np.geomspace(1, scale.layers, 40)).astype(int))
    at = np.array([0, *steps])
    value = np.exp(np.log([np.maximum(path.relative_mu, 1e-16) for path in paths]).mean(0))[at]
    bound = np.array([path.bound for path in paths]).mean(0)[at]
    curve = pd.DataFrame({"row": "curve", **what, "layer": at, "value": value, "bound": bound})
    return pd.concat([pd.DataFrame(rows), curve], ignore_index=True)


def _facts(path: Trajectory) -> dict[str, Any]:
    """Decay, bound and end of one run."""
    from hooks.measures.rank import measures
    from qkvnorm_lens.theory import FLOOR

    relative = path.relative_mu
    below = np.flatnonzero(relative < words.SMALL * relative[0])
    fit = path.fit(path.fit().last // 2)  # the later half of what is above rounding
    over = path.mu - path.bound - 1e-9 * path.mu[0]  # rounding of N unit tokens
    last = measures(path.states[-1], FLOOR)
    return {
        "radius": path.graph.radius,
        **dataclasses.asdict(fit),
        "reached": float(below[0]) if len(below) else math.nan,
        "start": relative[0],
        "end": relative[-1],
        "least_weight": path.least_weight.min(),
        "even": even_rate(path.dynamics.mask),
        "bound_rate": path.bound_rate,
        "violated": float((over > 0).sum()) if np.isfinite(path.bound[0]) else math.nan,
        **{name: last[name] for name in ("stable_rank", "mean_cosine")},
    }


def held(scale: Scale) -> pd.DataFrame:
    """Equilibria of each rank: from the tokens themselves, and from tokens nearby.

    ``two tokens``: N = d = 2, causal. ``leaning``: 8 tokens under the star mask. ``solved``: W_V
    solved for random tokens, 8 under the causal mask, or k groups of equal ones under the complete
    one.
    """
    from qkvnorm_lens.theory import anchored, gaussian, hold, two_tokens, unit_tokens

    made: list[tuple[str, Any]] = [("two tokens", two_tokens(3.0))]
    made += [("leaning", anchored(8, 8, rank)) for rank in range(1, 9)]
    made.append(("leaning", anchored(2, 2, 2)))
    w_q, w_k = gaussian(8, 1), gaussian(8, 2)
    made.append(("solved, causal", hold(unit_tokens(8, 8, 3), mask_of("causal", 8), w_q, w_k)))
    for rank in range(1, 9):
        tokens = unit_tokens(rank, 8, 3).repeat_interleave(8, 0)[::rank]
        found = hold(tokens, mask_of("complete", 8), w_q, w_k)
        made.append(("solved, complete", found))
    with _one_thread():
        return pd.DataFrame([_equilibrium(name, found, scale.held) for name, found in made])


def _equilibrium(name: str, found: Any, layers: int) -> dict[str, Any]:
    """What becomes of an equilibrium, started exactly and off by 0.1% of a token's length."""
    import torch

    from qkvnorm_lens.theory import gaussian

    n, d = found.tokens.shape
    # Each token is moved along its sphere: by 1e-3 in a random direction.
    off = gaussian(max(n, d), 7)[:n, :d]
    off = 1e-3 * off / torch.linalg.vector_norm(off, dim=1, keepdim=True)
    paths = [found.dynamics.run(x, layers) for x in (found.tokens, found.tokens + off)]
    ends = [torch.linalg.svdvals(path.states[-1]) for path in paths]
    gone = torch.linalg.vector_norm(paths[0].states - found.tokens, dim=2).amax(1)
    left = torch.nonzero(gone > 0.1).flatten()
    return {
        "row": "equilibrium",
        "setting": name,
        "tokens": n,
        "width": d,
        "layers": layers,
        "rank": found.rank,
        "moved": found.moved,
        "radius": found.spectral_radius,
        "left": float(left[0]) if len(left) else math.nan,
        "end_rank": float((ends[0] > 1e-6 * ends[0][0]).sum()),
        "near_rank": float((ends[1] > 0.01 * ends[1][0]).sum()),
        "end": paths[0].relative_mu[-1],
        "near_end": paths[1].relative_mu[-1],
        "start": paths[0].relative_mu[0],
    }


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each setting, and one of the equilibria."""
    scale = SCALES[size]
    settings = {"seeds": list(scale.seeds), "layers": scale.layers, "tokens": N, "width": D}
    out = []
    for i, setting in enumerate(SETTINGS):
        masks = tuple(MASKS) if setting == "attention" else FEW
        work = partial(measure, setting, masks, scale)
        out.append(Part(f"decay-{i}", work, None, {**settings, "setting": setting, "masks": masks}))
    return [*out, Part("equilibria", partial(held, scale), None, {"layers": scale.held})]
