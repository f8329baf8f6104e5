"""Figures that a notebook shows without pyplot."""

from __future__ import annotations

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A cell that ends with it shows it, whether or not pyplot has made figures before."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()
