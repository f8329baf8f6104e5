"""An experiment that counts what is worked on."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd

from qkvnorm_lens.experiments.core.base import Experiment, Part, Subject

NOBODY = Subject("nobody", "language", None, "", "nobody", None, "0")


class Counting:
    """An experiment of three parts that counts how often each is worked on."""

    def __init__(self, fail_at: str = "") -> None:
        self.worked: list[str] = []
        self.fail_at = fail_at
        self.settings = {"n": 3}
        self.subject = NOBODY

    def work(self, key: str) -> pd.DataFrame:
        if key == self.fail_at:
            raise KeyboardInterrupt
        self.worked.append(key)
        values = [1 / 3, math.nan, math.inf, 10.0**-300]
        return pd.DataFrame({"part": key, "x": values, "n": [1, 2, 3, 4]})

    def experiment(self, version: int = 1) -> Experiment:
        def figure(table: pd.DataFrame) -> Any:
            from qkvnorm_lens.plots.charts.style import new_figure

            return new_figure((1.0, 1.0))

        def parts(subjects: tuple[Subject, ...], size: str) -> list[Part]:
            return [
                Part(key, partial(self.work, key), self.subject, self.settings) for key in "abc"
            ]

        return Experiment(
            name="counting",
            title="Counts",
            source="nowhere",
            models="any",
            minutes={"smoke": 0.0, "quick": 0.0, "full": 0.0},
            parts=parts,
            figure=figure,
            text=lambda table: f"{len(table)} rows",
            version=version,
        )
