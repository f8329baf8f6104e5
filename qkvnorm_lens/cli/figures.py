"""Figures beside a report: `probe --out DIR` writes them, `report DIR --format pdf` again."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkvnorm_lens import tables
from qkvnorm_lens.arguments import brief, number

if TYPE_CHECKING:
    from hooks import CollapseReport

FORMATS: Final = ("pdf", "svg", "png")
NAMES: Final = ("collapse", "heads", "rows")
WIDTHS: Final = ("column", "text", "page")


def add_arguments(group: Any, default: str) -> None:
    """Add the options of figures."""
    said = f"of the figures: some of {', '.join(FORMATS)} [{default}]"
    group.add_argument("--format", type=formats, metavar="LIST", help=said)
    said = "of the figures, for a paper: column (3.25 inches), text (5.5), page (6.75), or inches"
    group.add_argument("--width", type=width, metavar="W", help=said)


def check(args: argparse.Namespace) -> None:
    """Refuse options of figures where none are written."""
    for name in ("format", "width"):
        if args.out is None and getattr(args, name) is not None:
            raise ValueError(f"--{name}: wanted it with --out; got it without")


def formats(value: str) -> tuple[str, ...]:
    """``pdf,png``."""
    names = tuple(dict.fromkeys(value.split(",")))
    if set(names) - set(FORMATS):
        wanted = f"wanted some of {', '.join(FORMATS)}, with commas"
        raise argparse.ArgumentTypeError(f"{wanted}; got {brief(value)}")
    return names


def width(value: str) -> str | float:
    """A name, or inches."""
    if value in WIDTHS:
        return value
    wanted = f"{', '.join(WIDTHS)} or inches from 2.5 to 50"
    return number(wanted, lambda x: 2.5 <= x <= 50)(value)


def clear(folder: Path, names: Collection[str] = NAMES) -> None:
    """Take away figures of another run, which would be taken for this one's."""
    for name, suffix in itertools.product(names, FORMATS):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def write(report: CollapseReport, folder: Path, args: argparse.Namespace) -> list[Path]:
    """Curve, map and rows; none without matplotlib.

    Returns:
        What was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from qkvnorm_lens import plots
    from qkvnorm_lens.plots.html import shown_rows

    content = args.no_sinks
    figures = {"collapse": plots.collapse_curve(report)}
    try:
        figures["heads"] = plots.head_map(report, rate=tables.RATE, content=content)
    except ValueError as refused:  # a table that is too small for it; the page says so, too
        sys.stderr.write(f"qkvnorm-lens: no map of heads: {refused}\n")
    if shown_rows(report, 1, content=content):
        figures["rows"] = plots.attention_rows(report, content=content)
    clear(folder, {*NAMES} - {*figures})
    written = []
    for name, figure in figures.items():
        options = {"formats": args.format or ("png",), "width": args.width}
        written += plots.save(figure, folder / name, **options, dpi=300 if args.width else 150)
    return written
