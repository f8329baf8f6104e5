"""What is measured: a table for each part."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments.core import Part, Size, Subject, by_size

if TYPE_CHECKING:
    from qkvnorm_lens.training import Run

SPLIT: Final = "small-train"
WINDOWS: Final = 10  # a run's losses are means over so many equal parts of its steps
FORGOTTEN: Final = 0.5  # share of what was gained over frequencies whose loss again is a failure


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much: the grid, the steps of a run, and seeds of each."""

    widths: tuple[int, ...]
    rates: tuple[float, ...]
    placements: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int


_RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SCALES: Final = by_size(
    Scale((32,), (1e-3, 1e-1), ("pre", "qkv"), (1,), 50),
    Scale((32, 64), (1e-3, 3e-2, 1e-1, 3e-1), ("pre", "qkv"), (1,), 200),
    Scale((32, 64, 128), _RATES, ("pre", "qkv", "none"), (1, 2), 350),
)


# -- measuring ------------------------------------------------------------------------------


def run_of(placement: str, width: int, rate: float, seed: int, steps: int) -> Run:
    """A study model of another width (heads and feed-forward in proportion), the paper's recipe.

    The paper halves its rate on a plateau of epochs of 2,000 steps: these runs are shorter, so
    that theirs is constant.
    """
    from qkvnorm_lens.models import named_config
    from qkvnorm_lens.training import Run, get_recipe

    config = named_config(
        "study", placement, seed=seed, d_model=width, n_heads=width // 16, d_mlp=4 * width
    )
    recipe = dataclasses.replace(get_recipe("paper"), lr=rate)
    if steps > recipe.epoch:
        raise ValueError(f"steps: wanted at most {recipe.epoch}, a constant rate; got {steps}")
    window = steps // WINDOWS
    return Run(config, SPLIT, recipe, steps=steps, seed=seed, log_every=window, eval_rows=100)


def train_and_see(run: Run) -> list[float]:
    """Mean training loss of each tenth of a run, nats per scored token (every sum is new)."""
    from qkvnorm_lens.training import train

    with tempfile.TemporaryDirectory() as folder:
        train(run, folder, progress=False, save_every=run.steps)
        log = pd.read_csv(Path(folder) / "log.csv")
    losses: list[float] = log["loss"].astype(float).tolist()
    return losses


def frequencies(sums: int = 20_000, seed: int = 21) -> float:
    """Loss (nats) of a model that knows only how frequent each target is: their entropy."""
    from qkvnorm_lens.training import draw

    batch = draw(SPLIT, sums, seed=seed)
    counts = np.unique(batch.targets[batch.scored].numpy(), return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def failure(losses: Sequence[float], known: float) -> str:
    """Why a run counts as failed; empty if it does not.

    Args:
        losses: means over equal parts of the run.
        known: loss of a model that knows only the targets' frequencies.

    Returns:
        ``"not a number"``; ``"frequencies"``: the last loss is not below ``known``; ``"spike"``:
        the last loss is above the lowest one by more than half of what that had gained on
        ``known``; or ``""``.
    """
    if not all(math.isfinite(x) for x in losses):
        return "not a number"
    last, lowest = losses[-1], min(losses)
    if last >= known:
        return "frequencies"
    return "spike" if last - lowest > FORGOTTEN * (known - lowest) else ""


def measure(placement: str, width: int, scale: Scale) -> pd.DataFrame:
    """One row for each rate and seed."""
    known = frequencies()
    rows = []
    for rate, seed in itertools.product(scale.rates, scale.seeds):
        losses = train_and_see(run_of(placement, width, rate, seed, scale.steps))
        lowest = float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan
        why = failure(losses, known)
        row = {"placement": placement, "width": width, "rate": rate, "seed": seed}
        row |= {"steps": scale.steps, "loss": losses[-1], "lowest": lowest, "frequencies": known}
        rows.append({**row, "failed": int(bool(why)), "why": why or "trained"})
    return pd.DataFrame(rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each placement and width."""
    scale = SCALES[size]
    settings = {"rates": list(scale.rates), "seeds": list(scale.seeds), "steps": scale.steps}
    settings |= {"split": SPLIT, "recipe": "paper", "forgotten": FORGOTTEN}
    return [
        Part(f"{p}-{w}", partial(measure, p, w, scale), None, {**settings, "width": w})
        for w in scale.widths
        for p in scale.placements
    ]
