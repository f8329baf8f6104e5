"""Figures of results, made by matplotlib or (``backend="plotly"``) plotly.

Nothing is shown, and no global setting is read or changed: save a figure with
``figure.savefig(path)`` (plotly: ``figure.write_html(path)``); a notebook shows the figure at the
end of a cell.
"""

from qkvnorm_lens.plots.attention_views import (
    View,
    attention,
    attention_rows,
    fragile_text,
)
from qkvnorm_lens.plots.cache import cache_by_depth
from qkvnorm_lens.plots.charts import save
from qkvnorm_lens.plots.collapse import (
    collapse_chart as collapse_chart,
    collapse_curve,
    margins_chart as margins_chart,
    name_of as name_of,
    row_margins,
)
from qkvnorm_lens.plots.heads import HeadCells as HeadCells, head_cells as head_cells, head_map
from qkvnorm_lens.plots.interference import interference_by_depth
from qkvnorm_lens.plots.rank import rank_by_depth
from qkvnorm_lens.plots.sparsity import sparsity_histogram
from qkvnorm_lens.plots.spectrum import spectrum_by_depth
from qkvnorm_lens.plots.spread import spread_bands
from qkvnorm_lens.plots.sweep import accuracy_curve
from qkvnorm_lens.plots.symmetry import symmetry_by_depth
from qkvnorm_lens.plots.training import training_curves

__all__ = [
    "collapse_curve", "head_map", "row_margins", "attention", "attention_rows", "fragile_text",
    "View", "spread_bands", "interference_by_depth", "accuracy_curve", "sparsity_histogram",
    "cache_by_depth", "rank_by_depth", "spectrum_by_depth", "symmetry_by_depth", "training_curves",
    "save",
]  # fmt: skip
