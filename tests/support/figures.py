"""Reports to draw, and the numbers that a figure holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import hooks
from tests.support import models

SIGMAS = (0.05, 0.2, 0.4)


def small_report(method: str, *, sigmas: tuple[float, ...] = SIGMAS, qk_scale: float = 6) -> object:
    return hooks.collapse_probe(
        models.tiny_gpt2(qk_scale=qk_scale),
        models.tokens(2, 16),
        sigmas=sigmas,
        draws=3,
        method=method,  # type: ignore[arg-type]
    )


def lines_of(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label to (x, y) of lines and of points with error bars."""
    found = {}
    for line in ax.lines:
        found[str(line.get_label())] = line.get_data()
    for container in ax.containers:
        assert isinstance(container, ErrorbarContainer)
        found[str(container.get_label())] = container.lines[0].get_data()
    return {label: (np.asarray(x), np.asarray(y)) for label, (x, y) in found.items()}


def training_log(n: int = 6, *, rate: float = 0.5, every: int = 2) -> pd.DataFrame:
    """Loss 2 rate^i; accuracy 1 - loss / 4 at each ``every``-th row, as training leaves it."""
    loss = 2 * rate ** np.arange(n)
    measured = (np.arange(n) + 1) % every == 0
    return pd.DataFrame(
        {
            "step": 100 * (np.arange(n) + 1),
            "sequences": 12_800 * (np.arange(n) + 1),
            "loss": loss,
            "per_token": np.where(measured, 1 - loss / 4, np.nan),
        }
    )


def both_axes(figure: Figure) -> tuple[Axes, Axes]:
    loss, accuracy = figure.axes
    return loss, accuracy
