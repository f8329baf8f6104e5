"""One corpus, one model and one measure: counted block by block, saved, stopped and resumed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Protocol, runtime_checkable

from hooks.arguments import (
    brief,
    check_booleans,
    check_integers,
    check_number,
    check_optional,
    check_path,
)
from hooks.corpus.cut import Block, Cut, OtherDocuments, Window, tokenizer_digest
from hooks.corpus.freeing import giving_back
from hooks.corpus.pack import check_packing, prompts_of
from hooks.corpus.part import Part, differing, left_out
from hooks.corpus.ranks import gathered, rank_and_size
from hooks.corpus.read import Documents
from hooks.corpus.shards import together
from hooks.corpus.stopping import Stopped, Stopping
from hooks.model import HookedModel, Prompts, counting
from hooks.sites import LayerSites, attention_facts, choose_layers, sites_for

EVERY = 60.0
"""Seconds between two states on disk."""
_CONTEXT: Final = 1024  # tokens of a window, where the model's own context is longer
_LEAST: Final = 16  # prompts, before a standard error over them ends a run


@runtime_checkable
class Sums(Protocol):
    """What is counted of a corpus, in a size that does not grow."""

    settings: Any
    engines: tuple[str, ...]

    def count(self, model: HookedModel, prompts: Prompts, number: int) -> Any:
        """Measure a block, whose first prompt's noise is drawn under this number."""

    def add(self, counted: Any, prompts: Prompts) -> None:
        """Add what was measured."""

    def answer(self) -> tuple[float, float]:
        """The sigma at which 1% collapse, and its error; NaN where none is measured."""

    def report(self, model: Mapping[str, Any]) -> Any:
        """What was counted so far, as a report; ``model["corpus"]`` says of what."""

    def restore(self, report: Any) -> None:
        """Go on from such a report."""


def shard_of(shard: Any) -> tuple[int, int]:
    """A pair (i, n) with 1 <= i <= n."""
    wanted = "a pair (i, n), i from 1 to n"
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise ValueError(f"shard: wanted {wanted}; got {brief(shard)}")
    (first,), (of,) = (check_integers(shard=(x, 1)) for x in shard)
    if first > of:
        raise ValueError(f"shard: wanted {wanted}; got {brief(shard)}")
    return first, of


class Run:
    """A corpus, a model, and what is counted.

    Args:
        sums: what is counted, from the layers that are measured and the first block's prompts.
        measure, options: its name and, where its settings are not known from the start, those.
        layers: block indices; default: every attention layer.
        batch_size: prompts that share a pass.
    """

    def __init__(
        self,
        model: HookedModel,
        dataset: Any,
        sums: Callable[[tuple[LayerSites, ...], Prompts], Sums],
        *,
        measure: str,
        options: Mapping[str, str] | None,
        layers: Sequence[int] | None,
        batch_size: int,
        split: str | None,
        column: str | None,
        context: int | None,
        tokens: int | None,
        until: float | None,
        prepend_bos: bool | None,
        pack: bool,
        name: str | None,
    ) -> None:
        self.model, self.name = model, name
        self.begin, self.layers, self.batch_size = sums, layers, batch_size
        self.documents = Documents(dataset, split, column)
        known = int(getattr(getattr(model, "cfg", None), "n_ctx", 0) or 0)
        usual = min(_CONTEXT, known or _CONTEXT)
        self.context, limit = check_integers(
            context=(usual if context is None else context, 2),
            tokens=(1 if tokens is None else tokens, 1),
        )
        if known and self.context > known:
            raise ValueError(f"context: wanted at most the model's {known} tokens; got {context}")
        self.limit = None if tokens is None else limit
        self.until = None
        if until is not None:
            wanted = "percentage points above 0"
            self.until = check_number("until", until, wanted, lambda x: x > 0)
        (self.prepend_bos,) = check_optional(prepend_bos=prepend_bos)
        (self.pack,) = check_booleans(pack=pack)
        self.cut = self._cutting((1, 1))
        self.sums: Sums | None = None
        self.facts: Callable[[], dict[str, Any]] | None = None
        self.model_facts: dict[str, Any] = {}
        self.done: dict[str, Any] = {"complete": False, "tokens": 0, "prompts": 0, "windows": []}
        self.what = {
            "measure": measure,
            "options": options,
            "dataset": self.documents.name,
            "split": self.documents.split,
            "column": self.documents.column,
            "context": self.context,
            "tokens": self.limit,
            "until": self.until,
            "prepend_bos": self.prepend_bos,
            "pack": self.pack,
            "batch_size": batch_size,
            "tokenizer": tokenizer_digest(model),
        }

    def _cutting(self, shard: tuple[int, int]) -> Cut:
        return Cut(
            self.model,
            self.documents,
            context=self.context,
            batch_size=self.batch_size,
            most=self.limit,
            prepend_bos=self.prepend_bos,
            pack=self.pack,
            shard=shard,
        )

    def __call__(
        self,
        shard: tuple[int, int] | None,
        out: str | os.PathLike[str] | None,
        save_every: float | None,
        progress: bool | None,
    ) -> Any:
        """The report: of a shard, or of all processes together."""
        rank, size = rank_and_size() if shard is None else (0, 1)
        mine = (rank + 1, size) if shard is None else shard_of(shard)
        if mine[1] > 1 and self.until is not None:
            raise ValueError(
                f"until: wanted one process, as shards do not see each other's rows (tokens= ends "
                f"them alike); got {mine[1]} shards"
            )
        save_every = EVERY if save_every is None else save_every
        every = check_number("save_every", save_every, "seconds above 0", lambda x: x > 0)
        (progress,) = check_optional(progress=progress)
        if out is None:
            report = self._go(mine, None, every, progress)
        else:
            part = Part(check_path("out", out), mine)
            with part.locked():
                report = self._go(mine, part, every, progress)
        if shard is None and size > 1:
            reports = gathered(report, rank, size)
            report = together(reports, [f"rank {i}" for i in range(size)])
        return report

    def _go(
        self, shard: tuple[int, int], part: Part | None, every: float, progress: bool | None
    ) -> Any:
        """Count the shard, from where its part ends."""
        self.shard, self.part, self.cut = shard, part, self._cutting(shard)
        total = None if self.limit is None else -(-self.limit // shard[1])
        bar = counting(total, "corpus", "token", progress)
        with bar as self.bar, giving_back(), Stopping() as self.stopping:
            self.bar.unit_scale = True
            try:
                self._count(every)
            except Stopped as stop:
                raise self._stopped(stop) from stop
            except OtherDocuments:
                raise ValueError(
                    f"dataset: wanted the documents that were read when {part and part.path} was "
                    "written; got others"
                ) from None
        if self.sums is None:
            read = f" ({self.cut.documents} documents, {self.cut.empty} of them empty)"
            empty = read if self.cut.documents else ""
            raise ValueError(
                f"dataset: wanted a text of two tokens or more; got none in {self.documents.name!r}"
                f"{empty}"
            )
        if self.facts is not None:
            for name, (was, now) in differing(self.model_facts, self.facts()):
                raise ValueError(
                    f"model: wanted it unchanged while it is probed; got another {name}: "
                    f"{brief(now)} after {brief(was)}"
                )
        return self._save()

    def _count(self, every: float) -> None:
        saved = time.monotonic()
        for block in self.cut.blocks(self._begin):
            sums = self.sums
            assert sums is not None
            self._measure(sums, block)
            self._show(sums, block.tokens)
            if self._enough(sums):
                break
            if self.part is not None and time.monotonic() - saved > every:
                self._save()
                saved = time.monotonic()
        if self.sums is None or self.done["complete"]:
            return
        own = range(self.shard[0] - 1, self.cut.groups, self.shard[1])
        windows = self.done["windows"] + [0] * (len(own) - len(self.done["windows"]))
        self.done |= {**self.cut.state(), "blocks": 0, "windows": windows, "complete": True}

    def _begin(self, windows: Sequence[Window]) -> Mapping[str, Any]:
        """With the first block: check the model, and go on from the part that is there."""
        if self.pack:
            check_packing(self.model, self.context)
        prompts = prompts_of(self.model, windows, pack=self.pack)
        sites = sites_for(self.model, prompts)
        chosen = choose_layers(sites, self.layers)
        self.facts = partial(attention_facts, self.model, sites, chosen, prompts, self.name)
        self.model_facts, sums = self.facts(), self.begin(chosen, prompts)
        if self.part is not None:
            fresh = SimpleNamespace(settings=sums.settings, model=self._told())
            report = self.part.load(fresh)
            if report is not None:
                self.done = dict(report.model["corpus"]["done"])
                sums.restore(report)
        self.sums = sums
        self.bar.initial = self.done["tokens"]  # no part of this run's speed
        self._show(sums, self.done["tokens"])
        return self.done

    def _measure(self, sums: Sums, block: Block) -> None:
        """Count a block, and note how far the corpus was read."""
        prompts = prompts_of(self.model, block.windows, pack=self.pack)
        counted = sums.count(self.model, prompts, block.number)
        with self.stopping.whole():
            sums.add(counted, prompts)
            before, own = self.done["windows"], block.group // self.shard[1]
            windows = before + [0] * (own + 1 - len(before))
            windows[own] += len(prompts)
            self.done |= {**self.cut.state(), "blocks": block.index + 1, "windows": windows}
            self.done["tokens"] += block.tokens
            self.done["prompts"] += len(prompts)

    def _show(self, sums: Sums, tokens: int) -> None:
        self.bar.update(tokens)
        if not self.bar.disable:
            sigma, error = (100 * x for x in sums.answer())
            if not math.isnan(sigma):
                known = "" if math.isnan(error) else f" ± {error:.1g}"
                self.bar.set_postfix_str(f"1% at sigma = {sigma:.3g}{known}%")

    def _enough(self, sums: Sums) -> bool:
        """Whether the error of the sigma at 1% is small enough."""
        if self.until is None or self.done["prompts"] < _LEAST:
            return False
        return bool(100 * sums.answer()[1] < self.until)

    def _told(self) -> dict[str, Any]:
        """Facts of the model, and of the corpus."""
        corpus = {"what": self.what, "shard": list(self.shard), "done": self.done}
        given = [*self.model_facts.get("given", ()), *left_out(self.done)]
        told = {**self.model_facts, "given": given, "corpus": corpus}
        engines = ", ".join(self.sums.engines) if self.sums else ""
        return told | ({"engine": engines} if engines else {})

    def _save(self) -> Any:
        assert self.sums is not None
        report = self.sums.report(self._told())
        if self.part is not None:
            with self.stopping.whole():
                self.part.save(report)
        return report

    def _stopped(self, stop: Stopped) -> Stopped:
        """Save what was counted; the error that says so."""
        said = "nothing was kept (out= keeps it)"
        if self.part is not None:
            if self.sums is not None and "blocks" in self.done:
                with self.stopping.whole(last=True):  # torchrun repeats what it is sent
                    self.part.save(self.sums.report(self._told()))
            said = "the same command goes on from there"
        return Stopped(f"stopped after {self.done.get('tokens', 0)} tokens; {said}", stop.signal)
