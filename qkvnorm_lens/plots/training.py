"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from hooks.arguments import brief, check_path, naming
from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import check_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: Final = ("-", "--", ":", "-.")
_LOG_COLUMNS: Final = ("sequences", "loss", "per_token")


def training_curves(
    logs: Mapping[str, pd.DataFrame | str | PathLike[str]],
    ax: Sequence[Axes] | np.ndarray | None = None,
    *,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """Loss (log axis) and accuracy per token against sequences seen, a colour per run.

    Points are the logs' own columns ``sequences``, ``loss`` and ``per_token``; accuracy has points
    where it was measured. Beyond seven runs the colours repeat with other dashes.

    Args:
        logs: by the name to show, what training wrote: a frame, or the path of a ``log.csv``.
        ax: draw on these two, loss and accuracy; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Returns:
        The figure that holds the axes, or a figure of plotly's.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        OSError: no such file.
        TypeError: no mapping.
        ValueError: no log, one without these columns or without rows, other than two axes, another
            ``backend``, or axes beside plotly.
    """
    charts.check_backend(backend, ax)
    if not isinstance(logs, Mapping):
        raise TypeError(f"logs: wanted a mapping of names to logs; got {type(logs).__name__}")
    frames = {str(name): _log(name, log) for name, log in logs.items()}
    if not frames:
        raise ValueError("logs: wanted at least one; got none")
    if ax is not None:
        ax = charts.axes_in(ax, 2, "for loss and accuracy")
    loss, accuracy = [], []
    for i, (name, frame) in enumerate(frames.items()):
        drawn: dict[str, Any] = {
            "colour": charts.RUNS[i % len(charts.RUNS)],
            "dash": _DASHES[i // len(charts.RUNS) % len(_DASHES)],
            "width": 1.4,
            "label": name,
        }
        loss.append(charts.Line(frame["sequences"].to_numpy(), frame["loss"].to_numpy(), **drawn))
        measured = frame[frame["per_token"].notna()]
        x, y = measured["sequences"].to_numpy(), 100 * measured["per_token"].to_numpy()
        accuracy.append(charts.Line(x, y, marker=3.5, **drawn))
    seen = charts.Axis("sequences seen", "linear", 0, None, ticks="thousands")
    none = all(not len(line.x) for line in accuracy)
    shown = [
        charts.Chart(
            x=seen,
            y=charts.Axis("loss (nats per scored token)", "log", ticks="log"),
            lines=loss,
            extra={"large": True},
        ),
        charts.Chart(
            x=seen,
            y=charts.Axis("accuracy per token (%)"),
            lines=accuracy,
            note="not measured" if none else "",
        ),
    ]
    return charts.draw(shown, ax, backend, (8.4, 3.4), together=True)


def _log(name: str, log: pd.DataFrame | str | PathLike[str]) -> pd.DataFrame:
    """The columns that are drawn, as numbers."""
    frame = log if isinstance(log, pd.DataFrame) else _read_log(log)
    check_columns(f"logs: log of {name!r}", frame, _LOG_COLUMNS)
    return charts.numbers("logs", frame, _LOG_COLUMNS)


def _read_log(log: str | PathLike[str]) -> pd.DataFrame:
    wanted = "frames, or paths of log.csv"
    if not isinstance(log, (str, PathLike)):
        raise TypeError(f"logs: wanted {wanted}; got {brief(log)}")
    path = check_path("logs", log)
    try:
        with naming("logs", wanted, path):
            return pd.read_csv(path)
    except ValueError as error:  # no table, or no text
        raise ValueError(f"logs: wanted {wanted}; got {path}: {error}") from error
