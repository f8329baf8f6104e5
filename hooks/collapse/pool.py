"""Sums of a corpus, block by block, in a size that does not grow."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from hooks.collapse.kept import join_kept, no_rows
from hooks.collapse.pooled import SHOWN, kept_numbers, over_prompts, shown_prompts, within
from hooks.collapse.probe import Options, count
from hooks.collapse.report import CollapseReport
from hooks.collapse.showing import Showing
from hooks.collapse.solve import first_crossing
from hooks.collapse.table import TableParts
from hooks.collapse.tally import Tally
from hooks.model import HookedModel, Prompts
from hooks.sites import LONGEST, LayerSites

_HELD: Final = 4 * SHOWN  # prompts whose tokens are held before those not needed are dropped


class Pool:
    """What has been counted of a corpus, or of one shard of it.

    ``padded``: prompts of different lengths share a pass (:func:`hooks.sites.may_always_share`).
    """

    def __init__(
        self, options: Options, layers: tuple[LayerSites, ...], *, padded: bool = False
    ) -> None:
        self.options, self.padded = options, padded
        self.settings = replace(options.settings, layers=tuple(s.layer for s in layers))
        self.layers = layers
        self.prompts = self.read = 0  # and their tokens
        self.engines: tuple[str, ...] = ()  # that reduced them
        nothing = {**Tally(self.settings, layers, 1).arrays(), "padding": np.zeros(1, np.int64)}
        self._arrays: dict[str, Any] = over_prompts(CollapseReport, nothing)
        self._parts = TableParts(self.settings.keep, biased=any(s.has_bias for s in layers))
        self._showing, self._kept = Showing(self.settings.keep_rows), no_rows()
        self._numbers: dict[str, int] = {}
        self._starts: dict[int, tuple[int, ...]] = {}  # of prompts that hold several documents
        self._words: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def count(self, model: HookedModel, prompts: Prompts, number: int) -> Tally:
        """Measure a block; :meth:`add` adds it.

        The noise of its first prompt is drawn under ``number``.
        """
        tally = Tally(
            self.settings, self.layers, len(prompts), number, prompts.starts, self._parts.cutoff
        )
        padded = self.padded and 0 < max(prompts.lengths, default=0) <= LONGEST
        ran = count(model, prompts, tally, self.options, padded=padded, progress=False)
        self.engines = tuple(dict.fromkeys((*self.engines, ran)))
        return tally

    def add(self, tally: Tally, prompts: Prompts) -> None:
        """Add a block's sums, rows and tokens."""
        first, padding = self.prompts, np.asarray(prompts.padding, dtype=np.int64)
        arrays = over_prompts(CollapseReport, {**tally.arrays(), "padding": padding})
        self._arrays = {name: self._arrays[name] + x for name, x in arrays.items()}
        self._parts.absorb(tally.parts, first)
        self._showing.absorb(tally.showing, first, tally.first_prompt)
        decoder = prompts.decoder_strings or ((),) * len(prompts)
        for at, words in enumerate(zip(prompts.strings, decoder, strict=True)):
            mine, other = (tuple(map(sys.intern, some)) for some in words)
            self._words[first + at] = (mine, other)
        self._starts |= {first + i: x for i, x in enumerate(prompts.starts) if len(x) > 1}
        self.read += sum(map(len, prompts.strings))
        self.prompts = first + len(prompts)
        if len(self._words) > _HELD:
            table = self._parts.unordered()
            self._starts = within(self._starts, table)
            shown = shown_prompts(table, self._document_starts())
            self._words = {at: self._words[at] for at in self._words if at in shown}

    def answer(self) -> tuple[float, float]:
        """The sigma at which 1% of the rows collapse, between two of the grid, and its error."""
        report = self._report({}, TableParts(1, biased=False), with_rows=False)
        loose, rows = report.loose.sum((1, 2, 3, 4))[:, None], np.atleast_1d(report.rows.sum())
        sigma = first_crossing(self.settings.sigmas, loose, 0.01, rows)
        return float(sigma[0]), report.sigma_error(0.01)

    def report(self, model: Mapping[str, Any]) -> CollapseReport:
        """The report of what was counted so far."""
        return self._report(model, self._parts, with_rows=True)

    def _report(
        self, model: Mapping[str, Any], parts: TableParts, *, with_rows: bool
    ) -> CollapseReport:
        table, kept, shown = parts.table(), no_rows(), set[int]()
        if with_rows:
            cutoff = float(table.cutoff)
            mine = self._showing.rows(self.settings, self.layers, 0, cutoff)
            keep = self.settings.keep_rows
            kept = join_kept(self._kept, mine, prompts=0, keep=keep, cutoff=cutoff)
            self._starts = within(self._starts, table)
            shown = shown_prompts(table, self._document_starts())
            numbers = {**self._numbers, **self._showing.numbers()}
            model = {**model, "numbers": kept_numbers(numbers, kept)}
        none: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        prompts = range(self.prompts if with_rows else 0)
        words = [self._words.get(i, none) if i in shown else none for i in prompts]
        decoded = any(decoder for _, decoder in self._words.values())
        return CollapseReport(
            settings=self.settings,
            model=model,
            first_prompt=0,
            tokens=tuple(mine for mine, _ in words),
            decoder_tokens=tuple(decoder for _, decoder in words) if decoded else (),
            starts=self._document_starts() if with_rows else (),
            table=table,
            kept=kept,
            read=np.array([self.read], np.int64),
            **self._arrays,
        )

    def _document_starts(self) -> tuple[tuple[int, ...], ...]:
        """First tokens of each prompt, where a row of the table is; none, if none is packed."""
        alone = (0,)
        starts = (self._starts.get(i, alone) for i in range(self.prompts))
        return tuple(starts) if self._starts else ()

    def restore(self, report: CollapseReport) -> None:
        """Go on from a report that :meth:`report` gave."""
        self._arrays = {n: getattr(report, n) for n in _summed(report)}
        self._parts.add(report.table)
        self.engines = (str(report.model["engine"]),) if report.model.get("engine") else ()
        self._kept, self.prompts, self.read = report.kept, len(report.tokens), report.n_tokens
        self._starts = {i: x for i, x in enumerate(report.starts) if len(x) > 1}
        self._numbers = dict(report.model.get("numbers", {}))
        decoder = report.decoder_tokens or ((),) * len(report.tokens)
        words = enumerate(zip(report.tokens, decoder, strict=True))
        self._words = {at: both for at, both in words if both[0]}


def _summed(report: CollapseReport) -> list[str]:
    """Arrays that a block's sums are added to."""
    sized = [n for n, x in vars(report).items() if isinstance(x, np.ndarray)]
    return [name for name in sized if name != "read"]
