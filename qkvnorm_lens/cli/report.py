"""``qkvnorm-lens report``: the page of a saved probe."""

from __future__ import annotations

import argparse
from pathlib import Path

from qkvnorm_lens.arguments import file, some_path
from qkvnorm_lens.cli import figures

HELP = "make the HTML page of a saved probe"
DESCRIPTION = """\
Write report.html, one file that opens anywhere and loads nothing, from what `probe --out DIR`
saved: summary, curve, map of heads, the most fragile rows before and after noise, tables, and
what to keep in mind."""
EPILOG = """\
examples:
  qkvnorm-lens probe gpt2 --file story.txt --out runs/gpt2     writes the page too
  qkvnorm-lens report runs/gpt2
  qkvnorm-lens report runs/gpt2 --no-sinks --out content.html
  qkvnorm-lens report runs/gpt2 --format pdf,png --width column    figures for a paper
"""
SAVED = "report.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    said = f"where `probe --out` wrote, or a {SAVED} itself"
    parser.add_argument("directory", type=some_path, metavar="DIR", help=said)
    parser.add_argument("--out", type=some_path, metavar="FILE", help="[DIR/report.html]")
    said = "list heads and rows by attention that does not go to the first token"
    parser.add_argument("--no-sinks", action="store_true", help=said)
    parser.add_argument(
        "--no-views", action="store_true", help="leave out circuitsvis's attention views (1.3 MB)"
    )
    figures.add_arguments(parser, "no figures")


def run(args: argparse.Namespace) -> str:
    """Read the report, write the page; returns where it is.

    Raises:
        ValueError: no report there, or one of another format.
        OSError: the page can't be written.
    """
    folder = args.directory
    saved = folder / SAVED if folder.is_dir() else folder
    if not saved.is_file():
        got = f"{folder}, which {'has none' if folder.is_dir() else 'does not exist'}"
        raise ValueError(f"DIR: wanted a directory with {SAVED}, as probe --out writes; got {got}")
    out = args.out or saved.parent / "report.html"
    file("--out", out)
    from hooks import CollapseReport
    from qkvnorm_lens.page import write_html

    report = CollapseReport.load(saved)
    path = write_html(
        report,
        out,
        source=_source(saved.parent / "summary.txt"),
        content=args.no_sinks,
        views=False if args.no_views else None,
    )
    said = f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"
    if args.format is None and args.width is None:
        return said
    drawn = figures.write(report, out.parent, args)
    if not drawn:
        raise ImportError("figures need matplotlib: pip install 'qkvnorm-lens[plots]'")
    return "\n".join([said, *(f"wrote {figure}" for figure in drawn)])


def _source(summary: Path) -> str:
    """What was read, in the words of the summary that `probe` wrote beside the report."""
    if not summary.is_file():
        return ""
    lines = summary.read_text(encoding="utf-8").splitlines()
    said = next((line for line in lines if line.startswith("Read: ")), "")
    return said.removeprefix("Read: ").removesuffix(".")
