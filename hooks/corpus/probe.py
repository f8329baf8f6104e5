"""The collapse probe on a whole corpus, in constant memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

from hooks.arguments import brief, check_integers, check_number, check_optional, check_path
from hooks.collapse import CollapseReport, Pool, read_options
from hooks.corpus.cut import Block, Cut
from hooks.corpus.freeing import give_back
from hooks.corpus.part import Part, differing
from hooks.corpus.ranks import gathered, rank_and_size
from hooks.corpus.read import Documents
from hooks.corpus.shards import together
from hooks.corpus.stopping import Stopped, Stopping
from hooks.model import HookedModel, counting, encode, measurement
from hooks.sites import attention_facts, choose_layers, sites_for

EVERY = 60.0
"""Seconds between two states on disk."""
_CONTEXT: Final = 1024  # tokens of a window, where the model's own context is longer
_FREE_EVERY: Final = 1.0  # seconds
_LEAST: Final = 16  # prompts, before a standard error over them ends a run
_LEFT_OUT: Final = (("empty", "empty documents"), ("single", "windows of one token"))


@measurement
def probe_corpus(
    model: HookedModel,
    dataset: Any,
    *,
    split: str | None = None,
    column: str | None = None,
    context: int | None = None,
    tokens: int | None = None,
    until: float | None = None,
    prepend_bos: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    save_every: float | None = None,
    name: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> CollapseReport:
    """:func:`collapse_probe` on a whole data set, in memory that does not grow with it.

    R = sum_i x_i / sum_i c_i over prompts i with c_i sparse rows, x_i of them lost on average; its
    standard error comes from the sums of x_i^2, x_i c_i and c_i^2 (the linearised ratio estimator,
    Cochran 1977, section 6.4). Documents are cut into windows of ``context`` tokens, a prompt each;
    the last of a document may be shorter. The report is pooled
    (:meth:`CollapseReport.pooled`).

    With ``out`` the run can be stopped at any point: what was counted is written every
    ``save_every`` seconds and at SIGINT and SIGTERM, and the same call goes on from there and ends
    with the same report, bit for bit. Under ``torchrun``, ``accelerate launch`` or ``srun`` each
    process takes a shard, and every one returns the whole report.

    Args:
        model: as for :func:`collapse_probe`, with a tokenizer.
        dataset: a file or folder of JSON lines, parquet, CSV or text (also .gz, .bz2, .xz, .zst),
            read as a stream; an id of the Hugging Face Hub; a `datasets.Dataset`; a list of texts
            or rows. A text file is read in pieces of whole paragraphs, some 64 thousand characters
            each.
        split: of a data set of the Hub; default: its only one.
        column: the column with the text; default: ``"text"``, or the only one of text.
        context: tokens of a window; default: the model's context, at most 1024.
        tokens: end after this many; default: at the end of the data set.
        until: end when the standard error of the sigma at 1% is below this many percentage points,
            16 prompts or more; in one process only.
        prepend_bos: passed on to ``model.to_tokens``.
        out: a directory for what was counted; default: nothing is written.
        shard: (i, n), i from 1 to n: count only every n-th block of windows. :func:`merge_corpus`
            puts the parts together.
        save_every: seconds between two states in ``out``; default: 60.
        name: what the report calls the model; default: the model's own name.
        progress: show tokens a second, time left, and the answer so far; default: in a terminal or
            a notebook.
        **options: ``sigmas``, ``on``, ``method``, ``law``, ``shared``, ``layers``, ``sparse``,
            ``strict``, ``draws``, ``seed``, ``batch_size``, ``keep``, ``keep_rows`` and
            ``query_block`` of :func:`collapse_probe`.

    Returns:
        :class:`CollapseReport`; of a shard, the sums of its own part.

    Raises:
        UnsupportedModelError: the model failed the self-check.
        ValueError: nothing that can be read, a column that is missing or no text, no document, a
            window longer than the model's context, or an ``out`` with another run in it.
        Stopped: a KeyboardInterrupt; the message says where the run stopped.
    """
    run = _Run(model, dataset, split, column, context, tokens, until, prepend_bos, name, options)
    rank, size = rank_and_size() if shard is None else (0, 1)
    mine = (rank + 1, size) if shard is None else _shard(shard)
    if mine[1] > 1 and until is not None:
        raise ValueError(
            f"until: wanted one process, as shards do not see each other's rows (tokens= ends them "
            f"alike); got {mine[1]} shards"
        )
    save_every = EVERY if save_every is None else save_every
    every = check_number("save_every", save_every, "seconds above 0", lambda x: x > 0)
    (progress,) = check_optional(progress=progress)
    if out is None:
        report = run.go(mine, None, every, progress)
    else:
        part = Part(check_path("out", out), mine)
        with part.locked():
            report = run.go(mine, part, every, progress)
    if shard is None and size > 1:
        reports = gathered(report, rank, size)
        report = together(reports, [f"rank {i}" for i in range(size)])
    return report


def _shard(shard: Any) -> tuple[int, int]:
    """A pair (i, n) with 1 <= i <= n."""
    wanted = "a pair (i, n), i from 1 to n"
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise ValueError(f"shard: wanted {wanted}; got {brief(shard)}")
    (first,), (of,) = (check_integers(shard=(x, 1)) for x in shard)
    if first > of:
        raise ValueError(f"shard: wanted {wanted}; got {brief(shard)}")
    return first, of


class _Run:
    """One corpus, one model and one set of options."""

    def __init__(
        self,
        model: HookedModel,
        dataset: Any,
        split: str | None,
        column: str | None,
        context: int | None,
        tokens: int | None,
        until: float | None,
        prepend_bos: bool | None,
        name: str | None,
        options: dict[str, Any],
    ) -> None:
        self.model, self.name = model, name
        self.options = read_options(**options, pooled=True)
        self.documents = Documents(dataset, split, column)
        known = int(getattr(getattr(model, "cfg", None), "n_ctx", 0) or 0)
        usual = min(_CONTEXT, known or _CONTEXT)
        context, limit = check_integers(
            context=(usual if context is None else context, 2),
            tokens=(1 if tokens is None else tokens, 1),
        )
        if known and context > known:
            raise ValueError(f"context: wanted at most the model's {known} tokens; got {context}")
        self.limit = None if tokens is None else limit
        self.until = None
        if until is not None:
            wanted = "percentage points above 0"
            self.until = check_number("until", until, wanted, lambda x: x > 0)
        (self.prepend_bos,) = check_optional(prepend_bos=prepend_bos)
        self.cut = Cut(
            model,
            self.documents,
            context=context,
            batch_size=self.options.together(None),
            most=self.limit,
            prepend_bos=self.prepend_bos,
        )
        self.pool: Pool | None = None
        self.facts: Callable[[], dict[str, Any]] | None = None
        self.model_facts: dict[str, Any] = {}
        self.done: dict[str, Any] = {"complete": False}
        self.what = {
            "dataset": self.documents.name,
            "split": self.documents.split,
            "column": self.documents.column,
            "context": context,
            "tokens": self.limit,
            "until": self.until,
            "prepend_bos": self.prepend_bos,
            "batch_size": self.options.batch_size,
        }

    def go(
        self, shard: tuple[int, int], part: Part | None, every: float, progress: bool | None
    ) -> CollapseReport:
        """Count the shard, from where its part ends."""
        self.shard, self.part = shard, part
        bar = counting(self.limit, "corpus", "token", progress)
        with bar as self.bar, Stopping() as self.stopping:
            self.bar.unit_scale = True
            try:
                self._count(every)
            except Stopped as stop:
                raise self._stopped(stop) from stop
        if self.pool is None:
            raise ValueError(
                f"dataset: wanted a text of two tokens or more; got none in {self.documents.name!r}"
                f" ({self.cut.documents} documents, {self.cut.empty} of them empty)"
            )
        if self.facts is not None:
            for name, (was, now) in differing(self.model_facts, self.facts()):
                raise ValueError(
                    f"model: wanted it unchanged while it is probed; got another {name}: "
                    f"{brief(now)} after {brief(was)}"
                )
        return self._save()

    def _count(self, every: float) -> None:
        saved, freed, read = time.monotonic(), 0.0, 0
        for block in self.cut:
            pool = self._begun(block)
            if self.done.get("complete"):
                return
            read = block.index + 1
            if not self._skips(block):
                self._measure(pool, block)
                if self._enough(pool):
                    break
                if self.part is not None and time.monotonic() - saved > every:
                    self._save()
                    saved = time.monotonic()
            if time.monotonic() - freed > _FREE_EVERY:
                give_back()
                freed = time.monotonic()
            self._show(pool, block)
        if read < self.done.get("blocks", 0):
            raise self._other_documents()
        self.done = {**self.done, **self.cut.state(), "complete": True}

    def _begun(self, block: Block) -> Pool:
        """With the first block: check the model, and go on from the part that is there."""
        if self.pool is None:
            prompts = encode(self.model, block.rows)
            sites = sites_for(self.model, prompts)
            chosen = choose_layers(sites, self.options.layers)
            self.facts = partial(attention_facts, self.model, sites, chosen, prompts, self.name)
            self.model_facts, pool = self.facts(), Pool(self.options, chosen)
            if self.part is not None:
                fresh = SimpleNamespace(settings=pool.settings, model=self._told())
                report = self.part.load(fresh)
                if report is not None:
                    self.done = report.model["corpus"]["done"]
                    pool.restore(report)
            self.pool = pool
        return self.pool

    def _skips(self, block: Block) -> bool:
        """Whether an earlier process has counted this block; then the documents are the same."""
        until: int = self.done.get("blocks", 0)
        if block.index + 1 == until and self.cut.digest != self.done["digest"]:
            raise self._other_documents()
        return block.index < until

    def _other_documents(self) -> ValueError:
        return ValueError(
            f"dataset: wanted the documents that were read when {self.part and self.part.path} was "
            "written; got others"
        )

    def _measure(self, pool: Pool, block: Block) -> None:
        """Count a block, if it is this shard's, and note how far the corpus was read."""
        mine = block.index % self.shard[1] == self.shard[0] - 1
        prompts = encode(self.model, block.rows) if mine else None
        tally = None if prompts is None else pool.count(self.model, prompts, block.first)
        with self.stopping.whole():
            if tally is not None and prompts is not None:
                pool.add(tally, prompts)
            pool.prompts = block.first + len(block.rows)
            self.done = {"blocks": block.index + 1, "prompts": pool.prompts, **self.cut.state()}

    def _show(self, pool: Pool, block: Block) -> None:
        self.bar.update(block.tokens)
        if not self.bar.disable:
            sigma, error = (100 * x for x in pool.one_percent())
            known = "" if math.isnan(error) else f" ± {error:.1g}"
            self.bar.set_postfix_str(f"1% at sigma = {sigma:.3g}{known}%")

    def _enough(self, pool: Pool) -> bool:
        """Whether the error of the sigma at 1% is small enough."""
        if self.until is None or pool.prompts < _LEAST:
            return False
        return bool(100 * pool.one_percent()[1] < self.until)

    def _told(self) -> dict[str, Any]:
        """Facts of the model, and of the corpus."""
        left = [f"{self.done[n]} {what} left out" for n, what in _LEFT_OUT if self.done.get(n)]
        corpus = {"what": self.what, "shard": list(self.shard), "done": self.done}
        given = [*self.model_facts.get("given", ()), *left]
        told = {**self.model_facts, "given": given, "corpus": corpus}
        engines = ", ".join(self.pool.engines) if self.pool else ""
        return told | ({"engine": engines} if engines else {})

    def _save(self) -> CollapseReport:
        assert self.pool is not None
        report = self.pool.report(self._told())
        if self.part is not None:
            with self.stopping.whole():
                self.part.save(report)
        return report

    def _stopped(self, stop: Stopped) -> Stopped:
        """Save what was counted; the error that says so."""
        said = "nothing was kept (out= keeps it)"
        if self.part is not None:
            if self.pool is not None and "blocks" in self.done:
                with self.stopping.whole(last=True):  # torchrun repeats what it is sent
                    self.part.save(self.pool.report(self._told()))
            said = "the same command goes on from there"
        return Stopped(f"stopped after {self.done.get('tokens', 0)} tokens; {said}", stop.signal)
