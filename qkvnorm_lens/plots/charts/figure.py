"""Figures that a notebook shows without pyplot."""

from __future__ import annotations

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A figure that a cell ending with it shows, whether or not pyplot has made figures before."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()
