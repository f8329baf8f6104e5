"""Sums of a whole probe, filled layer by layer and batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hooks.collapse.report import CollapseReport
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.showing import Showing
from hooks.collapse.table import COMPLETE, TableParts
from hooks.model import Prompts
from hooks.sites import LayerSites


class Tally:
    """What has been counted so far, and the table of the most fragile rows."""

    def __init__(
        self,
        settings: ProbeSettings,
        layers: tuple[LayerSites, ...],
        n_prompts: int,
        first_prompt: int = 0,
        starts: tuple[tuple[int, ...], ...] = (),
        cutoff: float = COMPLETE,
    ) -> None:
        self.settings = settings
        self.starts = starts or ((0,),) * n_prompts
        self.first_prompt = first_prompt
        self.layers = layers
        self.biased = any(s.has_bias for s in layers)
        n_s, n_d, n_l = len(settings.sigmas), settings.draws, len(layers)
        n_h = max(s.n_heads for s in layers)
        sampled = n_d if settings.method == "sample" else 0
        per_row = (n_l, n_h, n_prompts)
        self.counts = {
            name: np.zeros(per_row, dtype=np.int64) for name in ("examined", "single_key", "ties")
        }
        self.rows = np.zeros((*per_row, 2), dtype=np.int64)
        self.able = np.zeros((*per_row, 2), dtype=np.int64)
        self.level = np.zeros((*per_row, 2))
        self.sums = {n: np.zeros((n_s, *per_row, 2)) for n in ("loose", "strict", "centred")}
        n_b = n_s if settings.strict == "computed" else 0
        self.bounds = {n: np.zeros((n_b, n_l, n_h, 2)) for n in ("strict_low", "strict_high")}
        self.draws = {
            "loose": np.zeros((n_s, sampled, n_l, n_h, 2)),
            "strict": np.zeros((n_s, n_d, n_l, n_h, 2)),
            "centred": np.zeros((n_s, sampled, n_l, n_h, 2)),
        }
        self.parts = TableParts(settings.keep, biased=self.biased, cutoff=cutoff)
        self.showing = Showing(settings.keep_rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums, by the names of the report's fields."""
        draws = {f"{name}_draws": values for name, values in self.draws.items()}
        beside = {"rows": self.rows, "able": self.able, "level": self.level}
        return {**beside, **self.counts, **self.sums, **self.bounds, **draws}

    def report(self, *, model: Mapping[str, Any], prompts: Prompts) -> CollapseReport:
        """The frozen result."""
        table = self.parts.table()
        kept = self.showing.rows(self.settings, self.layers, self.first_prompt, float(table.cutoff))
        return CollapseReport(
            settings=self.settings,
            model=model,
            first_prompt=self.first_prompt,
            tokens=prompts.strings,
            decoder_tokens=prompts.decoder_strings,
            starts=self.starts,
            padding=np.asarray(prompts.padding, dtype=np.int64),
            table=table,
            moments=np.zeros((0, len(self.layers) * (self.rows.shape[1] + 1) + 1)),
            **self.arrays(),
            kept=kept,
        )
