"""Figures of the other measurements: spread, sweeps, sparsity, rank, spectra, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from hooks.arguments import brief, check_choice, check_path, naming
from qkvnorm_lens.plots.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RUNS,
    Axis,
    Backend,
    Band,
    Bars,
    Chart,
    Line,
    axes_in,
    check_backend,
    check_report,
    draw,
    named_reports,
    numbers,
)
from qkvnorm_lens.plots.collapse import SIGMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hooks import RankReport, SpectrumReport, SpreadReport, SweepReport, SymmetryReport

VARIANTS: Final = ("as is", "positions removed", "mask removed", "both removed")
_DASHES: Final = ("-", "--", ":", "-.")
_LOG_COLUMNS: Final = ("sequences", "loss", "per_token")
_METRICS: Final = {
    "accuracy": ("accuracy per scored token (%)", 100.0),
    "top1_agreement": ("same arg max as without noise (%)", 100.0),
    "loss": ("loss (nats per scored token)", 1.0),
    "kl": ("KL from the clean output (nats per token)", 1.0),
}
_RANKS: Final = {
    "relative_mu": ("distance from the tokens' mean, μ(X) / |X|", "log"),
    "mu": ("distance from the tokens' mean, μ(X) (units of the stream)", "log"),
    "stable_rank": ("stable rank, |X|² / |X|₂²", "linear"),
    "effective_rank": ("effective rank", "linear"),
    "rank": ("rank", "linear"),
    "relative_least": ("least over largest singular value", "log"),
    "mean_cosine": ("mean |cosine| between tokens", "linear"),
}
_SPECTRUM: Final = (
    ("s1", "first singular value", BLUE, "-"),
    ("s2", "second singular value", ORANGE, "-"),
    ("uniform_s1", "first, uniform matrix of the same mask", BLUE, ":"),
    ("uniform_s2", "second, uniform matrix of the same mask", ORANGE, ":"),
    ("edge", "bulk's edge 2/√T (random, without a mask)", GREY, "--"),
)


def spread_bands(
    report: SpreadReport, ax: Axes | None = None, *, backend: Backend = "matplotlib"
) -> Figure | Any:
    """Spread of the norms that attention reads, over each head's median, by layer.

    Bands hold 50% and 90% of the attention's weight; points are the single heads' 90% band, the
    smallest b with 90% of the weight in |r - 1| <= b. Menary et al. 2024, Fig. 1.

    Args:
        report: what :func:`hooks.spread` gave.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: another ``backend``, or an axis beside plotly.
    """
    check_backend(backend, ax)
    check_report("report", report, "SpreadReport")
    bands = []
    for share, opacity in ((0.9, 0.22), (0.5, 0.35)):
        frame = report.to_frame("layer", share=share)
        x = np.arange(len(frame))
        low, high = (100 * (frame[name].to_numpy(float) - 1) for name in ("low", "high"))
        bands.append(Band(x, low, high, f"{100 * share:g}% of the weight", BLUE, opacity))
    heads = report.to_frame("head")
    order = {layer: i for i, layer in enumerate(report.settings.layers)}
    at = heads["layer"].map(order).to_numpy(float)
    each = 100 * heads["band"].to_numpy(float)
    points = Line(at, each, "each head's 90% band, ±", ORANGE, dash="none", marker=2.5)
    chart = Chart(
        x=_layers(frame["label"].tolist()),
        y=Axis("norm over the head's median, less 1 (%)"),
        title=f"{report.model['name']}: L2 norms of {_OF[report.settings.of]}",
        bands=bands,
        lines=[points],
        levels=[(0, GREY)],
        legend="best",
    )
    return draw([chart], ax, backend, (6.4, 3.8))


_OF: Final = {"stream": "the stream", "q": "queries", "k": "keys", "v": "values"}


def accuracy_curve(
    reports: SweepReport | Mapping[str, SweepReport],
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """What the model's output loses under noise in all layers at once, against sigma.

    Points are ``report.to_frame()`` with standard errors over draws; the dotted line is the model
    without noise. Menary et al. 2024, Fig. 2.

    Args:
        reports: what :func:`hooks.sweep` gave, or several by the name to show.
        ax: draw here; default: a new figure.
        metric: ``"accuracy"``, ``"top1_agreement"``, ``"loss"`` or ``"kl"``.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: another ``metric`` or ``backend``, no report, an axis beside plotly, or a report
            without that number (accuracy and loss want targets).
    """
    check_backend(backend, ax)
    metric = check_choice("metric", metric, _METRICS)
    named = named_reports(reports)
    label, unit = _METRICS[metric]
    lines, levels = [], []
    for i, (name, report) in enumerate(named.items()):
        check_report("reports", report, "SweepReport")
        frame = report.to_frame()
        if frame[metric].isna().all():
            raise ValueError(
                f"metric: wanted a number that the report has; got {metric!r} of a sweep without "
                "targets"
            )
        noisy, colour = frame[frame["sigma"] > 0], RUNS[i % len(RUNS)]
        x, y, error = (noisy[c].to_numpy(float) for c in ("sigma", metric, f"se_{metric}"))
        name = name or f"noise on {', '.join(report.settings.on)}"
        lines.append(
            Line(100 * x, unit * y, name, colour, marker=3.5, bars=True, error=unit * error)
        )
        levels.append((unit * float(frame[metric].iloc[0]), colour))
    known = np.concatenate([line.x for line in lines])
    chart = Chart(
        x=Axis(SIGMA, "log", float(known.min()) / 1.15, float(known.max()) * 1.15, ticks="log"),
        y=Axis(label),
        lines=lines,
        levels=levels,
        title=next(iter(named.values())).model["name"] if len(named) == 1 else "",
    )
    return draw([chart], ax, backend, (6.0, 3.8))


def sparsity_histogram(
    table: pd.DataFrame, ax: Axes | None = None, *, backend: Backend = "matplotlib"
) -> Figure | Any:
    """Histogram of the largest weight of each attention row, content and sinks apart.

    Menary et al. 2024, Fig. 25 to 27: the sharp peak at 1 is Pre-Norm's; sparse rows lie right of
    0.95.

    Args:
        table: columns ``low`` (a bin's lower end), ``rows`` (how many), and where there are two
            kinds of row ``kind``; for one model, as in the experiment ``sparsity``'s table where
            ``what`` is ``"histogram"``.
        ax: draw here; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of thing.
        ValueError: other columns, no rows, or several models in one table.
    """
    check_backend(backend, ax)
    check_report("table", table, "DataFrame")
    _columns("table", table, ("low", "rows"))
    frame = table[table["what"] == "histogram"] if "what" in table else table
    frame = frame.assign(**numbers("table", frame, ("low", "rows")))
    kinds = list(dict.fromkeys(frame["kind"])) if "kind" in frame else [None]
    models = sorted(map(str, set(frame["model"]))) if "model" in frame else []
    if len(models) > 1:
        raise ValueError(f"table: wanted one model; got {models}")
    total = float(frame["rows"].sum())
    if not total > 0:
        raise ValueError("table: wanted rows of attention; got none")
    bars = []
    for kind, colour in zip(kinds, (BLUE, ORANGE, GREEN), strict=False):
        mine = (frame if kind is None else frame[frame["kind"] == kind]).sort_values("low")
        left = mine["low"].to_numpy(float)
        width = float(np.diff(left).min()) if len(left) > 1 else 1.0
        height = 100 * mine["rows"].to_numpy(float) / total
        label = {None: "rows", "content": "rows on content", "sink": "rows on the first token"}
        bars.append(Bars(left, width, height, label.get(kind, str(kind)), colour))
    top = max(float(b.height.max()) for b in bars)
    least = min(0.01, *(float(b.height[b.height > 0].min()) for b in bars if b.height.any()))
    chart = Chart(
        x=Axis("largest weight of the row, max a", "linear", 0, 1),
        y=Axis("share of rows per bin (%)", "log", max(least / 1.5, 1e-4), 2 * top, ticks="plain"),
        bars=bars,
        title=str(models[0]) if models else "",
        legend="upper left",
    )
    return draw([chart], ax, backend, (6.0, 3.4))


def rank_by_depth(
    reports: RankReport | pd.DataFrame | Mapping[str, RankReport | pd.DataFrame],
    ax: Axes | None = None,
    *,
    measure: str = "relative_mu",
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """How far the tokens are from being one token, by depth.

    Wu et al. 2024: mu(X) = || X - 1 mean(X)^T ||_F falls where attention makes tokens alike.

    Args:
        reports: what :func:`hooks.rank_profile` gave, or a frame (its ``to_frame()``: one row per
            site, in order, with ``label`` and the measure); or several by the name to show.
        ax: draw here; default: a new figure.
        measure: a column: ``"relative_mu"``, ``"mu"``, ``"stable_rank"``, ``"effective_rank"``,
            ``"rank"``, ``"relative_least"`` or ``"mean_cosine"``.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: neither such a report nor a frame.
        ValueError: another measure or ``backend``, no report, a frame without these columns.
    """
    check_backend(backend, ax)
    measure = check_choice("measure", measure, _RANKS)
    named = _frames("reports", reports, "RankReport")
    label, scale = _RANKS[measure]
    lines = []
    for i, (name, frame) in enumerate(named.items()):
        _columns(
            f"reports: frame {name!r}" if name else "reports: frame", frame, ("label", measure)
        )
        y = numbers("reports", frame, (measure,))[measure].to_numpy()
        colour = RUNS[i % len(RUNS)]
        lines.append(Line(np.arange(len(y)), y, name, colour, marker=2.5, width=1.4))
    longest = max(named.values(), key=len)
    chart = Chart(
        x=_sites(longest["label"].astype(str).tolist()),
        y=Axis(label, "log" if scale == "log" and _decades(lines) else "linear", ticks="plain"),
        lines=lines,
    )
    return draw([chart], ax, backend, (6.8, 3.6))


def spectrum_by_depth(
    reports: SpectrumReport | pd.DataFrame | Mapping[str, SpectrumReport | pd.DataFrame],
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    *,
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """First two singular values of the attention matrices by layer, beside the uniform matrix's.

    Naderi et al. 2024: without a mask softmax attention has one singular value near 1 and a bulk
    below 2/sqrt(T); under a causal mask the uniform matrix of the same mask is the thing to compare
    with. The band goes from the least to the greatest head.

    Args:
        reports: what :func:`hooks.spectral_gap` gave, or a frame (its ``to_frame()``, by head or by
            layer: ``layer``, ``s1``, ``s2``, ``uniform_s1``, ``uniform_s2``, ``edge``); or several
            by the name to show, side by side.
        ax: draw here, of several an axis for each; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: neither such a report nor a frame.
        ValueError: no report, other columns, another ``backend``, another number of axes, or an
            axis beside plotly.
    """
    check_backend(backend, ax)
    named = _frames("reports", reports, "SpectrumReport")
    ax = None if ax is None else axes_in(ax, len(named), "one for each report")
    charts = [_spectrum_chart(name, frame) for name, frame in named.items()]
    return draw(charts, ax, backend, (6.8 if len(charts) == 1 else 4.6 * len(charts), 3.8),
                together=True)  # fmt: skip


def _spectrum_chart(name: str, frame: pd.DataFrame) -> Chart:
    names = [column for column, *_ in _SPECTRUM]
    _columns(f"reports: frame {name!r}" if name else "reports: frame", frame, ("layer", *names))
    frame = frame.assign(**numbers("reports", frame, names))
    by_layer = frame.groupby("layer", sort=False)[names]
    mean, low, high = by_layer.mean(), by_layer.min(), by_layer.max()
    x = np.arange(len(mean))
    several = bool((frame.groupby("layer").size() > 1).any())
    bands = [
        Band(x, low[n].to_numpy(float), high[n].to_numpy(float), "", colour, 0.15)
        for n, _, colour, _ in _SPECTRUM[:2]
        if several
    ]
    lines = [
        Line(x, mean[n].to_numpy(float), label, colour, dash=dash, marker=3 if dash == "-" else 0)
        for n, label, colour, dash in _SPECTRUM
    ]
    top = max(1.0, float(high.to_numpy(float).max()), float(mean.to_numpy(float).max()))
    return Chart(
        x=_layers([str(layer) for layer in mean.index]),
        y=Axis("singular value of the attention matrix", "linear", 0, 1.6 * top),
        title=name,
        lines=lines,
        bands=bands,
        legend="upper left",  # above everything that is drawn
    )


def symmetry_by_depth(
    reports: SymmetryReport | Mapping[str, SymmetryReport],
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    *,
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """How much permuting the earlier tokens changes the last position's stream, by depth.

    The mean of |y - y_pi| / |y| behind each block, as the model is and without positions, mask or
    both, beside what rounding does to the same stream (dashed, the largest of its runs): a line on
    or below its dashed one is no gap. A change of nothing at all is no point of the log axis.
    Zuo & Guerzhoy 2024.

    Args:
        reports: what :func:`hooks.symmetry_gap` gave, or several by the name to show, side by side.
        ax: draw here, of several an axis for each; default: a new figure.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: no such report.
        ValueError: no report, another ``backend``, another number of axes, or an axis beside
            plotly.
    """
    check_backend(backend, ax)
    named = named_reports(reports)
    for report in named.values():
        check_report("reports", report, "SymmetryReport")
    ax = None if ax is None else axes_in(ax, len(named), "one for each report")
    charts = [_symmetry_chart(name, report) for name, report in named.items()]
    # One scale for all: a panel of nothing but rounding must not look like the others.
    y = np.concatenate([line.y for chart in charts for line in chart.lines])
    seen = y[np.isfinite(y) & (y > 0)]
    if len(seen):
        low, high = float(seen.min()) / 2, float(seen.max()) * 2
        charts = [replace(chart, y=replace(chart.y, low=low, high=high)) for chart in charts]
    return draw(charts, ax, backend, (6.8 if len(charts) == 1 else 4.6 * len(charts), 3.8))


def _symmetry_chart(name: str, report: SymmetryReport) -> Chart:
    frame = report.to_frame("layer")
    lines = []
    for variant, colour in zip(VARIANTS, ("#000000", BLUE, ORANGE, GREEN), strict=True):
        mine = frame[frame["variant"] == variant]
        if not len(mine):
            continue
        x = np.arange(len(mine))
        change, floor = (mine[c].to_numpy(float) for c in ("stream", "floor_stream"))
        change = np.where(change > 0, change, np.nan)
        lines.append(Line(x, change, variant, colour, marker=3.5, width=1.4))
        lines.append(Line(x, floor, f"{variant}: rounding", colour, dash="--", width=0.8))
    labels = frame[frame["variant"] == frame["variant"].iloc[0]]["label"].astype(str).tolist()
    return Chart(
        x=_layers(labels, "behind the block of layer (embed: before the first)"),
        y=Axis("change of the stream, |y − y′| / |y|", "log"),
        lines=lines,
        title=name or str(report.model["name"]),
    )


def training_curves(
    logs: Mapping[str, pd.DataFrame | str | PathLike[str]],
    ax: Sequence[Axes] | np.ndarray | None = None,
    *,
    backend: Backend = "matplotlib",
) -> Figure | Any:
    """Loss (log axis) and accuracy per token against sequences seen, a colour per run.

    Points are the logs' own columns ``sequences``, ``loss`` and ``per_token``; accuracy has points
    where it was measured. Beyond seven runs the colours come again with other dashes.

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
    check_backend(backend, ax)
    if not isinstance(logs, Mapping):
        raise TypeError(f"logs: wanted a mapping of names to logs; got {type(logs).__name__}")
    frames = {str(name): _log(name, log) for name, log in logs.items()}
    if not frames:
        raise ValueError("logs: wanted at least one; got none")
    if ax is not None:
        ax = axes_in(ax, 2, "for loss and accuracy")
    loss, accuracy = [], []
    for i, (name, frame) in enumerate(frames.items()):
        drawn: dict[str, Any] = {
            "colour": RUNS[i % len(RUNS)],
            "dash": _DASHES[i // len(RUNS) % len(_DASHES)],
            "width": 1.4,
            "label": name,
        }
        loss.append(Line(frame["sequences"].to_numpy(), frame["loss"].to_numpy(), **drawn))
        measured = frame[frame["per_token"].notna()]
        x, y = measured["sequences"].to_numpy(), 100 * measured["per_token"].to_numpy()
        accuracy.append(Line(x, y, marker=3.5, **drawn))
    seen = Axis("sequences seen", "linear", 0, None, ticks="thousands")
    none = all(not len(line.x) for line in accuracy)
    charts = [
        Chart(
            x=seen,
            y=Axis("loss (nats per scored token)", "log", ticks="log"),
            lines=loss,
            extra={"large": True},
        ),
        Chart(
            x=seen,
            y=Axis("accuracy per token (%)"),
            lines=accuracy,
            note="not measured" if none else "",
        ),
    ]
    return draw(charts, ax, backend, (8.4, 3.4), together=True)


def _frames(what: str, given: Any, kind: str) -> dict[str, pd.DataFrame]:
    """Reports or their frames, one or several by name, as frames."""
    named = named_reports(given)
    for each in named.values():
        check_report(what, each, kind, "DataFrame")
    return {n: r if isinstance(r, pd.DataFrame) else r.to_frame() for n, r in named.items()}


def _log(name: str, log: pd.DataFrame | str | PathLike[str]) -> pd.DataFrame:
    """The columns that are drawn, as numbers."""
    frame = log if isinstance(log, pd.DataFrame) else _read_log(log)
    _columns(f"logs: log of {name!r}", frame, _LOG_COLUMNS)
    return numbers("logs", frame, _LOG_COLUMNS)


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


def _columns(what: str, frame: pd.DataFrame, wanted: Sequence[str]) -> None:
    lacking = [column for column in wanted if column not in frame.columns]
    if lacking:
        raise ValueError(
            f"{what}: wanted columns {', '.join(wanted)}; got none named {' nor '.join(lacking)}"
        )
    if frame.empty:
        raise ValueError(f"{what}: wanted rows; got none")


def _sites(labels: list[str]) -> Axis:
    """Sites by the layer that each begins; by name where labels say no layer."""
    of = [label.partition(" ")[0] for label in labels]
    first = [i for i in range(len(of)) if i == 0 or of[i] != of[i - 1]]
    said = "layer (its sites in order, from its input to its output)"
    axis = _layers([of[i] for i in first], said)
    return replace(axis, named=tuple((float(first[int(at)]), text) for at, text in axis.named))


def _decades(lines: Sequence[Line]) -> bool:
    """Whether the numbers are all positive and span more than one decade."""
    y = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    return bool(len(y) and y.min() > 0 and y.max() > 10 * y.min())


def _layers(labels: list[str], label: str = "layer") -> Axis:
    """Layers or sites by name, thinned where they are many."""
    longest = max(map(len, labels))
    room = 12 if longest <= 4 else 7 if longest <= 8 else 4
    step = 1 + (len(labels) - 1) // room
    named = tuple((float(i), labels[i].removeprefix("L")) for i in range(0, len(labels), step))
    return Axis(label, named=named)
