"""The collapse probe on a whole corpus, in constant memory."""

from __future__ import annotations

import os
from typing import Any, Final

from hooks.collapse import CollapseReport, Pool, read_options, tell_if_compiling
from hooks.corpus.run import Run
from hooks.model import HookedModel, Prompts, measurement
from hooks.sites import LayerSites, may_always_share

KEEP: Final = 1 << 17
"""Competitors that a corpus's report lists: some 5 MB."""


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
    pack: bool = False,
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
        pack: put several documents into one window, as many as fit, and keep them apart: positions
            begin again in each, and none attends to another. The rates are those without it, up to
            rounding; a prompt is a window then.
        out: a directory for what was counted; default: nothing is written.
        shard: (i, n), i from 1 to n: count only every n-th block of windows. :func:`merge_corpus`
            puts the parts together.
        save_every: seconds between two states in ``out``; default: 60.
        name: what the report calls the model; default: the model's own name.
        progress: show tokens a second, time left, and the answer so far; default: in a terminal or
            a notebook.
        **options: ``sigmas``, ``on``, ``method``, ``law``, ``shared``, ``layers``, ``sparse``,
            ``strict``, ``draws``, ``seed``, ``batch_size``, ``keep`` (default: 131072),
            ``keep_rows`` and ``query_block`` of :func:`collapse_probe`.

    Returns:
        :class:`CollapseReport`; of a shard, the sums of its own part.

    Raises:
        UnsupportedModelError: the model failed the self-check; or, with ``pack``, documents packed
            into a window do not give what they give alone.
        ValueError: nothing that can be read, a column that is missing or no text, no document, a
            window longer than the model's context, or an ``out`` with another run in it.
        Stopped: a KeyboardInterrupt; the message says where the run stopped.
    """
    chosen = read_options(**{"keep": KEEP} | options, pooled=True)

    def begin(layers: tuple[LayerSites, ...], prompts: Prompts) -> Pool:
        tell_if_compiling(model, chosen.engine, progress)
        padded = not run.pack and may_always_share(model, layers, run.context)
        return Pool(chosen, layers, padded=padded)

    run = Run(
        model,
        dataset,
        begin,
        measure="collapse_probe",
        options=None,
        layers=chosen.layers,
        batch_size=chosen.together(None),
        split=split,
        column=column,
        context=context,
        tokens=tokens,
        until=until,
        prepend_bos=prepend_bos,
        pack=pack,
        name=name,
    )
    report: CollapseReport = run(shard, out, save_every, progress)
    return report
