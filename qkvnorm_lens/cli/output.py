"""A report on standard output and in files, as ``probe`` and ``merge`` write it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkvnorm_lens import tables, text
from qkvnorm_lens.cli import figures

if TYPE_CHECKING:
    from hooks import CollapseReport


def shown(
    args: argparse.Namespace, report: CollapseReport, prompts: text.Prompts, *, first: bool = True
) -> str:
    """What goes to standard output; files are written, too, where ``--out`` names a directory.

    Only the ``first`` of several processes writes and says anything.
    """
    if not first:
        return ""
    if args.out is not None:
        write(args, report, prompts)
    show = tables.as_json if args.json else tables.render
    said = show(report, prompts, fragile=args.fragile, content=args.no_sinks)
    if args.out is None or args.json:
        return said
    return f"{said}\n\nThis and more, to open in a browser: {args.out / 'report.html'}"


def table_of(folder: Path, report: Any, *, as_json: bool) -> str:
    """A report of another measure: its file, table and summary in the folder; the latter two here.

    Args:
        folder: an existing directory.
        report: with `save`, `to_frame` and `summary`.
        as_json: the table as JSON, and nothing else.
    """
    frame, summary = report.to_frame(), report.summary()
    report.save(folder / "report.safetensors")
    frame.to_csv(folder / "frame.csv", index=False)
    (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    return str(frame.to_json(orient="records")) if as_json else f"{summary}\n\n{frame}"


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun or srun started."""
    from hooks.corpus import rank_and_size

    return rank_and_size()[0] == 0


def read_of(report: CollapseReport) -> text.Prompts:
    """What a corpus's report was read from, in words."""
    what = report.model["corpus"]["what"]
    split = f" ({what['split']})" if what["split"] else ""
    windows = f"{len(report.tokens)} windows of at most {what['context']} tokens"
    return text.Prompts([], f"{windows} of {what['dataset']}{split}")


def write(args: argparse.Namespace, report: CollapseReport, prompts: text.Prompts) -> None:
    """Report, its page, frame, summary and figures into the directory ``--out``, which exists."""
    folder, content = args.out, args.no_sinks
    report.save(folder / "report.safetensors")
    report.to_frame().to_csv(folder / "frame.csv", index=False)
    summary = tables.render(report, prompts, fragile=args.fragile, content=content)
    (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    from qkvnorm_lens.page import write_html

    write_html(report, folder / "report.html", source=read_in_words(prompts), content=content)
    figures.clear(folder)
    if not figures.write(report, folder, args):
        say("no figures: they need matplotlib, pip install 'qkvnorm-lens[plots]'")


def read_in_words(prompts: text.Prompts) -> str:
    """What was read, and what was left out of it."""
    return f"{prompts.source}{'; ' if prompts.left_out else ''}{prompts.left_out}"


def say(words: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"qkvnorm-lens: {words}\n")
