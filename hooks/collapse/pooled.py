"""Reports whose prompts are pooled: their size does not grow with the corpus.

Sums over all prompts, and for the standard errors the moments of the prompts' sums. Tokens stay
where the most fragile rows are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, get_type_hints

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import check_choice, check_number
from hooks.collapse.kept import KeptRows, join_kept
from hooks.collapse.settings import By
from hooks.collapse.solve import error_of_crossing
from hooks.collapse.table import join
from hooks.reports import (
    CorpusReport,
    first_tokens,
    moments,
    one_model,
    prompt_axes,
    se_moments,
    se_prompts,
)

if TYPE_CHECKING:
    from hooks.collapse.table import RowTable

SHOWN: Final = 256
"""Most fragile rows whose prompts' tokens a pooled report keeps; as many that are no sinks."""
Words = tuple[tuple[str, ...], ...]


class PooledReport(CorpusReport):
    """What a report of many prompts can do."""

    @property
    def n_tokens(self: Any) -> int:
        """Tokens of all prompts."""
        return int(self.read.sum()) if self.settings.pooled else sum(map(len, self.tokens))

    def pooled(self: Any) -> Any:
        """This report with sums over all prompts in place of sums for each.

        All rates, thresholds, standard errors and rows stay. The tokens of a prompt are left out,
        and positions stand for them, unless one of the 256 most fragile rows is there, sinks
        counted or not.
        """
        if self.settings.pooled:
            return self
        arrays = {n: getattr(self, n) for n in prompt_axes(type(self))}
        packed = any(len(starts) > 1 for starts in self.starts)
        shown = shown_prompts(self.table, self.starts)
        return replace(
            self,
            settings=replace(self.settings, pooled=True),
            read=np.array([self.n_tokens]),
            tokens=some(self.tokens, shown),
            decoder_tokens=some(self.decoder_tokens, shown),
            starts=self.starts if packed else (),
            **over_prompts(type(self), arrays),
        )

    def merge(self: Any, later: Any) -> Any:
        """The report of both corpora, as if they had been measured in one run.

        If one of the two is pooled, both are pooled first.

        Args:
            later: a report of the same model and settings whose first prompt follows this one's
                last: measured with ``first_prompt=len(report.tokens)``.

        Raises:
            TypeError: another kind of report.
            ValueError: other settings, another model, or prompts that do not follow.
        """
        first, second = self, later
        if isinstance(later, type(self)) and self.settings.pooled != later.settings.pooled:
            first, second = self.pooled(), later.pooled()
        return super(PooledReport, first).merge(second)

    def placed(self: Any, places: Int[np.ndarray, "prompt"], n: int) -> Any:
        """This shard's report, with its prompts at their ``places`` among the ``n`` of a corpus."""
        words: dict[str, Any] = {}
        for name in _WORDS:
            rows = [()] * (n if name == "tokens" or getattr(self, name) else 0)
            for at, row in zip(places, getattr(self, name), strict=False):
                rows[at] = row
            words[name] = tuple(rows)
        table, kept = (
            replace(rows, prompt=places[rows.prompt].astype(np.int32))
            for rows in (self.table, self.kept)
        )
        starts = [(0,)] * (n if self.starts else 0)
        for at, mine in zip(places, self.starts, strict=False):
            starts[at] = mine
        numbers = {str(places[int(p)]): x for p, x in self.model.get("numbers", {}).items()}
        model = {**self.model, "numbers": numbers}
        return replace(self, table=table, kept=kept, starts=tuple(starts), model=model, **words)

    def alongside(self: Any, later: Any) -> Any:
        """The report of two shards, pooled, whose prompts are numbered as those of the corpus.

        Raises:
            ValueError: other settings, or another model.
        """
        one_model(self, later)
        added = {
            name: getattr(self, name) + getattr(later, name)
            for name, kind in get_type_hints(type(self)).items()
            if hasattr(kind, "dim_str")
        }
        mine, other = (self, later) if len(self.tokens) >= len(later.tokens) else (later, self)
        words = {n: _either(getattr(mine, n), getattr(other, n)) for n in _WORDS}
        starts = self.starts or later.starts
        if self.starts and later.starts:
            starts = tuple(max(x, key=len) for x in zip(self.starts, later.starts, strict=True))
        both = self._both(later, 0, words, starts)
        if starts:  # of the rows that both keep together
            known = within(dict(enumerate(starts)), both["table"])
            both["starts"] = tuple(known.get(i, (0,)) for i in range(len(starts)))
        numbers = {**self.model.get("numbers", {}), **later.model.get("numbers", {})}
        model = {**self.model, "numbers": kept_numbers(numbers, both["kept"])}
        return replace(self, **added, **both | {"model": model})

    def _beside(self: Any, later: Any) -> dict[str, Any]:
        """What a merged report has of both beside sums."""
        words = {name: getattr(self, name) + getattr(later, name) for name in _WORDS}
        both = self.document_starts + later.document_starts
        starts = both if self.starts or later.starts else ()
        more: dict[str, Any] = self._both(later, len(self.tokens), words, starts)
        return {"starts": starts, **more}

    def _both(
        self: Any,
        later: Any,
        before: int,
        words: Mapping[str, Words],
        starts: Sequence[Sequence[int]] = (),
    ) -> dict[str, Any]:
        """Table and rows of both, ``before`` prompts apart: the most fragile, as many as are kept.

        Tokens are those that the table's rows need.
        """
        moved = replace(later.table, prompt=later.table.prompt + np.int32(before))
        table = join(self.table, moved, self.settings.keep)
        keep, cutoff = self.settings.keep_rows, float(table.cutoff)
        kept = join_kept(self.kept, later.kept, prompts=before, keep=keep, cutoff=cutoff)
        if self.settings.pooled:
            shown = shown_prompts(table, starts)
            words = {name: some(rows, shown) for name, rows in words.items()}
        return {"table": table, "kept": kept, **words}

    def sigma_error(self: Any, rate: float = 0.01, *, by: By = "model") -> Any:
        """Standard error over prompts of the sigma at which a share ``rate`` of the rows collapses.

        se(sigma) = se(sqrt(R)) / (d sqrt(R) / d sigma), by the delta method, from the rates R and
        their standard errors at the two sigmas of the grid around it (``se_prompts`` of
        :meth:`to_frame`), between which the root of R is taken as a line.

        Args:
            rate: share of the rows, in (0, 1).
            by: ``"model"`` for one number, ``"layer"`` for a Series, ``"head"`` for a frame of
                layers by heads.

        Returns:
            NaN where there is one prompt only, or where no sigma of the grid reaches the rate.

        Raises:
            TypeError, ValueError: a wrong argument.
        """
        rate = check_number("rate", rate, "a share between 0 and 1", lambda x: 0 < x < 1)
        check_choice("by", by, tuple(_AXES))
        n_layers, n_heads = self.rows.shape[:2]
        axes = _AXES[by]
        loose = self.loose.sum((-1, -2)).sum(axes).reshape(len(self.settings.sigmas), -1)
        counts = self.rows.sum((-1, -2)).sum(axes).reshape(-1)
        errors = self.error_over_prompts(by).reshape(loose.shape)
        found = error_of_crossing(self.settings.sigmas, loose, errors, rate, counts)
        if by == "model":
            return float(found[0])
        layers = pd.Index(self.settings.layers, name="layer")
        if by == "layer":
            return pd.Series(found, index=layers, name="sigma_error")
        heads = pd.RangeIndex(n_heads, name="head")
        return pd.DataFrame(found.reshape(n_layers, n_heads), index=layers, columns=heads)

    def error_over_prompts(self: Any, by: By) -> Float[np.ndarray, "sigma *group"]:
        """Standard error over prompts of the loose rate of each head, each layer or the model."""
        axes = tuple(a - 1 for a in _AXES[by])
        loose, rows = self.loose.sum(-1).sum(axes), self.rows.sum(-1).sum(axes)  # [..., prompt]
        if not self.settings.pooled:
            return se_prompts(loose, rows)
        n_layers, n_heads = self.rows.shape[:2]
        ends = np.cumsum([0, n_layers * n_heads, n_layers, 1])
        at = ("head", "layer", "model").index(by)
        mine = self.moments[:, ends[at] : ends[at + 1]]
        return se_moments(mine.reshape(-1, *rows.shape[:-1]), loose[..., 0], rows[..., 0])


_WORDS: Final = ("tokens", "decoder_tokens")
_AXES: Final = {"head": (), "layer": (-1,), "model": (-2, -1)}


def over_prompts(report: type, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a report with their axis of prompts added up to one entry, and the moments."""
    axes = prompt_axes(report)
    pooled = {n: x.sum(axes[n], keepdims=True) if n in axes else x for n, x in arrays.items()}
    loose, rows = arrays["loose"].sum(-1), arrays["rows"].sum(-1)
    return pooled | {"moments": moments(_groups(loose), _groups(rows))}


def _groups(x: np.ndarray) -> np.ndarray:
    """Sums of every head, then every layer, then the model: ``[..., group, prompt]``."""
    by_layer = x.sum(-2)
    heads = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return np.concatenate([heads, by_layer, by_layer.sum(-2, keepdims=True)], axis=-2)


def kept_numbers(numbers: Mapping[Any, int], kept: KeptRows) -> dict[str, int]:
    """Under which numbers the noise of the kept rows' prompts is drawn."""
    prompts = map(str, sorted({*kept.prompt.tolist()}))
    return {p: numbers[p] for p in prompts if p in numbers}


def within(starts: Mapping[int, tuple[int, ...]], table: RowTable) -> dict[int, tuple[int, ...]]:
    """First tokens of the prompts that a table has rows of."""
    return {p: starts[p] for p in np.unique(table.prompt).tolist() if p in starts}


def shown_prompts(table: RowTable, starts: Sequence[Sequence[int]]) -> set[int]:
    """Prompts of the table's most fragile rows, and of the most fragile ones that are no sinks."""
    content = np.flatnonzero(~first_tokens(starts, table.prompt, table.key))
    prompts: set[int] = set()
    for rows in (np.arange(len(table)), content):
        half_width = table.half_width[rows]
        near = rows
        if len(rows) > SHOWN:  # ties at the edge stay, to be decided by the order of the rows
            near = rows[half_width <= np.partition(half_width, SHOWN - 1)[SHOWN - 1]]
        order = np.lexsort(
            [getattr(table, n)[near] for n in ("query", "prompt", "head", "layer")]
            + [table.half_width[near]]
        )
        prompts |= {int(p) for p in table.prompt[near[order[:SHOWN]]]}
    return prompts


def some(words: Words, prompts: set[int]) -> Words:
    """These prompts' tokens; none of the others."""
    return tuple(row if at in prompts else () for at, row in enumerate(words))


def _either(longer: Words, shorter: Words) -> Words:
    """Tokens that one of two shards has."""
    rest = longer[len(shorter) :]
    return tuple(a or b for a, b in zip(longer, shorter, strict=False)) + rest
