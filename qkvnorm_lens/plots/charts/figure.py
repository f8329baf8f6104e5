"""Figures that a notebook shows without pyplot."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import figure

from qkvnorm_lens.plots.charts.saving import embedded


class Figure(figure.Figure):
    """A figure that a cell ending with it shows, whether or not pyplot has made figures before.

    Files have their fonts inside: TrueType (type 42) in PDF, outlines in SVG.
    """

    def savefig(self, *args: Any, **options: Any) -> None:
        """As matplotlib does it."""
        with embedded():
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()
