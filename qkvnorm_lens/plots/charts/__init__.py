"""What a figure shows, separate from how it is drawn; and two libraries that draw it."""

from qkvnorm_lens.plots.charts.chart import (
    Axis,
    Backend,
    Band,
    Bars,
    Chart,
    Line,
    Mark,
    Number,
    axes_in,
    begin,
    check_backend,
    check_report,
    named_reports,
    numbers,
)
from qkvnorm_lens.plots.charts.drawing import draw
from qkvnorm_lens.plots.charts.matplotlib_backend import layer_colours
from qkvnorm_lens.plots.charts.plotly_backend import graph_objects, lay_out, plain_text
from qkvnorm_lens.plots.charts.saving import FORMATS, WIDTHS, read_formats, read_width, save
from qkvnorm_lens.plots.charts.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RUNS,
    Axes,
    Figure,
    axes_of,
    grid,
    log_ticks,
    new_figure,
    plain,
    printable,
    ticks_between,
    top_figure,
)

__all__ = [
    "Axes", "Axis", "BLUE", "Backend", "Band", "Bars", "Chart", "FORMATS", "Figure", "GREEN",
    "GREY", "Line", "Mark", "Number", "ORANGE", "RUNS", "WIDTHS", "axes_in", "axes_of", "begin",
    "check_backend", "check_report", "draw", "graph_objects", "grid", "lay_out", "layer_colours",
    "log_ticks", "named_reports", "new_figure", "numbers", "plain", "plain_text", "printable",
    "read_formats", "read_width", "save", "ticks_between", "top_figure",
]  # fmt: skip
