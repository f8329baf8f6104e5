"""Sweeps, spreads and interference of a whole corpus, in constant memory."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np

from hooks.arguments import brief, check_booleans
from hooks.corpus.run import Run
from hooks.measures.interference import InterferenceReport, interference
from hooks.measures.spread import SpreadReport, spread
from hooks.measures.sweep import SweepReport, sweep
from hooks.model import HookedModel, Prompts, measurement

_MEASURES: Final = (sweep, spread, interference)
_OF_THE_CORPUS: Final = {
    "model", "tokens", "decoder_tokens", "targets", "attention_mask", "prepend_bos",
    "first_prompt", "progress", "name",
}  # fmt: skip
_PLACES: Final = ("norms", "position", "prompt")  # of a spread, no sums


@measurement
def measure_corpus(
    model: HookedModel,
    dataset: Any,
    measure: Any,
    *,
    split: str | None = None,
    column: str | None = None,
    context: int | None = None,
    tokens: int | None = None,
    prepend_bos: bool | None = None,
    pack: bool = False,
    out: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    save_every: float | None = None,
    name: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> SweepReport | SpreadReport | InterferenceReport:
    """A sweep, spread or interference of a whole data set, in memory that does not grow with it.

    R = sum_i x_i / sum_i c_i over the windows i of all documents, as :func:`probe_corpus` reads,
    cuts, packs, saves, resumes and deals them. The report is pooled: sums over all prompts, with
    what their standard errors need; of a spread, the weight of each norm
    (:meth:`SpreadReport.pooled`).

    Args:
        model, dataset, split, column, context, tokens, prepend_bos, pack: as for
            :func:`probe_corpus`.
        measure: :func:`sweep`, :func:`spread` or :func:`interference`.
        out, shard, save_every, name, progress: as for :func:`probe_corpus`; :func:`merge_corpus`
            puts shards together.
        **options: those of the measure.

    Returns:
        The measure's report; of a shard, the sums of its own part.

    Raises:
        UnsupportedModelError: the model failed the self-check, or a check of the measure.
        TypeError: another measure, or an option that it does not have.
        ValueError: ``pack`` with interference; and as for :func:`probe_corpus`.
        Stopped: as there.
    """
    if not any(measure is known for known in _MEASURES):
        raise TypeError(
            "measure: wanted hooks.sweep, hooks.spread or hooks.interference (hooks.probe_corpus "
            f"is the collapse probe's); got {brief(measure)}"
        )
    (pack,) = check_booleans(pack=pack)
    if pack and measure is interference:
        raise ValueError(
            "pack: wanted False with hooks.interference, whose constant is the median scale of a "
            "document's own tokens; got True"
        )
    known = inspect.signature(measure).parameters
    wanted = sorted({*known} - _OF_THE_CORPUS)
    for option in options:
        if option not in wanted:
            raise TypeError(f"options: wanted some of {wanted}; got {option!r}")
    run = Run(
        model,
        dataset,
        lambda layers, prompts: _Pooled(model, measure, options, prompts),
        measure=measure.__name__,
        options={name: repr(value) for name, value in sorted(options.items())},
        layers=options.get("layers"),
        batch_size=options.get("batch_size", known["batch_size"].default),
        split=split,
        column=column,
        context=context,
        tokens=tokens,
        until=None,
        prepend_bos=prepend_bos,
        pack=pack,
        name=name,
    )
    report: SweepReport | SpreadReport | InterferenceReport = run(shard, out, save_every, progress)
    return report


class _Pooled:
    """The pooled report of what was counted so far."""

    settings: Any = None  # those of the report
    engines: tuple[str, ...] = ()

    def __init__(
        self, model: HookedModel, measure: Any, options: Mapping[str, Any], first: Prompts
    ) -> None:
        self.model, self.measure, self.options, self.first = model, measure, options, first
        self.numbered = "first_prompt" in inspect.signature(measure).parameters
        self._total: Any = None

    def count(self, model: HookedModel, prompts: Prompts, number: int) -> Any:
        """Measure a block; its first prompt's noise is drawn under ``number``."""
        numbered = {"first_prompt": number} if self.numbered else {}
        report = self.measure(model, prompts, progress=False, **numbered, **self.options)
        return report.pooled()

    def add(self, counted: Any, prompts: Prompts) -> None:
        """Add a block."""
        if self._total is not None:
            n = len(self._total.tokens) + len(prompts)
            counted = replace(self._total.alongside(counted), tokens=((),) * n)
        self._total = counted

    def answer(self) -> tuple[float, float]:
        """None of the collapse probe's."""
        return float("nan"), float("nan")

    def report(self, model: Mapping[str, Any]) -> Any:
        """What was counted so far."""
        if self._total is None:  # a shard without documents: no prompt, and zero in each sum
            one = self.count(self.model, self.first.some([0]), 0)
            arrays = {f.name: _zero(getattr(one, f.name)) for f in fields(one)}
            sums = {n: x for n, x in arrays.items() if n not in ("norms", "position", "prompt")}
            return replace(
                one, **{n: x for n, x in sums.items() if x is not None}, tokens=(), model=model
            )
        return replace(self._total, model=model)

    def restore(self, report: Any) -> None:
        """Go on from a report that :meth:`report` gave."""
        self._total = report if report.tokens else None


def _zero(value: Any) -> Any:
    """An array, or a tuple of arrays, of zeros; None for anything else."""
    if isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
        return tuple(np.zeros_like(x) for x in value)
    return np.zeros_like(value) if isinstance(value, np.ndarray) else None
