"""What a common length moves, by depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hooks.arguments import check_booleans
from qkvnorm_lens.plots import charts
from qkvnorm_lens.plots.frames import layer_axis

if TYPE_CHECKING:
    from hooks import InterferenceReport

_CURVES: Final = (
    ("moved", "moved: one scale for all tokens", charts.BLUE, "-"),
    ("permuted", "the same factors, shuffled", charts.GREEN, "--"),
    ("predicted", "independent noise of that spread", charts.ORANGE, ":"),
)


def interference_by_depth(
    report: InterferenceReport,
    ax: charts.Axes | None = None,
    *,
    content: bool = False,
    backend: charts.Backend = "matplotlib",
) -> charts.Figure | Any:
    """Share of sparse rows that attend elsewhere once the norm before their layer uses one scale.

    By layer, beside the same factors shuffled among the tokens and independent noise of the same
    spread; of the first frozen vectors and the first constant. Bars are standard errors over
    prompts.

    Args:
        report: what :func:`hooks.interference` gave.
        ax: draw here; default: a new figure.
        content: leave rows out that attend to the first token.
        backend: ``"matplotlib"`` or ``"plotly"``.

    Raises:
        ImportError: matplotlib (plotly) is not installed.
        TypeError: another kind of report.
        ValueError: another ``backend``, or an axis beside plotly.
    """
    charts.check_backend(backend, ax)
    charts.check_report("report", report, "InterferenceReport")
    (content,) = check_booleans(content=content)
    frame, settings = report.to_frame("layer"), report.settings
    first = (frame["on"] == settings.on[0]) & (frame["constant"] == settings.constants[0])
    frame, kind = frame[first], "_content" if content else ""
    lines = []
    for name, label, colour, dash in _CURVES:
        y = 100 * frame[f"{name}{kind}"].to_numpy(float)
        if np.isfinite(y).any():
            error = 100 * frame[f"se{kind}"].to_numpy(float) if name == "moved" else None
            marks: dict[str, Any] = {"marker": 3.5, "bars": name == "moved", "error": error}
            lines.append(charts.Line(np.arange(len(y)), y, label, colour, dash=dash, **marks))
    chart = charts.Chart(
        x=layer_axis(frame["label"].tolist()),
        y=charts.Axis(f"sparse rows{' on content' * content} that attend elsewhere (%)"),
        title=f"{report.model['name']}: norm frozen for {' and '.join(settings.on[0])}",
        lines=lines,
        note="" if lines else "no sparse rows",
    )
    return charts.draw([chart], ax, backend, (6.4, 3.8))
